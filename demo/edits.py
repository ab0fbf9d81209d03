"""Edit questions about the drawn world a little, as people type: politeness, small talk, case, no question mark.

Called by `demo/asking.py` and, for the questions about a boxed object, by `demo/language.py`.
"""

import numpy as np

from demo.wordings import ENGLISH_PLACES

EDITED = 0.5  # share of the questions with an edit or several
FILLER_SHARE = 0.3  # of the edited questions: with a word that changes nothing
PLACE_WORDS = {word for texts in ENGLISH_PLACES.values() for text in texts for word in text.split()}
# small talk and politeness around a question
OPENERS = {
    "english": (
        *("Please tell me: ", "Can you tell me: ", "Could you please tell me, ", "Hello! ", "Hi, "),
        *("Look at the picture. ", "Quick question: ", "I wonder: ", "So, ", "OK. ", "My friend asks: "),
        *("Now tell me: ", "Please: ", "Well, ", "Hello, how are you? ", "Good morning. ", "Excuse me, "),
        *("Next question: ", "And ", "Thanks. ", "Hey, "),
    ),
    "chinese": (
        *("请问，", "请问", "你好，", "麻烦告诉我，", "请告诉我：", "看图回答：", "嗨，", "我想问一下，", "那么"),
        *("好的，", "下一个问题：", "谢谢。", "帮我看看，", "我朋友问：", "你好吗？", "那", "请回答："),
    ),
}
CLOSERS = {
    "english": (", please?", " please", ", thanks", ". Thank you.", "? Thanks!", "? Please answer."),
    "chinese": ("？谢谢。", "？谢谢！", "，请回答", "呢？", "，请告诉我"),
}
# words that change nothing; with them the model learns to read past words that it does not know
FILLERS = {
    "english": (
        *(
            "just",
            "now",
            "maybe",
            "really",
            "actually",
            "all",
            "exactly",
            "still",
            "also",
            "perhaps",
            "simply",
            "kindly",
        ),
        *(
            "here",
            "they",
            "we",
            "this",
            "that",
            "visible",
            "found",
            "look",
            "check",
            "contain",
            "notice",
            "spot",
            "sort",
        ),
        *("total", "somewhere", "much", "from", "with", "at", "could", "would", "some", "any", "draw", "seen", "idea"),
        *("say", "show", "help", "let", "area", "location", "number", "call", "true", "missing", "around", "whole"),
    ),
    "chinese": (
        *("到底", "究竟", "仔细", "看看", "一共", "大概", "其实", "现在", "这里面", "说说", "具体", "全部", "能不能"),
        *("猜猜", "指出", "说明", "判断", "比较", "内容", "上面", "请", "能", "帮", "呀", "嘛", "啊", "吧", "哦", "些"),
    ),
}


class FirstChoice:
    """A generator of numbers with which every question gets its first wording and first synonyms, without edits."""

    def integers(self, *_: int) -> int:
        return 0

    def random(self) -> float:
        return 1.0


Words = np.random.Generator | FirstChoice  # chooses among the wordings


def vary(text: str, rng: Words, language: str) -> str:
    """Edit half of the questions a little, as people type: politeness, small talk, case, contractions, no mark."""
    if rng.random() >= EDITED:
        return text
    if language == "english":
        if rng.random() < 0.3:
            text = text.replace("What is ", "What's ").replace("Where is ", "Where's ")
        if rng.random() < 0.3 and text.endswith("?") and "picture" not in text:
            text = f"{text[:-1]} in the picture?"
        if rng.random() < FILLER_SHARE:
            words = text.split()
            index = int(rng.integers(1, len(words) + 1))
            if not {word.strip("?.:,").lower() for word in words[index - 1 : index + 1]} <= PLACE_WORDS:
                words.insert(index, _filler(rng))  # not inside "top left", which would then name another place
            text = " ".join(words)
    elif rng.random() < 0.2 and "图" not in text and "画" not in text:
        text = pick(("图中", "图里", "图片里", "画面中"), rng) + text
    elif rng.random() < FILLER_SHARE:
        filler, end = pick(FILLERS["chinese"], rng), text.rstrip("？。")
        text = pick((filler + text, end + filler + text[len(end) :]), rng)
    if rng.random() < 0.3:
        text = pick(CLOSERS[language], rng).join([text.rstrip("?.？。"), ""])
    elif rng.random() < 0.4:
        text = text.rstrip("?.？。") + pick(("", "", "", " ?", "??"), rng)
    if rng.random() < 0.4:
        opener = pick(OPENERS[language], rng)
        keep = opener.rstrip()[-1] in ".!" or rng.random() < 0.3  # the capital
        text = opener + (text if keep else text[0].lower() + text[1:])
    if rng.random() < 0.3:
        text = text.lower()
    elif rng.random() < 0.05:
        text = text.upper()
    return text


def _filler(rng: Words) -> str:
    """Return a word that changes nothing, or letters: the pieces of a word that the tokenizer does not know."""
    if rng.random() < 0.7:
        return pick(FILLERS["english"], rng)
    return "".join(pick("abcdefghijklmnoprstuvwy", rng) for _ in range(int(rng.integers(2, 8))))


def pick(options: list | tuple | str, rng: Words):
    return options[int(rng.integers(len(options)))]
