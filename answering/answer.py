"""Answering engine: photos and messages → a stream of text, or many answers together.

Page, command line, evaluation and benchmarks all use `Answerer`. The prefix that a prompt shares with an earlier one
(photo tokens, earlier dialogue) is not computed again (`prefix_cache.py`). Questions that are asked together share the
passes of the model instead (`batches.py`).
"""

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import torch

from answering.batches import PromptBatch, answer_batch, batch_tokens
from answering.beams import BeamSearch, has_beams
from answering.choice import suppress
from answering.heatmap import Heatmap, Method, look
from answering.open_answer import OpenAnswer
from answering.prefix_cache import CachedSequence, PrefixCache
from answering.request import (
    CancelledError,
    OpenPrompt,
    PhotoSource,
    Picture,
    Reply,
    ReplyStream,
    Request,
    add_region,
    encode_picture,
    make_prompt,
    on_disk,
    read_picture,
)
from answering.token_graph import TokenGraph
from config import Generate
from errors import UserError, is_out_of_memory, shortened
from model.model import MMultiModal
from qwen.chat import Message

RECENT_PHOTOS = 4  # photos that are kept for the next question


class Answerer:
    """Answers questions with one model.

    Several threads may share one. They take turns, one pass of the model at a time, so no answer waits for the end of
    another, and a stream that nobody finishes blocks nobody.

    Every call takes decoding settings (config section `generate`); None: those of the model's config.

    Args:
        model: in eval mode; `gui.cache_mb` of its config bounds the keys and values that are kept.
    """

    def __init__(self, model: MMultiModal) -> None:
        self.model = model
        self.chat = model.processor.chat
        self._prefixes = PrefixCache(model.config.gui.cache_mb * 2**20)
        self._graph = TokenGraph(model) if TokenGraph.suits(model) else None
        self._feature_of: dict[str, torch.Tensor] = {}
        self._fitting = sys.maxsize  # most tokens of a batch, after memory ran out
        self._lock = threading.RLock()

    def answer(self, image: PhotoSource | None, question: str, settings: Generate | None = None) -> str:
        """Return the whole answer to one question; see `stream`."""
        return self.stream(image, [{"role": "user", "content": question}], settings).rest().text

    def stream(
        self, image: PhotoSource | None, messages: list[dict[str, Any]], settings: Generate | None = None
    ) -> ReplyStream:
        """Answer the last of `messages` piece by piece.

        Args:
            image: photo of the first message, before its `images`; None: none.
            messages: `{"role": "user" | "assistant", "content": text}`, alternating, the last one from the user.
                Control tokens in the texts have no effect. A user's message may have `"images"`, a list of photos
                before its text, and a `"box"` (`visual/region.py`): the question is then about this part of the last
                photo, of this message or an earlier one. A first message of the role `system` replaces
                `prompt.system` in this dialogue.

        Returns:
            Pieces of text; together they are the answer. Closing the stream stops the work within one token.

        Raises:
            UserError: an empty question, a box without a photo, roles in another order, or, with the first piece, a
                broken photo, a wrong box or a dialogue longer than the language model's context.
        """
        return self.stream_messages(*self.request(image, messages), settings)

    def request(self, image: PhotoSource | None, messages: list[dict[str, Any]]) -> Request:
        """Render messages; arguments and errors as `stream`."""
        chat, turns = self.chat, messages
        rendered: list[Message] = []
        photos: list[PhotoSource] = []
        if turns and turns[0]["role"] == "system":
            rendered.append(Message("system", (turns[0]["content"],)))
            turns = turns[1:]
        if not turns or turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
            raise UserError("the question is empty: type one")
        for index, message in enumerate(turns):
            role = ("user", "assistant")[index % 2]
            if message["role"] != role:
                raise UserError(
                    f"message {len(rendered) + 1} is of the role {shortened(repr(message['role']), 40)}: after the "
                    f"system message, if there is one, user and assistant take turns, so it must be '{role}'"
                )
            if role == "assistant":
                rendered.append(chat.answer(message["content"]))
            else:
                before = len(photos)
                photos += ([image] if index == 0 and image is not None else []) + list(message.get("images", ()))
                if message.get("box") is not None:
                    add_region(photos, message["box"])
                rendered.append(chat.typed_question(message["content"], len(photos) - before))
        return Request(photos, rendered)

    def stream_messages(
        self, photos: Sequence[PhotoSource], messages: list[Message], settings: Generate | None = None
    ) -> ReplyStream:
        """As `stream`, for a rendered dialogue; see `Request`."""
        return ReplyStream(self._pieces(Request(photos, messages), settings or self.model.config.generate))

    def look(
        self,
        image: PhotoSource | None,
        messages: list[dict[str, Any]],
        answer: str,
        span: tuple[int, int] | None = None,
        method: Method = "gradient",
        layers: Sequence[int] | None = None,
    ) -> list[Heatmap]:
        """Return where the model looked for an answer to the last of `messages`: a map of each photo, in reading order.

        A box counts as a photo. `image` and `messages` as in `stream`, the others and errors as in `heatmap.look`.
        """
        request = self.request(image, messages)
        with self._one_pass(), torch.enable_grad():
            return look(self.model, request, answer, span, method, layers, self._features)

    def answer_many(
        self, requests: Iterable[Request], settings: Generate | None = None, most_tokens: int | None = None
    ) -> Iterator[Reply | UserError]:
        """Answer many requests together; the answers are those of `stream_messages`, in the order of the requests.

        It takes requests until a batch is full, answers them, and goes on. If memory runs out, it answers the halves of
        the batch one after the other, and goes on with batches of half as many tokens. In a batch, all that stands
        before the end of the last photo is computed once for all requests in which it is equal, so requests on the same
        photos should follow one another. A sequence longer than `longest_packed` of the language model is answered
        alone.

        Args:
            most_tokens: of a batch, answers of `max_new_tokens` included; their keys and values are in memory at once.
                None: `batches.batch_tokens`.

        Yields:
            Per request the answer, or the error that the user can mend: a broken photo, or a dialogue longer than the
            language model's context.
        """
        settings = settings or self.model.config.generate
        most_tokens = most_tokens or batch_tokens(self.model)
        beams = settings.num_beams if has_beams(settings) else 1
        recent = functools.lru_cache(RECENT_PHOTOS)(functools.partial(read_picture, self.model))
        longest = self.model.language_model.longest_packed
        batch, waiting = PromptBatch(min(most_tokens, self._fitting), beams), []
        for request in requests:
            try:
                # a PIL image has no hash, and is decoded already
                pictures = [
                    recent(photo) if on_disk(photo) else read_picture(self.model, photo) for photo in request.photos
                ]
                prompt = self._prompt(pictures, request, settings)
            except UserError as error:
                waiting.append(error)
                continue
            alone = len(prompt.ids) + prompt.limit > longest
            if alone or not batch.add(self.model, prompt, pictures):
                yield from self._answered(batch, waiting, settings)
                batch, waiting = PromptBatch(min(most_tokens, self._fitting), beams), []
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
        answers = iter(self._replies(batch, settings))
        for entry in waiting:
            if isinstance(entry, UserError):
                yield entry
            else:
                yield next(answers)

    def _together(self, batch: PromptBatch, settings: Generate) -> list[Reply]:
        if not has_beams(settings):
            return answer_batch(self.model, batch, settings, self._one_pass)
        search = BeamSearch(self.model, batch, settings)
        while search.waiting:
            with self._one_pass():
                search.step()
        return search.replies()

    def _replies(self, batch: PromptBatch, settings: Generate) -> list[Reply]:
        """Answer the batch, in halves if memory runs out."""
        try:
            return self._together(batch, settings)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(batch.prompts) < 2:
                raise
        # not above: there, the error's traceback still holds the memory that the batch took
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._fitting = min(self._fitting, batch.slots // 2)
        return [reply for half in batch.halves(self.model) for reply in self._replies(half, settings)]

    def _pieces(self, request: Request, settings: Generate) -> Generator[str, None, Reply]:
        """Yield the text of an answer, an item for each token; return the whole of it."""
        began = time.perf_counter()
        pictures = [read_picture(self.model, photo) for photo in request.photos]
        prompt = self._prompt(pictures, request, settings)
        if has_beams(settings):
            return (yield from self._searched(prompt, pictures, settings))
        answer, sequence = OpenAnswer(self.model, prompt, settings), None
        try:
            while answer.reason is None:
                with self._one_pass():
                    if sequence is None:
                        sequence, logits = self._read_prompt(pictures, answer)
                    else:
                        logits = self._read_token(sequence, answer.tokens[-1])
                    token = answer.choice.token(logits)
                yield answer.add(token, time.perf_counter() - began)
                began = time.perf_counter()
        except CancelledError:
            pass
        finally:  # also when a stream that nobody closed is freed, in any thread: so without the lock
            if sequence is not None:
                sequence.unfinished = False
        if sequence is not None:
            with self._lock:
                if self._graph is not None:
                    self._graph.end(sequence)
                self._prefixes.keep(sequence)
        return answer.reply()

    def _searched(self, prompt: OpenPrompt, pictures: list[Picture], settings: Generate) -> Generator[str, None, Reply]:
        """As `_pieces`, by beam search: the text comes at the end, but closing the stream stops it at once."""
        batch = PromptBatch(most_tokens=0, beams=settings.num_beams)
        batch.add(self.model, prompt, pictures)
        search = BeamSearch(self.model, batch, settings)
        try:
            while search.waiting:
                with self._one_pass():
                    search.step()
                yield ""
        except CancelledError:
            return OpenAnswer(self.model, prompt, settings).reply()
        [reply] = search.replies()
        with contextlib.suppress(CancelledError):  # closed after its text: it is the answer all the same
            yield reply.text
        return reply

    def _prompt(self, pictures: list[Picture], request: Request, settings: Generate) -> OpenPrompt:
        """Render a dialogue; errors as `make_prompt`, or a dialogue that is too long for beams."""
        prompt = make_prompt(self.model, pictures, request.messages, settings.max_new_tokens)
        tokens, longest = len(prompt.ids) + prompt.limit, self.model.language_model.longest_packed
        if has_beams(settings) and tokens > longest:
            raise UserError(
                f"dialogue and answer may have {tokens} tokens, and {longest} are the most for answers with beams: set "
                "generate.num_beams to 1, or a smaller generate.max_new_tokens, or ask a shorter question"
            )
        return prompt

    @contextlib.contextmanager
    def _one_pass(self) -> Iterator[None]:
        """Exclude other threads; after an error, free all that is kept, because memory may have run out."""
        with self._lock, torch.no_grad():
            try:
                yield
            except BaseException:
                self._prefixes.clear()
                self._feature_of.clear()
                if self._graph is not None:
                    # too little memory to put back the answer of another thread: it stays where it is
                    with contextlib.suppress(RuntimeError, MemoryError):
                        self._graph.clear()
                raise

    def _read_prompt(self, pictures: list[Picture], answer: OpenAnswer) -> tuple[CachedSequence, torch.Tensor]:
        """Read what is new in the prompt; return its sequence and the logits (V,) of the first token."""
        prompt = answer.prompt
        sequence = self._prefixes.begin(prompt, self.model.language_model.prefix_key(len(prompt.ids)))
        shared = answer.tokens_reused = len(sequence.ids)
        unread = [picture for picture, (start, _) in zip(pictures, prompt.spans, strict=True) if start >= shared]
        images = self.model.project(torch.cat([self._features(picture) for picture in unread])) if unread else None
        logits = self._read(sequence, prompt.ids[shared:], images)
        self._prefixes.keep(sequence)  # at once, for other questions about the photo that come meanwhile
        return sequence, logits

    def _features(self, picture: Picture) -> torch.Tensor:
        """Return encoder features (crops, R, Dv) of a photo; those of the last few photos are cached."""
        if picture.hash not in self._feature_of:
            while len(self._feature_of) >= RECENT_PHOTOS:
                self._feature_of.pop(next(iter(self._feature_of)))
            self._feature_of[picture.hash] = encode_picture(self.model, picture)
        return self._feature_of[picture.hash]

    def _read_token(self, sequence: CachedSequence, token: int) -> torch.Tensor:
        """Read the newest token of an answer; as `_read`."""
        logits = None if self._graph is None else self._graph.read(sequence, token)
        if logits is None:
            return self._read(sequence, [token])
        suppress(self.model, logits)
        return logits

    def _read(self, sequence: CachedSequence, ids: list[int], images: torch.Tensor | None = None) -> torch.Tensor:
        """Read `ids`, which hold the photos `images` (crops, M, Dl), behind `sequence`; return the last logits (V,)."""
        language_model, new = self.model.language_model, torch.tensor([ids], device=self.model.device)
        embeddings = language_model.get_input_embeddings()(new) if images is None else language_model.embed(new, images)
        logits = self.model.decode(embeddings, sequence.states)
        sequence.ids += ids
        suppress(self.model, logits)
        return logits
