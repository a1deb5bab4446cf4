"""The wire types, and nothing else.

What comes in is pydantic: it says precisely what is wrong with a request. What goes out is
msgspec: a stream encodes one chunk for each token. `null` means "not given" in every optional
field, as it does for OpenAI.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_STOPS = 4
MAX_CHOICES = 128
MAX_PROMPTS = 128
INT64 = 2**63

# --- Requests -----------------------------------------------------------------------------------


def _not_yet(value: Any) -> None:
    """Ignoring such a field would change what the answer means."""
    if value is not None and value not in ([], "") and value is not False:
        raise PydanticCustomError("unsupported", "not supported yet; leave it out")


NotYet = Annotated[None, BeforeValidator(_not_yet)]
"""A field of OpenAI's API that has no meaning here yet: refused, unless it asks for nothing."""


def _strings_or_parts(value: Any) -> str:
    return "<string>" if isinstance(value, str) else "<parts>"


def _kind_of_prompt(value: Any) -> str:
    if not isinstance(value, list):
        return "<string>"
    first = value[0] if value else 0
    if isinstance(first, str):
        return "<strings>"
    return "<id lists>" if isinstance(first, list) else "<ids>"


def _check_stop(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return []
    well_typed = isinstance(stops, list) and all(isinstance(stop, str) for stop in stops)
    if not well_typed or len(stops) > MAX_STOPS or "" in stops:
        raise PydanticCustomError(
            "stop", f"must be a non-empty string or a list of up to {MAX_STOPS} of them"
        )
    return stops


def _check_logit_bias(value: dict[str, float] | None) -> dict[str, float] | None:
    for token in value or {}:
        if not (token.isascii() and token.isdigit() and len(token) <= 9):
            raise PydanticCustomError("token", "keys must be token ids")
    return value


def _text_only(value: Any) -> Any:
    if isinstance(value, str) and value != "text":
        raise PydanticCustomError(
            "unsupported", "{kind} parts are not supported: this model reads text", {"kind": value}
        )
    return value


def _text_format_only(value: Any) -> Any:
    if isinstance(value, str) and value != "text":
        raise PydanticCustomError(
            "unsupported", "{kind} is not supported yet; only text is", {"kind": value}
        )
    return value


class _Wire(BaseModel):
    """Types are taken literally ("1" is no number) and numbers are finite."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    def unknown(self) -> Iterator[str]:
        """Names that were sent and mean nothing here."""
        yield from self.model_extra or ()


class StreamOptions(_Wire):
    """What a stream carries besides its text."""

    include_usage: bool | None = None


class TextPart(_Wire):
    """A piece of a message's content."""

    type: Annotated[Literal["text"], BeforeValidator(_text_only)]
    text: str


class ResponseFormat(_Wire):
    """The form the answer takes."""

    type: Annotated[Literal["text"], BeforeValidator(_text_format_only)]


class ChatMessage(_Wire):
    """One turn of a conversation. Further fields reach the chat template as they are."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        Annotated[str, Tag("<string>")] | Annotated[list[TextPart], Tag("<parts>")],
        Discriminator(_strings_or_parts),
    ]
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: NotYet = None
    function_call: NotYet = None
    audio: NotYet = None
    prefix: NotYet = None

    def for_template(self) -> dict[str, Any]:
        """The message with its content as one string."""
        fields = self.model_dump(exclude_none=True)
        if not isinstance(self.content, str):
            fields["content"] = "".join(part.text for part in self.content)
        return fields


class GenerationRequest(_Wire):
    """What chat and plain completions have in common."""

    continues: ClassVar[bool] = False  # whether the answer's text goes on with the prompt's
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: Annotated[
        dict[str, Annotated[float, Field(ge=-100, le=100)]] | None,
        AfterValidator(_check_logit_bias),
    ] = None
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    stop: Annotated[str | list[str] | None, BeforeValidator(_check_stop)] = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(None, max_length=1024)
    ignore_eos: bool | None = None

    # Accepted in silence: none of them changes the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return self.stop if isinstance(self.stop, list) else []

    @property
    def token_limit(self) -> int | None:
        """The most tokens an answer may have; None for what the context leaves."""
        return self.max_tokens

    @property
    @abstractmethod
    def logprob_count(self) -> int | None:
        """None: no log probabilities; n: those of the drawn token and of the n likeliest."""

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that holds the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def unknown(self) -> Iterator[str]:
        yield from super().unknown()
        if self.stream_options:
            yield from (f"stream_options.{name}" for name in self.stream_options.unknown())

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.stream_options and not self.stream:
            raise PydanticCustomError(
                "conflict", "only allowed with stream: true", {"param": "stream_options"}
            )
        if self.min_tokens and self.token_limit and self.min_tokens > self.token_limit:
            raise PydanticCustomError(
                "conflict", "must not exceed max_tokens", {"param": "min_tokens"}
            )
        return self


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    parallel_tool_calls: bool | None = None  # says nothing without tools

    tools: NotYet = None
    functions: NotYet = None
    function_call: NotYet = None
    audio: NotYet = None
    prediction: NotYet = None
    web_search_options: NotYet = None
    reasoning_effort: NotYet = None
    verbosity: NotYet = None
    tool_choice: Literal["none", "auto"] | None = None  # either means none without tools
    modalities: list[Literal["text"]] | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _logprobs_fit_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError(
                "conflict", "only allowed with logprobs: true", {"param": "top_logprobs"}
            )
        return self


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    continues: ClassVar[bool] = True
    prompt: Annotated[
        Annotated[str, Tag("<string>")]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS), Tag("<strings>")]
        | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), Tag("<ids>")]
        | Annotated[
            list[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_PROMPTS),
            Tag("<id lists>"),
        ],
        Discriminator(_kind_of_prompt),
    ]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=5)
    suffix: NotYet = None
    best_of: Annotated[None, BeforeValidator(lambda v: None if v == 1 else _not_yet(v))] = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens or 16  # OpenAI's default for this endpoint

    @property
    def logprob_count(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Every prompt, as text or as ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        return [ids] if ids else [item for item in self.prompt if not isinstance(item, int)]

    @model_validator(mode="after")
    def _echo_has_no_logprobs(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise PydanticCustomError(
                "unsupported", "not supported together with echo yet", {"param": "logprobs"}
            )
        return self


# --- Responses ----------------------------------------------------------------------------------


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every error."""

    error: ErrorDetail


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is served."""

    id: str
    created: int
    object: str = "model"
    owned_by: str = "farthing"
    max_model_len: int | None = None  # tokens; null until the engine is ready


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """GET /v1/models"""

    data: list[ModelCard]
    object: str = "list"


class Health(msgspec.Struct, frozen=True):
    """GET /health and /ready, where all is well."""

    status: str


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """GET /version"""

    version: str
    model: str
    model_type: str | None = None
    precision: str | None = None
    device: str | None = None


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Parts of the prompt's tokens."""

    cached_tokens: int


class CostDetails(msgspec.Struct, frozen=True, kw_only=True):
    """What each kind of token cost, in units of the currency."""

    currency: str
    prompt: float
    cached: float
    completion: float


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens and money of one request, all choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    prompt_cache_hit_tokens: int  # DeepSeek's names for the same
    prompt_cache_miss_tokens: int
    cost: float
    cost_details: CostDetails


class TopLogprob(msgspec.Struct, frozen=True):
    """A token that might have been drawn."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token that was drawn. `bytes` is exact where `token` is part of a character."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """The log probabilities of a message's tokens."""

    content: list[TokenLogprob]


class AssistantMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The model's answer."""

    content: str
    role: str = "assistant"
    refusal: str | None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer of those asked for."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer to POST /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    object: str = "chat.completion"


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk adds to the message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk's part of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatCompletionChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a stream. Where usage was asked for it is null in all chunks but the last."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str
    object: str = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log probabilities as the older endpoint writes them: one entry a token in each list."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]  # characters before the token


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One continuation, or a chunk's part of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to POST /v1/completions, whole or one event of a stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    object: str = "text_completion"
    usage: Usage | UnsetType | None = UNSET
