"""The answering engine: photo and messages in, a stream of text out.

Page, command line, evaluation and benchmarks all consume `Answerer`. It keeps the keys and values of the last prompt:
what a new prompt shares with it (the photo's tokens above all, and the dialogue so far) is not computed again.
"""

import hashlib
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from transformers import DynamicCache, LogitsProcessorList
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from config import Generate
from errors import UserError
from model.model import MMultiModal
from qwen.chat import Message
from visual.transform import load_image

Photo = Image.Image | str | Path


class Answerer:
    """Answers questions with one model, one at a time.

    Several threads may share one: while `answer` works, the others wait. `stream` makes them wait for one token at a
    time only, since its caller may leave it unfinished. Where another question came between two tokens, the answer is
    the same, but its prompt is read again.

    Args:
        model: in eval mode.
        generate: decoding settings; default those of the model's config. Assign `settings` to change them.
    """

    def __init__(self, model: MMultiModal, generate: Generate | None = None) -> None:
        self.model = model
        self.settings = model.config.generate if generate is None else generate
        self._cached_ids: list[int] = []
        self._cached_photos: list[str] = []
        self._cached_scaling = 1.0
        self._cache = DynamicCache()
        self._cache_of: object = None  # the answer whose prompt and tokens the cache holds
        self._feature_of: dict[str, torch.Tensor] = {}
        self._suppressed = torch.tensor(model.suppressed_ids)
        self._lock = threading.RLock()

    def answer(self, image: Photo | None, question: str) -> str:
        """The whole answer to one question; see `stream`."""
        with self._lock:
            return "".join(self.stream(image, [{"role": "user", "content": question}]))

    def stream(self, image: Photo | None, messages: list[dict[str, str]]) -> Generator[str, None, None]:
        """Answer the last of `messages` piece by piece.

        Args:
            image: belongs to the first message; None: a question without a photo.
            messages: `{"role": "user" | "assistant", "content": text}` in turn, the user's last. Whatever characters
                the texts hold, they are text.

        Yields:
            Pieces of text; together they are the answer. Closing the iterator stops the work.

        Raises:
            UserError: an empty question, a broken photo, or a dialogue longer than the language model's context.
        """
        if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
            raise UserError("the question is empty: type one")
        chat = self.model.chat
        rendered = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                rendered.append(chat.answer(message["content"]))
            else:
                rendered.append(chat.typed_question(message["content"], int(index == 0 and image is not None)))
        yield from self.stream_messages([] if image is None else [image], rendered)

    def stream_messages(self, photos: Sequence[Photo], messages: list[Message]) -> Generator[str, None, None]:
        """As `stream`, for messages that say where each of `photos` stands (dataset entries, several photos)."""
        tokenizer = self.model.tokenizer
        pending: list[int] = []  # tokens that end within a character wait for the rest of it
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
        """Keep other threads out meanwhile, and forget the cache if the step does not end: it may be half written."""
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
    def _prefill(self, pictures: list[Image.Image], ids: list[int]) -> torch.Tensor:
        """Bring the cache to the end of `ids`; returns the logits (V,) after the last of them."""
        names = [hashlib.sha256(repr(p.size).encode() + p.tobytes()).hexdigest() for p in pictures]
        language_model = self.model.LLM.get_base_model()
        scaling = language_model.position_scaling(len(ids))
        shared = self._shared_length(ids, names) if scaling == self._cached_scaling else 0
        self._cached_scaling = scaling
        if shared < len(self._cached_ids):
            self._cache.crop(shared - len(self._cached_ids))
        self._cached_ids, self._cached_photos = self._cached_ids[:shared], names

        N, image_id = self.model.num_image_tokens, self.model.chat.image_token_id
        photos_shared = ids[:shared].count(image_id) // N
        images = None
        if pictures[photos_shared:]:
            unread = zip(pictures[photos_shared:], names[photos_shared:], strict=True)
            features = torch.cat([self._features(picture, name) for picture, name in unread])
            images = self.model.project(features)  # (photos to read, N, Dl)
        new_ids = torch.tensor([ids[shared:]], device=self.model.device)
        embeddings = language_model.embed_with_images(new_ids, images)  # (1, T_new, Dl)
        return self._step(embeddings, ids[shared:])

    def _features(self, picture: Image.Image, name: str) -> torch.Tensor:
        """Encoder features (1, N, Dv) of a photo; those of the last few photos are kept."""
        if name not in self._feature_of:
            while len(self._feature_of) >= 4:
                self._feature_of.pop(next(iter(self._feature_of)))
            pixels = self.model.transform(picture).unsqueeze(0).to(self.model.device)  # (1, 3, H, W)
            self._feature_of[name] = self.model.encode_image(pixels)
        return self._feature_of[name]

    def _shared_length(self, ids: list[int], names: list[str]) -> int:
        """How many leading tokens the cache holds already; whole photos only, and never all of `ids`."""
        shared = 0
        for old, new in zip(self._cached_ids, ids[:-1], strict=False):
            if old != new:
                break
            shared += 1
        N, image_id = self.model.num_image_tokens, self.model.chat.image_token_id
        same_photos = 0
        for old, new in zip(self._cached_photos, names, strict=False):
            if old != new:
                break
            same_photos += 1
        photo_starts = [position for position, token in enumerate(ids) if token == image_id][::N]
        if same_photos < len(photo_starts):
            shared = min(shared, photo_starts[same_photos])
        for start in photo_starts:
            if start < shared < start + N:
                shared = start
        return shared

    @torch.no_grad()
    def _step(self, embeddings: torch.Tensor, new_ids: list[int]) -> torch.Tensor:
        """Read `embeddings` (1, T_new, Dl) after the cached tokens; returns the last logits (V,) in float32."""
        position = len(self._cached_ids)
        positions = torch.arange(position, position + embeddings.shape[1], device=embeddings.device).unsqueeze(0)
        output = self.model.LLM(
            inputs_embeds=embeddings,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cached_ids = self._cached_ids + list(new_ids)
        return output.logits[0, -1].float()

    def _generate(self, photos: Sequence[Photo], messages: list[Message]) -> Iterator[int]:
        """New token ids, without the one that ends the answer."""
        settings, chat = self.settings, self.model.chat
        prompt, _ = chat.render(messages)
        room = self.model.LLM.config.max_position_embeddings - len(prompt)
        if room < 1:
            raise UserError(
                f"the dialogue has {len(prompt)} tokens (a photo {self.model.num_image_tokens}), the language model "
                f"reads {self.model.LLM.config.max_position_embeddings}: start a new dialogue or ask a shorter question"
            )
        pictures = [load_image(photo) for photo in photos]
        processors = _logits_processors(settings)
        generator = torch.Generator(self.model.device).manual_seed(settings.seed)
        answer: list[int] = []
        this = object()
        for _ in range(min(settings.max_new_tokens, room)):
            with self._whole_step():
                if self._cache_of is this:
                    logits = self._step(self._embedded(answer[-1:]), answer[-1:])  # (V,)
                else:
                    logits = self._prefill(pictures, prompt)
                    if answer:  # another question came in between
                        logits = self._step(self._embedded(answer), answer)
                    self._cache_of = this
                self._suppressed = self._suppressed.to(logits.device)  # there from the second token on
                logits[self._suppressed] = -torch.inf
                # only the repetition penalty looks at what was said
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
