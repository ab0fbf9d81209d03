"""Answering engine: photos and messages → a stream of text, or many answers together.

Page, command line, evaluation and benchmarks all use `Answerer`. It caches the keys and values of the last prompt, so
the prefix that a new prompt shares with it (photo tokens, earlier dialogue) is not computed again. Questions that are
asked together share the passes of the model instead (`batches.py`).
"""

import functools
import threading
from collections.abc import Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from answering.batches import PromptBatch, answer_batch, batch_tokens
from answering.choice import TokenChoice
from answering.request import (
    FinishReason,
    OpenPrompt,
    PhotoSource,
    Picture,
    Reply,
    ReplyStream,
    Request,
    common_length,
    make_prompt,
    read_picture,
    text_pieces,
)
from compat import crop_cache
from config import Generate
from errors import UserError
from model.model import MMultiModal
from qwen.chat import Message

RECENT_PHOTOS = 4  # photos that are kept for the next question


class Answerer:
    """Answers questions with one model.

    Several threads may share one. `answer` blocks the others until it ends; `stream` and `answer_many` block them for
    one pass of the model at a time, because the caller of a stream may never finish it. If another question runs
    between two tokens of a stream, the answer is the same, but its prompt is computed again.

    Every call takes decoding settings (config section `generate`); None: those of the model's config.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: MMultiModal) -> None:
        self.model = model
        self._cached_ids: list[int] = []
        self._cached_photos: tuple[str, ...] = ()
        self._cached_key: Hashable = None
        self._cache = DynamicCache()
        self._cache_of: object = None  # the answer whose prompt and tokens are in the cache
        self._feature_of: dict[str, torch.Tensor] = {}
        self._suppressed = torch.tensor(model.suppressed_ids)
        self._lock = threading.RLock()

    def answer(self, image: PhotoSource | None, question: str, settings: Generate | None = None) -> str:
        """Return the whole answer to one question; see `stream`."""
        with self._lock:
            return self.stream(image, [{"role": "user", "content": question}], settings).rest().text

    def stream(
        self, image: PhotoSource | None, messages: list[dict[str, Any]], settings: Generate | None = None
    ) -> ReplyStream:
        """Answer the last of `messages` piece by piece.

        Args:
            image: photo of the first message, before its `images`; None: none.
            messages: `{"role": "user" | "assistant", "content": text}`, alternating, the last one from the user.
                Control tokens in the texts have no effect. A user's message may have `"images"`, a list of photos
                before its text.

        Returns:
            Pieces of text; together they are the answer. Closing the iterator stops the work.

        Raises:
            UserError: an empty question, or, with the first piece, a broken photo or a dialogue longer than the
                language model's context.
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
        return self.stream_messages(photos, rendered, settings)

    def stream_messages(
        self, photos: Sequence[PhotoSource], messages: list[Message], settings: Generate | None = None
    ) -> ReplyStream:
        """As `stream`, for a rendered dialogue; see `Request`."""
        return ReplyStream(self._pieces(Request(photos, messages), settings or self.model.config.generate))

    def answer_many(
        self, requests: Iterable[Request], settings: Generate | None = None, most_tokens: int | None = None
    ) -> Iterator[Reply | UserError]:
        """Answer many requests together; the answers are those of `stream_messages`, in the order of the requests.

        It takes requests until a batch is full, answers them, and goes on. In a batch, all that stands before the end
        of the last photo is computed once for all requests in which it is equal, so requests on the same photos should
        follow one another. A sequence longer than `longest_packed` of the language model is answered alone.

        Args:
            most_tokens: of a batch, answers of `max_new_tokens` included; their keys and values are in memory at once.
                None: `batches.batch_tokens`.

        Yields:
            Per request the answer, or the error that the user can mend: a broken photo, or a dialogue longer than the
            language model's context.
        """
        settings = settings or self.model.config.generate
        most_tokens = most_tokens or batch_tokens(self.model)
        recent = functools.lru_cache(RECENT_PHOTOS)(functools.partial(read_picture, self.model))
        longest = self.model.language_model.longest_packed
        batch, waiting = PromptBatch(most_tokens), []
        for request in requests:
            try:
                # a PIL image has no hash, and is decoded already
                pictures = [
                    recent(photo) if isinstance(photo, str | Path) else read_picture(self.model, photo)
                    for photo in request.photos
                ]
                prompt = make_prompt(self.model, pictures, request.messages, settings.max_new_tokens)
            except UserError as error:
                waiting.append(error)
                continue
            alone = len(prompt.ids) + prompt.limit > longest
            if alone or not batch.add(self.model, prompt, pictures):
                yield from self._answered(batch, waiting, settings)
                batch, waiting = PromptBatch(most_tokens), []
                if alone:
                    yield self.stream_messages(*request, settings).rest()
                    continue
                batch.add(self.model, prompt, pictures)
            waiting.append(prompt)
        yield from self._answered(batch, waiting, settings)

    def _answered(
        self, batch: PromptBatch, waiting: list[OpenPrompt | UserError], settings: Generate
    ) -> Iterator[Reply | UserError]:
        """Answer the batch; yield the answers and errors that wait, in their order."""
        answers = iter(answer_batch(self.model, batch, settings, self._lock))
        for entry in waiting:
            if isinstance(entry, UserError):
                yield entry
            else:
                tokens, reason = next(answers)
                text = "".join(text_pieces(self.model.processor.tokenizer, tokens))
                yield Reply(text, reason, len(entry.ids), len(tokens))

    def _pieces(self, request: Request, settings: Generate) -> Generator[str, None, Reply]:
        """Yield the text of an answer piece by piece; return the whole of it."""
        pictures = [read_picture(self.model, photo) for photo in request.photos]
        prompt = make_prompt(self.model, pictures, request.messages, settings.max_new_tokens)
        answer: list[int] = []
        reason: FinishReason = "length"

        def tokens() -> Iterator[int]:
            nonlocal reason
            reason = yield from self._generate(pictures, prompt, answer, settings)

        pieces = []
        for piece in text_pieces(self.model.processor.tokenizer, tokens()):
            pieces.append(piece)
            yield piece
        return Reply("".join(pieces), reason, len(prompt.ids), len(answer))

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
                    self._cached_ids, self._cached_photos, self._cache = [], (), DynamicCache()
                    self._cache_of = None

    @torch.no_grad()
    def _prefill(self, pictures: list[Picture], prompt: OpenPrompt) -> torch.Tensor:
        """Extend the cache to the end of the prompt; return the last logits (V,)."""
        ids = prompt.ids
        key = self.model.language_model.prefix_key(len(ids))
        shared = self._shared_length(prompt) if key == self._cached_key else 0
        self._cached_key = key
        crop_cache(self._cache, shared)
        self._cached_ids, self._cached_photos = self._cached_ids[:shared], prompt.photos

        unread = [picture for picture, (start, _) in zip(pictures, prompt.spans, strict=True) if start >= shared]
        images = None
        if unread:
            features = [self._features(picture) for picture in unread]
            images = self.model.project(torch.cat(features))  # (crops to read, M, Dl)
        new_ids = torch.tensor([ids[shared:]], device=self.model.device)
        return self._step(self.model.language_model.embed(new_ids, images), ids[shared:])

    def _features(self, picture: Picture) -> torch.Tensor:
        """Return encoder features (crops, R, Dv) of a photo; those of the last few photos are cached."""
        if picture.hash not in self._feature_of:
            while len(self._feature_of) >= RECENT_PHOTOS:
                self._feature_of.pop(next(iter(self._feature_of)))
            pixels = self.model.processor.pixels(picture.image, picture.plan).to(self.model.device)  # (crops, 3, H, W)
            self._feature_of[picture.hash] = self.model.encode_image(pixels)
        return self._feature_of[picture.hash]

    def _shared_length(self, prompt: OpenPrompt) -> int:
        """Number of leading tokens that are already in the cache; never all of the prompt.

        The shared part never ends within a photo, because equal photos have equal placeholders in both prompts.
        """
        shared = common_length(self._cached_ids, prompt.ids[:-1])
        same_photos = common_length(self._cached_photos, prompt.photos)
        return min(shared, prompt.spans[same_photos][0]) if same_photos < len(prompt.spans) else shared

    @torch.no_grad()
    def _step(self, embeddings: torch.Tensor, new_ids: list[int]) -> torch.Tensor:
        """Process `embeddings` (1, T_new, Dl) after the cached tokens; return the last logits (V,) in float32."""
        logits = self.model.decode(embeddings, self._cache)
        self._cached_ids = self._cached_ids + list(new_ids)
        return logits

    def _generate(
        self, pictures: list[Picture], prompt: OpenPrompt, answer: list[int], settings: Generate
    ) -> Generator[int, None, FinishReason]:
        """Yield new token ids without the end token, append them to `answer`, and return why there are no more."""
        choice = TokenChoice(settings, self.model.device)
        this = object()
        while len(answer) < prompt.limit:
            with self._whole_step():
                if self._cache_of is this:
                    logits = self._step(self._embedded(answer[-1:]), answer[-1:])  # (V,)
                else:
                    logits = self._prefill(pictures, prompt)
                    if answer:  # another question ran in between
                        logits = self._step(self._embedded(answer), answer)
                    self._cache_of = this
                self._suppressed = self._suppressed.to(logits.device)  # moves at the first token only
                logits[self._suppressed] = -torch.inf
                token = choice.token(logits, [*prompt.ids, *answer] if choice.uses_history else [])
            if token in self.model.processor.chat.stop_ids:
                return "stop"
            answer.append(token)
            yield token
        return "length"

    def _embedded(self, ids: list[int]) -> torch.Tensor:
        """Text tokens as embeddings (1, T, Dl)."""
        return self.model.LLM.get_input_embeddings()(torch.tensor([ids], device=self.model.device))
