"""The HTTP application: `/v1/chat/completions`, `/v1/models`, `/health`, `/metrics`. Built by `serve.py`.

One answer at a time: the others wait in the order in which they came (`gate.Queue`). The engine runs in a thread, one
token a call, so a request that is cancelled ends with the token that is being computed.
"""

import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

from anyio import CancelScope
from anyio.to_thread import run_sync
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException

from answering.request import AnyAnswerer, Reply, ReplyStream
from config import Generate, changed
from errors import UserError, is_out_of_memory
from serving.dialogue import Dialogue, read_dialogue, with_photos
from serving.gate import Gate, Limits, Queue, refused
from serving.measures import Measures
from serving.protocol import (
    AnswerText,
    CachedTokens,
    ChatRequest,
    Choice,
    Completion,
    ErrorBody,
    Health,
    ModelList,
    RefusalError,
    ServedModel,
    Usage,
    invalid_request,
)

logger = logging.getLogger("uvicorn.error")  # the one that uvicorn shows

ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
NOT_KEPT = {"Cache-Control": "no-cache"}
OUT_OF_MEMORY = "out of memory: send fewer photos or a shorter dialogue, or ask the operator for a larger device"
DEFECT = "a defect of this server; its operator finds the cause in its log"


class Service:
    """What all requests share.

    Args:
        name: of the model, as clients name it.
        generate: decoding settings where a request has none.
        created: time of the checkpoint.
        files: folder of which clients may name files; None: of none.
    """

    def __init__(
        self,
        engine: AnyAnswerer,
        name: str,
        generate: Generate,
        limits: Limits,
        created: int = 0,
        files: Path | None = None,
    ) -> None:
        self.engine, self.name, self.generate, self.limits = engine, name, generate, limits
        self.created, self.files = created, files
        self.queue = Queue(limits)
        self.measures = Measures(self.queue)

    def read(self, request: ChatRequest) -> tuple[Dialogue, Generate]:
        """Check a request; raise RefusalError if it cannot be answered."""
        if request.model != self.name:
            message = f"the model '{request.model[:100]}' is not served here: '{self.name}' is"
            raise RefusalError(404, message, "model", "model_not_found")
        return read_dialogue(request, self.files), self._settings(request)

    def _settings(self, request: ChatRequest) -> Generate:
        longest = [length for length in (request.max_tokens, request.max_completion_tokens) if length is not None]
        if len(set(longest)) > 1:
            message = "'max_tokens' and 'max_completion_tokens' differ: they mean the same, send one"
            raise RefusalError(400, message, "max_tokens")
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        values = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
        if longest:
            values["max_new_tokens"] = longest[0]
        if request.stop is not None:
            values["stop"] = [request.stop] if isinstance(request.stop, str) else request.stop
        # without a seed, every answer is another one, as in OpenAI's API; at temperature 0 it changes nothing
        values.setdefault("seed", secrets.randbelow(2**63))
        try:
            return changed(self.generate, values, "the request")
        except UserError as error:
            raise RefusalError(400, str(error)) from error

    async def begin(self, dialogue: Dialogue, settings: Generate, stack: AsyncExitStack) -> tuple[ReplyStream, str]:
        """Wait for the turn, and start the answer; return its pieces and the first of them.

        Args:
            stack: closed when the answer was sent or is not wanted any more.
        """
        await stack.enter_async_context(self.queue.turn)
        messages = await run_sync(with_photos, dialogue, self.limits.pixels)
        stream = self.engine.stream(None, messages, settings)
        stack.push_async_callback(_close, stream)
        return stream, await next_piece(stream) or ""

    def finished(self, stream: ReplyStream) -> Reply:
        """Return and count the whole answer, after its last piece."""
        reply = stream.rest()
        self.measures.count(reply)
        return reply


async def next_piece(stream: ReplyStream) -> str | None:
    """Return the next piece, None at the end. If the request is cancelled, the thread goes on until `_close`."""
    return await run_sync(next, stream, None, abandon_on_cancel=True)


async def _close(stream: ReplyStream) -> None:
    with CancelScope(shield=True):
        await run_sync(stream.close)


