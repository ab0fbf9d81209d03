"""OpenAI's chat protocol, as far as it is served: requests, answers, refusals. Used by the whole room.

What a request asks for and is not done is refused; nothing is ignored silently. Fields that are not done may have the
value that asks for nothing (`frequency_penalty: 0`). `top_k`, `min_p` and `repetition_penalty` are extensions, named as
in other servers.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from errors import check_text, shortened

MOST_STOPS = 4  # as in OpenAI's API
MOST_ENTRIES = 1000  # messages of a request and parts of a message; a dialogue of more fits no context


class RefusalError(Exception):
    """A request that is not answered; becomes OpenAI's error shape.

    Args:
        param: the field at fault, dotted.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        error = {
            # half a surrogate pair may come from the request and could not be sent
            "message": str(self).encode("utf-8", "replace").decode(),
            "type": kind if self.status < 500 else "server_error",
            "param": self.param and self.param.encode("utf-8", "replace").decode(),
            "code": self.code,
        }
        return {"error": error}


class Sent(BaseModel):
    """Base of what a client sends: unknown fields are errors, and a text is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _is_unicode(text: str) -> str:
    check_text(text, "the text")
    return text


Text = Annotated[str, AfterValidator(_is_unicode)]  # pydantic lets half a surrogate pair pass
Few = Field(min_length=1, max_length=MOST_ENTRIES)


class TextPart(Sent):
    type: Literal["text"]
    text: Text


class PhotoAddress(Sent):
    url: Text
    detail: Literal["auto"] | None = None


class PhotoPart(Sent):
    type: Literal["image_url"]
    image_url: PhotoAddress


class SystemTurn(Sent):
    role: Literal["system", "developer"]
    content: Text | Annotated[list[TextPart], Few]


class UserTurn(Sent):
    role: Literal["user"]
    content: Text | Annotated[list[Annotated[TextPart | PhotoPart, Field(discriminator="type")]], Few]


class AssistantTurn(Sent):
    """An earlier answer; clients send it back with the empty fields of their own type."""

    role: Literal["assistant"]
    content: Text | Annotated[list[TextPart], Few]
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


Turn = SystemTurn | UserTurn | AssistantTurn


StopText = Annotated[Text, Field(min_length=1)]


class StreamOptions(Sent):
    include_usage: bool = False


class PlainText(Sent):
    type: Literal["text"]


class ChatRequest(Sent):
    """Body of `POST /v1/chat/completions`. Missing decoding settings are those of the checkpoint's config."""

    model: Text
    messages: list[Annotated[Turn, Field(discriminator="role")]] = Field(min_length=1, max_length=MOST_ENTRIES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**20)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    max_tokens: int | None = Field(None, ge=1, le=2**20)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**20)
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = None  # for the client's own books, as in OpenAI's API
    # what is not done, with the values that ask for nothing
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    response_format: PlainText | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    """`prompt_tokens` has those of the photos; `cached_tokens` of them were computed for an earlier request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class AnswerText(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    index: Literal[0] = 0
    message: AnswerText
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ServedModel(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["local"] = "local"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ServedModel]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    model: str


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


def invalid_request(errors: Sequence[Any], body: Any) -> RefusalError:
    """Return the refusal of a body in which pydantic found `errors`; it names the deepest of them."""
    error = max(errors, key=lambda error: len(error["loc"]))  # of `str | list`, the branch that was meant
    place, *path = error["loc"]
    if error["type"] == "json_invalid":
        return RefusalError(400, f"the body is not valid JSON ({error['ctx']['error']} at character {path[0]})")
    if place != "body" or not isinstance(body, dict):
        return RefusalError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    if not path:  # a name with half a surrogate pair
        return RefusalError(400, f"the body is not valid: {error['msg']}")
    param, inner = _field(path, body, error["type"])
    message = {
        "extra_forbidden": "this server has no such field: leave it out",
        "missing": "the field is missing",
        "literal_error": f"this server takes {error.get('ctx', {}).get('expected')} only, or none at all",
        "none_required": "this server takes null only: leave the field out",
        "too_long": f"at most {error.get('ctx', {}).get('max_length')} entries are taken",
    }.get(error["type"], error["msg"].removeprefix("Value error, "))
    shown = error["type"] not in ("missing", "extra_forbidden", "value_error") and not isinstance(inner, dict | list)
    found = f", found {shortened(repr(inner), 60)}" if shown else ""
    return RefusalError(400, f"'{param}': {message}{found}", param)


def _field(path: list[Any], body: Any, kind: str) -> tuple[str, Any]:
    """Return the dotted name of a field and its value; `path` also has the names of pydantic's branches."""
    names, node = [], body
    for part in path:
        inside = part in node if isinstance(node, dict) else isinstance(node, list) and part in range(len(node))
        if inside:
            node = node[part]
        elif part is not path[-1] or kind != "missing":
            continue
        names.append(shortened(part, 60))
    return ".".join(names), node
