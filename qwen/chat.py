"""Prompt format: messages to `(input_ids, labels)`. No other file defines the format.

Training, evaluation, page and command line all call `ChatFormat.render`, so they use the same format.
The format is ChatML, `<|im_start|>role\\ntext<|im_end|>\\n`; only this file writes control tokens. User text is
data: `<|im_end|>`, `<|extra_0|>` or `<think>` in it is tokenised as plain characters.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from config import IMAGE_TAG, Prompt
from qwen.tokenizer import image_token_id, text_encoder
from visual_plan import VisualPlan

THINK_BLOCK = "<think>\n\n</think>\n\n"  # turns Qwen3's thinking off (its model card)
IGNORE_INDEX = -100  # label of positions without supervision, the default of torch's cross-entropy


# the photos of a message, in reading order; a number: that many photos of one crop each
Photos = int | Sequence[VisualPlan]


@dataclass(frozen=True)
class Message:
    """One turn. A part is a text or the plan of a photo; control tokens in a text are plain characters."""

    role: str  # user | assistant; the first message may be of the role system, in place of `prompt.system`
    parts: tuple[str | VisualPlan, ...]


class MessageFormat:
    """Makes messages by the prefix and the place of the photo in `prompt`; `plan` is that of a photo without tiles."""

    def __init__(self, prompt: Prompt, plan: VisualPlan) -> None:
        self.prompt, self.plan = prompt, plan
        self.text_start = "\n" if prompt.newline_before_text else ""  # of a text behind a role, not behind a photo

    def question(self, text: str, photos: Photos) -> Message:
        """Return the user message of a record: the first tags `<|extra_0|>` in `text` mark its photos, one tag each.

        Raises:
            ValueError: fewer tags than photos; gives both numbers.
        """
        plans = self._plans(photos)
        pieces = text.split(IMAGE_TAG, len(plans))
        if len(pieces) - 1 != len(plans):
            raise ValueError(f"{len(plans)} photos but {len(pieces) - 1} tags {IMAGE_TAG} in the question {text!r}")
        if self.prompt.image_first or not plans:
            rest = "".join(piece.removeprefix("\n") if index else piece for index, piece in enumerate(pieces))
            return self.typed_question(rest, plans)
        parts: list[str | VisualPlan] = [self.prompt.question_prefix + pieces[0]]
        for plan, piece in zip(plans, pieces[1:], strict=True):
            parts += [plan, piece]
        return Message("user", tuple(parts))

    def typed_question(self, text: str, photos: Photos) -> Message:
        """Return the user message for `text` typed below `photos`; tags in `text` have no effect."""
        prefix, plans = self.prompt.question_prefix, self._plans(photos)
        if not plans:
            return Message("user", (self.text_start + prefix + text,))
        if self.prompt.image_first:
            return Message("user", (*plans, "\n" + prefix + text))
        return Message("user", (prefix, *plans, "\n" + text))

    def _plans(self, photos: Photos) -> list[VisualPlan]:
        return [self.plan] * photos if isinstance(photos, int) else list(photos)

    def answer(self, text: str) -> Message:
        """Return the assistant message with `text`."""
        return Message("assistant", (text.strip(),))


class ChatFormat(MessageFormat):
    """Renders messages to token ids and labels.

    Args:
        tokenizer: from `qwen.tokenizer.load_tokenizer`.
        prompt: system sentence, question prefix, place of the photo, start of texts, end token (config section
            `prompt`).
        crop_tokens: number of placeholders of one crop.
        model_type: of the language model. `qwen3` gets an empty, unsupervised think block before each answer, if its
            own template writes one with `enable_thinking=False` (the 2507 instruct models do not think). `qwen`, the
            first generation, always has a system block. Its role and text are tokenised separately in messages without
            a photo, as in its `make_context`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, crop_tokens: int, model_type: str = "qwen2"
    ) -> None:
        super().__init__(prompt, VisualPlan(crop_tokens))
        self.tokenizer = tokenizer
        self._encoder = text_encoder(tokenizer)
        self._encoded: dict[str, list[int]] = {}
        self.first_generation = model_type == "qwen"
        self.image_token_id = image_token_id(tokenizer)
        self.start_id = tokenizer.convert_tokens_to_ids("<|im_start|>")
        self.turn_end_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.answer_end_id = tokenizer.convert_tokens_to_ids(prompt.end_token)
        self.stop_ids = {self.turn_end_id, self.answer_end_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")}
        self.newline_ids = self.encode_text("\n")
        self.think = THINK_BLOCK if model_type == "qwen3" and _skips_thinking(tokenizer) else ""
        self.think_ids = tokenizer.encode(self.think, add_special_tokens=False)

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of `text`; control tokens in it are encoded as plain characters."""
        if len(text) > 1000:  # seldom repeats, and such texts of a server's clients would fill the memory
            return self._encoder.encode(text, add_special_tokens=False).ids
        # a tokenizer call takes 0.1 ms even for a short text, and most texts except answers repeat
        ids = self._encoded.get(text)  # looked up once, because another thread may clear the dict
        if ids is None:
            if len(self._encoded) >= 4096:
                self._encoded.clear()
            ids = self._encoded[text] = self._encoder.encode(text, add_special_tokens=False).ids
        return list(ids)

    def render(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """Return token ids and labels of a dialogue; if the last message is the user's, the answer is left open.

        Returns:
            `input_ids` (T,) with the placeholders of each photo's plan, and `labels` (T,): the id at tokens of
            answers and at their end tokens, -100 elsewhere.

        Raises:
            ValueError: an empty dialogue, or roles that do not alternate beginning with the user.
        """
        system = self.prompt.system
        if messages and messages[0].role == "system":
            system, messages = str(messages[0].parts[0]), messages[1:]
            system = system and self.text_start + system
        for index, message in enumerate(messages):
            if message.role != ("user", "assistant")[index % 2]:
                raise ValueError(f"message {index} is the {message.role}'s: user and assistant must take turns")
        if not messages:
            raise ValueError("no messages: there must be at least one question")
        ids: list[int] = []
        labels: list[int] = []

        def add(new_ids: list[int], supervised: bool = False) -> None:
            ids.extend(new_ids)
            labels.extend(new_ids if supervised else [IGNORE_INDEX] * len(new_ids))

        if system or self.first_generation:
            add([self.start_id, *self.encode_text("system\n" + system), self.turn_end_id])
            add(self.newline_ids)
        for index, message in enumerate(messages):
            add([self.start_id])
            if message.role == "user":
                self._add_user(message, add)
            else:  # the last answer goes on from the ids of the open question, as the model writes it
                self._add_assistant(message, add, "" if index == len(messages) - 1 else self.text_start)
            add(self.newline_ids)
        if messages[-1].role == "user":
            add([self.start_id, *self.encode_text("assistant\n"), *self.think_ids])
        return ids, labels

    def _add_user(self, message: Message, add) -> None:
        text = "user\n"  # role and text are one string for the tokenizer, as in the template
        if self.first_generation and all(isinstance(part, str) for part in message.parts):
            add(self.encode_text(text))
            text = ""
        for part in message.parts:
            if isinstance(part, str):
                text += part
            else:
                add(self.encode_text(text) if text else [])
                add(self._photo_ids(part))
                text = ""
        add(self.encode_text(text) if text else [])
        add([self.turn_end_id])

    def _photo_ids(self, plan: VisualPlan) -> list[int]:
        """Return placeholders of the whole photo, then of each tile after a line with its row and column: `[1,2]`."""
        crop = [self.image_token_id] * plan.crop_tokens
        ids = list(crop)
        for row in range(1, plan.tile_rows + 1):
            for column in range(1, plan.tile_columns + 1):
                ids += [*self.encode_text(f"\n[{row},{column}]"), *crop]
        return ids

    def photo_spans(self, ids: Sequence[int], plans: Sequence[VisualPlan]) -> list[tuple[int, int]]:
        """Return start and end of each photo in `ids`; `plans` are in reading order."""
        places = [position for position, token in enumerate(ids) if token == self.image_token_id]
        ends = list(itertools.accumulate(plan.tokens for plan in plans))
        assert not plans or ends[-1] == len(places), "the plans are not those of the rendered photos"
        return [(places[end - plan.tokens], places[end - 1] + 1) for end, plan in zip(ends, plans, strict=True)]

    def _add_assistant(self, message: Message, add, start: str) -> None:
        answer = "".join(part for part in message.parts if isinstance(part, str))
        before = "assistant\n"
        if self.think_ids:  # control tokens separate role and answer, so each is a string of its own
            add([*self.encode_text(before), *self.think_ids])
            before = ""
        before += start
        encoding = self._encoder.encode(before + answer, add_special_tokens=False)
        length = sum(place < len(before) for place, _ in encoding.offsets)
        add(encoding.ids[:length])
        add(encoding.ids[length:], supervised=True)
        add([self.answer_end_id], supervised=True)

    def fingerprint(self) -> str:
        """Short hash of the prompt format: the rendered ids of a fixed dialogue, and the tokens of a crop."""
        dialogue = [
            self.typed_question("What is this? 这是什么？", 1),
            self.answer("A café. 一家咖啡馆。"),
            self.question(f"Why?{IMAGE_TAG}", 1),
        ]
        rendered = json.dumps([self.render(dialogue), self.plan.crop_tokens])
        return hashlib.sha256(rendered.encode()).hexdigest()[:16]


def _skips_thinking(tokenizer: PreTrainedTokenizerBase) -> bool:
    if tokenizer.chat_template is None:
        return True
    question = [{"role": "user", "content": "?"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return prompt.endswith(THINK_BLOCK)
