"""All texts of the page in both languages; a page shows one of them at a time.

The browser picks a language at first, and the button at the top switches it (`browser.js`, which keeps the choice in a
cookie). Gradio translates the labels in the browser (`label`); sentences that arise while the page runs are written in
the language of the request (`say`).
"""

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gradio as gr

COOKIE = "vqa_language"
LANGUAGES = ("en", "zh")

# key: (English, Chinese)
TEXTS = {
    "title": ("Ask about a photo", "看图问答"),
    "title_line": ("# Ask about a photo", "# 看图问答"),
    "switch": ("中文", "English"),
    "chat": ("Chat", "对话"),
    "batch_tab": ("Many photos", "批量提问"),
    # chat
    "hello": (
        "<center>Add a photo with the paper clip, drop or paste one,<br>or take a sample below. Then ask.</center>",
        "<center>点回形针添加照片，或拖入、粘贴照片，<br>也可以选用下面的样例，然后提问。</center>",
    ),
    "question": ("Question", "问题"),
    "question_hint": ("Question about the photo", "关于照片的问题"),
    "ask": ("Ask", "提问"),
    "stop": ("Stop", "停止"),
    "again": ("Regenerate", "重新回答"),
    "edit": ("Edit", "修改问题"),
    "editing": ("Ask this question anew; what came after it goes", "重新提出这个问题，之后的内容会被删除"),
    "editing_none": ("none: ask a new question", "不修改：提出新问题"),
    "clear": ("New chat", "新对话"),
    "download": ("Download", "下载"),
    "where": ("This chat has a photo already", "对话中已有照片"),
    "where_add": ("Add the new one to this chat", "新照片加入当前对话"),
    "where_new": ("Ask about the new one in a new chat", "用新照片开始新对话"),
    "example_1": ("What is in the picture?", "这幅图像中有什么？"),
    "example_2": ("How many objects are there?", "有几个物体？"),
    "example_3": ("Describe the picture.", "请描述这幅图像。"),
    "sample": ("Sample photo", "样例照片"),
    "camera": ("Camera", "拍照"),
    "no_answer": ("(no answer)", "（没有回答）"),
    "part_of_photo": ("Part of the photo", "照片的局部"),
    # what a question waits for
    "working": ("Looking at the photo…", "正在看图……"),
    "loading": ("Loading {name}…", "正在加载 {name}……"),
    "waiting": ("Waiting: {ahead} before you in the queue", "排队中：前面还有 {ahead} 个"),
    "stopped": ("Stopped.", "已停止。"),
    "figures": (
        "first token after {first:.2f} s · {speed:.1f} tokens/s · tokens: {new} read, {reused} reused, {out} written",
        "首词 {first:.2f} 秒 · {speed:.1f} 词元/秒 · 词元：读取 {new}，复用 {reused}，回答 {out}",
    ),
    "memory": ("{gib:.1f} GiB in use", "占用内存 {gib:.1f} GiB"),
    "cut_off": ("cut off: raise 'Longest answer' for more", "已截断：调大“最长回答”可以看到更多"),
    # settings
    "settings": ("Settings", "设置"),
    "checkpoint": ("Checkpoint", "检查点"),
    "checkpoint_info": ("name · validation loss · date", "名称 · 验证损失 · 日期"),
    "greedy": ("Greedy", "贪心解码"),
    "greedy_info": ("Always the likeliest word; off: draw words", "总选最可能的词；关闭后随机抽取"),
    "temperature": ("Temperature", "温度"),
    "top_p": ("Top-p", "Top-p"),
    "top_k": ("Top-k (0: off)", "Top-k（0：关闭）"),
    "min_p": ("Min-p (0: off)", "Min-p（0：关闭）"),
    "repetition_penalty": ("Repetition penalty (1: off)", "重复惩罚（1：关闭）"),
    "seed": ("Seed", "随机种子"),
    "longest": ("Longest answer, tokens", "最长回答（词元）"),
    "system": ("System message", "系统消息"),
    "system_info": ("Empty: the one of the training", "留空：使用训练时的系统消息"),
    # saved chats
    "kept": ("Earlier chats", "历史对话"),
    "kept_info": (
        "Kept in this browser only, photos as small copies",
        "只保存在本浏览器中，照片保存为缩小的副本",
    ),
    "forget": ("Delete this one", "删除此对话"),
    "forget_all": ("Delete all", "全部删除"),
    # looking
    "looked": ("Where it looked", "看了哪里"),
    "looked_info": (
        "For the last answer, or one of its words. Bright: the answer depends on it. Hatched: never seen.",
        "针对最后一个回答或其中一个词。亮处：回答依赖于此；斜线：模型看不到。",
    ),
    "words": ("Part of the answer", "回答中的部分"),
    "whole_answer": ("Whole answer", "整个回答"),
    "method": ("Method", "方法"),
    "gradient": ("Gradient", "梯度"),
    "attention": ("Attention (often misleading)", "注意力（常有误导）"),
    "map": ("Map over the photo", "照片上的热图"),
    "look": ("Show", "显示"),
    # a part of a photo
    "part": ("Ask about a part", "询问照片的局部"),
    "part_info": (
        "Drag over the photo. The box goes with the next question.",
        "在照片上拖动画框。方框只随下一个问题发送。",
    ),
    "box": ("Box: left, top, right, bottom, as fractions of the photo", "方框：左、上、右、下，占照片的比例"),
    "no_box": ("Remove the box", "去掉方框"),
    # side by side
    "beside": ("Side by side", "并排比较"),
    "beside_info": (
        "Asks the last question of the chat again, of two checkpoints.",
        "把对话中的最后一个问题同时交给两个检查点回答。",
    ),
    "left": ("Left", "左"),
    "right": ("Right", "右"),
    "untrained": ("with an untrained projector", "未训练的投影层"),
    "compare": ("Compare", "比较"),
    # batch
    "batch_info": (
        'Either photos and one question for all of them, or a .jsonl file with one `{"image": FILE, "question": '
        "TEXT}` a line, uploaded together with its photos.",
        '上传照片并输入一个问题，逐张回答；或上传 .jsonl 文件（每行 `{"image": 文件名, "question": 问题}`）及其照片。',
    ),
    "batch_files": ("Photos, or a .jsonl file and its photos", "照片，或 .jsonl 文件及其照片"),
    "batch_folder": ("Add a whole folder", "添加整个文件夹"),
    "batch_question": ("Question for every photo", "对每张照片提的问题"),
    "batch_run": ("Answer all", "全部回答"),
    "cancel": ("Cancel", "取消"),
    "batch_table": ("Answers", "回答"),
    "batch_photo": ("photo", "照片"),
    "batch_asked": ("question", "问题"),
    "batch_answer": ("answer", "回答"),
    "batch_state": ("{done} of {all} answered", "已回答 {done} / {all}"),
    "batch_failed": ("{failed} with an error", "{failed} 个出错"),
    # complaints
    "no_photo": ("No photo yet: add one to the question.", "还没有照片，请先添加一张。"),
    "no_question": ("The question is empty: type one first.", "问题是空的，请先输入问题。"),
    "nothing_to_repeat": ("There is no answer to repeat yet.", "还没有可以重新回答的内容。"),
    "nothing_to_look_at": ("There is no answer yet: ask first.", "还没有回答，请先提问。"),
    "nothing_to_save": ("There is nothing to download yet.", "还没有可以下载的内容。"),
    "same_answer": (
        "Greedy answers stay the same; switch it off in the settings for another.",
        "贪心解码的回答不会改变；在设置中关闭它可以得到不同的回答。",
    ),
    "busy": ("An answer is being written: press Stop first.", "正在回答，请先按“停止”。"),
    "out_of_memory": (
        "Out of memory: lower 'Longest answer', start a new chat, close other programs on this device, or load a "
        "smaller model.",
        "内存不足：请调小“最长回答”，开始新对话，关闭占用同一设备的其他程序，或换用更小的模型。",
    ),
    "gone": (
        "A photo was not uploaded here, or is gone: start a new chat and add it again.",
        "有照片未在此上传或已被清除，请开始新对话并重新添加。",
    ),
    "error": ("{sentence}", "出错了，原因（英文）：{sentence}"),
    "bad_kept": (
        "This chat cannot be opened: another version of the page kept it. Delete it.",
        "无法打开该对话：它由其他版本的页面保存。请将其删除。",
    ),
    "no_rows": (
        "Nothing to answer: add photos and a question, or a .jsonl file.",
        "没有可以回答的内容：请添加照片和问题，或添加 .jsonl 文件。",
    ),
}


def translations() -> "gr.I18n":
    """Return what the browser needs for `label`; `zh-CN` is Gradio's name of Chinese."""
    import gradio as gr

    english, chinese = ({key: texts[place] for key, texts in TEXTS.items()} for place in (0, 1))
    return gr.I18n(en=english, **{"zh-CN": chinese})


def label(key: str) -> Any:
    """Return a text that the browser shows in the language of its page."""
    from gradio.i18n import I18nData

    assert key in TEXTS, key
    return I18nData(key)


def language_of(request: "gr.Request | None") -> str:
    """Return the language of the page that sent a request; English for programs."""
    if request is None or request.request is None:
        return "en"
    chosen = request.cookies.get(COOKIE)
    if chosen in LANGUAGES:
        return chosen
    return "zh" if request.headers.get("accept-language", "").lower().startswith("zh") else "en"


def say(language: str, key: str, **values: Any) -> str:
    """Return a sentence in a language, with values filled in."""
    return TEXTS[key][LANGUAGES.index(language)].format(**values)


def as_markdown(text: str) -> str:
    """Return Markdown that shows a text as it is; else the browser would fetch the pictures that it names."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)
