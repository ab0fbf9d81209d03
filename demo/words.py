"""Tokenizer of the demo: byte-level BPE with Qwen2's splitting rule and ChatML control tokens; it encodes any text.

Its vocabulary comes from the words of the drawn world and the short general text below. Used by `demo/pretrain.py`.
"""

import json
import re
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from demo import edits, wordings
from demo.world import CAPTION_QUESTIONS, CAPTION_TEMPLATES, CELLS, CHINESE, COLOURS, SHAPES, SIZES

VOCABULARY = 2300  # tokens before the three control tokens; enough for all words of the texts
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

ENGLISH = """You are a helpful assistant. system user assistant The quick brown fox jumps over the lazy dog and looks at
the moon. Please describe what you can see in this photo. I do not know. There are three people in front of the house,
and one of them is holding an umbrella. What is the man doing? He is riding a bicycle along the street. Is it a sunny
day? Yes, it is. No, it is not. How many cars are parked near the building? Which animal is sitting on the chair? A small
cat is sleeping on a large wooden table beside the window. Someone has put flowers, fruit and bread on the plate. Why
would people want to come here? They may like the water, the trees and the mountains. The picture shows a kitchen with
a white refrigerator, some dishes and a clock on the wall. At night the city is bright with lights. We read books, play
music, watch birds and take long walks. This image contains many different objects, colours and shapes. Answer the
question with a single word or phrase. Thank you very much for your help, good morning and good night. Where does the
train stop? When will the bus arrive? Who has the answer? It was under the bed, behind the door, between two boxes, above
the shelf, below the lamp, next to the sofa, inside the bag and outside the room. One two three four five six seven eight
nine ten zero none both each other another first second third last next black orange pink brown grey gray object thing
object objects photo picture image part place size bigger smaller larger largest smallest same star line point square"""  # noqa: E501
# Spaces limit the merges to whole words, so a caption always splits at its words.
CHINESE_TEXT = """你 好 你们 我们 他们 请 问 请问 谢谢 今天 天气 很 好 图片 图像 画面 照片 里 中 有 什么 这 这是 那 是
不是 没有 一个 两个 三个 四个 五个 几个 多少 人 男人 女人 孩子 狗 猫 鸟 马 车 汽车 火车 自行车 飞机
船 街道 房子 桌子 椅子 杯子 书 手机 电脑 水 树 花 草 山 海 天空 太阳 月亮 晚上 早上 城市 公园 学校
学生 老师 吃 喝 看 看到 走 跑 坐 站 拿 放 在 上 下 左 右 前 后 旁边 里面 外面 大 小 大的 小的 红 绿
蓝 黄 紫 白 黑 颜色 形状 位置 物体 哪里 哪个 比 更 还是 和 的 了 吗 呢 吧 可以 描述 一下 回答 问题
助手 一幅 一张 幅 张 喜欢 知道 因为 所以 但是 如果 时候 地方 东西 非常 漂亮"""


def world_words() -> list[str]:
    """Return all text pieces of the world, cut at words that should become one token.

    Questions in Chinese are cut into characters, because people type other words with the same characters; only the
    world's own names are one token each.
    """
    pieces = [re.sub(r"{.*?}", " ", text) for texts in wordings.ENGLISH.values() for text in texts]
    pieces += edits.OPENERS["english"]
    inside = [*wordings.FILLS["english"].values(), wordings.THINGS["english"], edits.FILLERS["english"]]
    pieces += [f" {word}" for words in inside for word in words]  # a word has one token with the space before it
    pieces += [text.lower() for text in pieces]
    names = [*COLOURS, *SHAPES, *SIZES, *CELLS, "crosses", *(f"{shape}s" for shape in SHAPES), "yes", "no"]
    names += [word for texts in wordings.ENGLISH_PLACES.values() for text in texts for word in text.split()]
    names += [word for one in wordings.ENGLISH_OBJECTS for word in (one, f"{one}s")]
    names += [word for texts in wordings.MORE["english"].values() for word in texts]
    names = list(dict.fromkeys(names))
    pieces += [f"{name} {name}" for name in names] + [form for name in names for form in (name.title(), name.upper())]
    pieces += [word for template in CAPTION_TEMPLATES for word in template.split("{}")]
    pieces += ["system", "user", "assistant", "、", "，", "？", "：", "！", f" {wordings.UNKNOWN['english']}"]
    asked = wordings.CHINESE | wordings.FILLS["chinese"] | edits.CLOSERS | edits.FILLERS
    asked |= {"": (*edits.OPENERS["chinese"], *wordings.THINGS["chinese"], wordings.UNKNOWN["chinese"])}
    characters = {character for texts in asked.values() for text in texts for character in text if character > "\x7f"}
    places = [text for texts in wordings.CHINESE_PLACES.values() for text in texts]
    pieces += [*sorted(characters), *places, *wordings.CHINESE_OBJECTS, "颜色", "形状", "什么"]
    return pieces + list(CHINESE.values()) + [question.removesuffix("？") for question in CAPTION_QUESTIONS]


def train_tokenizer() -> Qwen2Tokenizer:
    """Train the tokenizer; control tokens come after the learned ones, as in Qwen's own vocabulary."""
    backend = Tokenizer(models.BPE())
    qwen_backend = Qwen2Tokenizer().backend_tokenizer
    backend.normalizer, backend.pre_tokenizer = qwen_backend.normalizer, qwen_backend.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([*world_words() * 50, *ENGLISH.split("\n") * 2, *CHINESE_TEXT.split() * 2], trainer)
    model = json.loads(backend.to_str())["model"]
    vocabulary = model["vocab"] | {token: len(model["vocab"]) + index for index, token in enumerate(CONTROL_TOKENS)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token="<|im_end|>",
        additional_special_tokens=list(CONTROL_TOKENS[1:]),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tokenizer(tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, and vocab.json and merges.txt of the older layout."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
