"""Answering engine: photos and messages → a stream of text.

Page, command line, evaluation and benchmarks all use `Answerer`. It caches the keys and values of the last prompt, so
the prefix that a new prompt shares with it (photo tokens, earlier dialogue) is not computed again.
"""

import hashlib
import itertools
import threading
from collections.abc import Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache, LogitsProcessorList
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from compat import crop_cache
from config import Generate
from errors import UserError
from model.model import MMultiModal
from qwen.chat import Message
from visual.photo import load_image
from visual_plan import VisualPlan

PhotoSource = Image.Image | str | Path


class Answerer:
    """Answers questions with one model, one at a time.

    Several threads may share one. `answer` blocks the others until it ends; `stream` blocks them for one token at a
    time, because its caller may never finish it. If another question runs between two tokens, the answer is the same,
    but its prompt is computed again.

    Args:
        model: in eval mode.
        generate: decoding settings; default those of the model's config. Assign `settings` to change them.
    """

    def __init__(self, model: MMultiModal, generate: Generate | None = None) -> None:
        self.model = model
        self.settings = model.config.generate if generate is None else generate
        self._cached_ids: list[int] = []
        self._cached_photos: list[str] = []
        self._cached_key: Hashable = None
        self._cache = DynamicCache()
        self._cache_of: object = None  # the answer whose prompt and tokens are in the cache
        self._feature_of: dict[str, torch.Tensor] = {}
        self._suppressed = torch.tensor(model.suppressed_ids)
        self._lock = threading.RLock()

    def answer(self, image: PhotoSource | None, question: str) -> str:
        """Return the whole answer to one question; see `stream`."""
        with self._lock:
            return "".join(self.stream(image, [{"role": "user", "content": question}]))

    def stream(self, image: PhotoSource | None, messages: list[dict[str, Any]]) -> Generator[str, None, None]:
        """Answer the last of `messages` piece by piece.

        Args:
            image: photo of the first message, before its `images`; None: none.
            messages: `{"role": "user" | "assistant", "content": text}`, alternating, the last one from the user.
                Control tokens in the texts have no effect. A user's message may have `"images"`, a list of photos
                before its text.

        Yields:
            Pieces of text; together they are the answer. Closing the iterator stops the work.

        Raises:
            UserError: an empty question, a broken photo, or a dialogue longer than the language model's context.
        """
        if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
            raise UserError("the question is empty: type one")
        chat = self.model.processor.chat
        rendered, photos = [], []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                rendered.append(chat.answer(message["content"]))
            else:
                own = ([image] if index == 0 and image is not None else []) + list(message.get("images", ()))
                rendered.append(chat.typed_question(message["content"], len(own)))
                photos += own
        yield from self.stream_messages(photos, rendered)

    def stream_messages(self, photos: Sequence[PhotoSource], messages: list[Message]) -> Generator[str, None, None]:
        """As `stream`, for messages with the positions of `photos`, in reading order (dataset entries).

        The plans in the messages only mark positions; the plan used for a photo depends on its size.
        """
        tokenizer = self.model.processor.tokenizer
        pending: list[int] = []  # tokens that end within a character are kept until it is complete
        for token in self._generate(photos, messages):
            pending.append(token)
            text = tokenizer.decode(pending, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if text and not text.endswith("\ufffd"):
                yield text
                pending = []
        if pending:
            yield tokenizer.decode(pending, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @contextmanager
    def _whole_step(self) -> Iterator[None]:
        """Exclude other threads, and clear the cache if the step fails, because it may be half written."""
        with self._lock:
            done = False
            try:
                yield
                done = True
            finally:
                if not done:
                    self._cached_ids, self._cached_photos, self._cache = [], [], DynamicCache()
                    self._cache_of = None

    @torch.no_grad()
    def _prefill(self, pictures: list[Image.Image], plans: list[VisualPlan], ids: list[int]) -> torch.Tensor:
        """Extend the cache to the end of `ids`; return the last logits (V,)."""
        hashes = [hashlib.sha256(repr(p.size).encode() + p.tobytes()).hexdigest() for p in pictures]
        spans = self.model.processor.chat.photo_spans(ids, plans)
        key = self.model.language_model.prefix_key(len(ids))
        shared = self._shared_length(ids, hashes, spans) if key == self._cached_key else 0
        self._cached_key = key
        crop_cache(self._cache, shared)
        self._cached_ids, self._cached_photos = self._cached_ids[:shared], hashes

        unread = [number for number, (start, _) in enumerate(spans) if start >= shared]
        images = None
        if unread:
            features = [self._features(pictures[number], plans[number], hashes[number]) for number in unread]
            images = self.model.project(torch.cat(features))  # (crops to read, M, Dl)
        new_ids = torch.tensor([ids[shared:]], device=self.model.device)
        return self._step(self.model.language_model.embed(new_ids, images), ids[shared:])

    def _features(self, picture: Image.Image, plan: VisualPlan, photo_hash: str) -> torch.Tensor:
        """Return encoder features (crops, R, Dv) of a photo; those of the last four photos are cached."""
        if photo_hash not in self._feature_of:
            while len(self._feature_of) >= 4:
                self._feature_of.pop(next(iter(self._feature_of)))
            pixels = self.model.processor.pixels(picture, plan).to(self.model.device)  # (crops, 3, H, W)
            self._feature_of[photo_hash] = self.model.encode_image(pixels)
        return self._feature_of[photo_hash]

    def _shared_length(self, ids: list[int], hashes: list[str], spans: list[tuple[int, int]]) -> int:
        """Number of leading tokens that are already in the cache; never all of `ids`.

        The shared part never ends within a photo, because equal photos have equal placeholders in both prompts.
        """
        shared = _common_length(self._cached_ids, ids[:-1])
        same_photos = _common_length(self._cached_photos, hashes)
        return min(shared, spans[same_photos][0]) if same_photos < len(spans) else shared

    @torch.no_grad()
    def _step(self, embeddings: torch.Tensor, new_ids: list[int]) -> torch.Tensor:
        """Process `embeddings` (1, T_new, Dl) after the cached tokens; return the last logits (V,) in float32."""
        logits = self.model.decode(embeddings, self._cache)
        self._cached_ids = self._cached_ids + list(new_ids)
        return logits

    def _generate(self, photos: Sequence[PhotoSource], messages: list[Message]) -> Iterator[int]:
        """Yield new token ids, without the end token."""
        settings, chat = self.settings, self.model.processor.chat
        pictures = [load_image(photo) for photo in photos]
        plans = [self.model.processor.plan(*picture.size) for picture in pictures]
        prompt, _ = chat.render(_with_plans(messages, plans))
        room = self.model.LLM.config.max_position_embeddings - len(prompt)
        if room < 1:
            raise UserError(
                f"the dialogue has {len(prompt)} tokens ({sum(plan.tokens for plan in plans)} of its photos), the "
                f"language model reads {self.model.LLM.config.max_position_embeddings}: start a new dialogue, or "
                "send fewer photos or a shorter question"
            )
        processors = _logits_processors(settings)
        generator = torch.Generator(self.model.device).manual_seed(settings.seed)
        answer: list[int] = []
        this = object()
        for _ in range(min(settings.max_new_tokens, room)):
            with self._whole_step():
                if self._cache_of is this:
                    logits = self._step(self._embedded(answer[-1:]), answer[-1:])  # (V,)
                else:
                    logits = self._prefill(pictures, plans, prompt)
                    if answer:  # another question ran in between
                        logits = self._step(self._embedded(answer), answer)
                    self._cache_of = this
                self._suppressed = self._suppressed.to(logits.device)  # moves at the first token only
                logits[self._suppressed] = -torch.inf
                # only the repetition penalty uses the history
                history = [*prompt, *answer] if settings.repetition_penalty != 1.0 else []
                scores = processors(torch.tensor([history], device=logits.device), logits.unsqueeze(0))  # (1, V)
                if settings.temperature > 0:
                    token = int(torch.multinomial(scores.softmax(-1), 1, generator=generator))
                else:
                    token = int(scores.argmax())
            if token in chat.stop_ids:
                return
            answer.append(token)
            yield token

    def _embedded(self, ids: list[int]) -> torch.Tensor:
        """Text tokens as embeddings (1, T, Dl)."""
        return self.model.LLM.get_input_embeddings()(torch.tensor([ids], device=self.model.device))


def _with_plans(messages: list[Message], plans: list[VisualPlan]) -> list[Message]:
    """Return the messages with `plans` at the positions of the photos, in reading order.

    Raises:
        ValueError: more or fewer positions than plans.
    """
    places = sum(isinstance(part, VisualPlan) for message in messages for part in message.parts)
    if places != len(plans):
        raise ValueError(f"the messages have places for {places} photos, {len(plans)} are given")
    rest = iter(plans)
    return [
        Message(message.role, tuple(part if isinstance(part, str) else next(rest) for part in message.parts))
        for message in messages
    ]


def _common_length(first: Sequence, second: Sequence) -> int:
    """Number of leading items that are equal."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _logits_processors(settings: Generate) -> LogitsProcessorList:
    """The repetition penalty (over prompt and answer) and, when sampling, temperature and nucleus, in that order."""
    processors = LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.temperature > 0:
        processors.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_p < 1:
            processors.append(TopPLogitsWarper(settings.top_p))
    return processors