async def exits() -> AsyncIterator[AsyncExitStack]:
    """What FastAPI closes after a response was sent, or when its request is cancelled."""
    async with AsyncExitStack() as stack:
        yield stack


@contextmanager
def in_words() -> Iterator[None]:
    """Turn every error into a refusal, so that no client reads a traceback; the operator finds it in the log."""
    try:
        yield
    except RefusalError:
        raise
    except UserError as error:
        raise RefusalError(400, str(error)) from error
    except Exception as error:
        logger.exception("a request failed")
        if is_out_of_memory(error):
            raise RefusalError(503, OUT_OF_MEMORY, code="out_of_memory") from error
        raise RefusalError(500, DEFECT) from error


def build_app(service: Service) -> FastAPI:
    """Return the application; its OpenAPI description is at `/openapi.json`, without pages, as those load scripts."""
    app = FastAPI(title="Visual question answering", docs_url=None, redoc_url=None)
    app.add_middleware(Gate, limits=service.limits, queue=service.queue, ended=service.measures.ended)

    @app.post("/v1/chat/completions", response_model=Completion, responses=STREAMED | ERRORS)
    async def chat_completions(
        request: ChatRequest, stack: Annotated[AsyncExitStack, Depends(exits, scope="request")]
    ) -> Any:
        with in_words():
            dialogue, settings = await run_sync(service.read, request)
            stream, first = await service.begin(dialogue, settings, stack)
            head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.name}
            if request.stream:
                usage = request.stream_options is not None and request.stream_options.include_usage
                return StreamingResponse(
                    _events(service, stream, first, head, usage), media_type="text/event-stream", headers=NOT_KEPT
                )
            while await next_piece(stream) is not None:
                pass
        reply = service.finished(stream)
        assert reply.finish_reason != "cancelled", "a request that is cancelled gets no answer"
        choice = Choice(message=AnswerText(content=reply.text), finish_reason=reply.finish_reason)
        return Completion(**head, choices=[choice], usage=usage_of(reply))

    @app.get("/v1/models", responses=ERRORS)
    async def models() -> ModelList:
        return ModelList(data=[ServedModel(id=service.name, created=service.created)])

    @app.get("/health", responses=ERRORS)
    async def health() -> Health:
        return Health(model=service.name)

    @app.get("/metrics", response_class=PlainTextResponse, responses=ERRORS)
    async def metrics() -> Response:
        return Response(service.measures.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @app.exception_handler(RefusalError)
    async def refuse(request: Request, error: RefusalError) -> Response:
        return refused(error)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request: Request, error: RequestValidationError) -> Response:
        return refused(invalid_request(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: HTTPException) -> Response:
        response = refused(RefusalError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        return refused(RefusalError(500, DEFECT))  # uvicorn writes the traceback to its log

    return app


async def _events(
    service: Service, stream: ReplyStream, first: str, head: dict[str, Any], with_usage: bool
) -> AsyncIterator[str]:
    """Yield the server-sent events of an answer: role, pieces, reason, usage, end; after an error, the error last."""
    head = head | {"object": "chat.completion.chunk"} | ({"usage": None} if with_usage else {})

    def event(delta: dict[str, str], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _event(head | {"choices": [choice]})

    yield event({"role": "assistant", "content": ""})
    piece: str | None = first
    try:
        with in_words():
            while piece is not None:
                if piece:
                    yield event({"content": piece})
                piece = await next_piece(stream)
    except RefusalError as error:
        yield _event(error.body())
        return
    reply = service.finished(stream)
    yield event({}, reply.finish_reason)
    if with_usage:
        yield _event(head | {"choices": [], "usage": usage_of(reply).model_dump()})
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"  # in ASCII, as some clients end lines at other characters too


def usage_of(reply: Reply) -> Usage:
    return Usage(
        prompt_tokens=reply.tokens_in,
        completion_tokens=reply.tokens_out,
        total_tokens=reply.tokens_in + reply.tokens_out,
        prompt_tokens_details=CachedTokens(cached_tokens=reply.tokens_reused),
    )
