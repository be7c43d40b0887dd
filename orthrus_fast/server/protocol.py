"""The requests of OpenAI's interface, as far as they are served; all else is refused by name.

Extensions: ``top_k``, ``min_p``, ``chat_template_kwargs``, ``mode``, ``system_fingerprint``.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from orthrus_fast.errors import (
    OrthrusError,
    PromptError,
    QueueFullError,
    RequestError,
    TemplateError,
    one_line,
    shown,
)
from orthrus_fast.grammar import Grammar
from orthrus_fast.sampling import SamplingParams

# Fields that change nothing here, and values that ask for nothing: clients send them unasked.
IGNORED = frozenset("user metadata safety_identifier prompt_cache_key service_tier".split())
NEUTRAL: dict[str, Any] = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "store": False,
    "annotations": [],
    "refusal": "",
}
TEMPLATE_ARGUMENTS = ("enable_thinking", "thinking", "preserve_thinking")  # that a client may set
MAX_CHOICES = 128
MAX_STOPS, MAX_STOP_LENGTH = 16, 256  # strings, characters
DEFAULT_COMPLETION = 16  # new tokens of /v1/completions, as OpenAI's documents say
_SETTINGS = ("temperature", "top_p", "top_k", "min_p", "stop")


class HTTPError(OrthrusError):
    """What a client did wrong, with the status, the field and the code of OpenAI's errors."""

    def __init__(
        self, status: int, message: str, field: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.field, self.code = status, field, code


class _Body(BaseModel):
    """An object of a request: of the types that it says, with no field more."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, data: Any) -> Any:
        """Without what is null, ignored, or asks for nothing."""
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if not _says_nothing(name, value)}


def _says_nothing(name: str, value: Any) -> bool:
    return value is None or name in IGNORED or (name in NEUTRAL and value == NEUTRAL[name])


class Function(_Body):
    """A function that a model called."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class Call(_Body):
    """A tool call of an assistant's turn."""

    id: str = ""
    type: Literal["function"] = "function"
    function: Function
    index: int | None = None


class Message(_Body):
    """A turn of a chat; the template says what becomes of it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Any] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates know it, which know no developer."""
        role = "system" if self.role == "developer" else self.role
        return {**self.model_dump(exclude_none=True), "role": role}


class StreamOptions(_Body):
    """What else a stream carries."""

    include_usage: bool = False
    include_obfuscation: bool = False  # ignored


class GenerationBody(_Body):
    """What both endpoints have in common."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    response_format: dict[str, Any] | None = None
    mode: Literal["diffusion", "ar"] | None = None
    system_fingerprint: str | None = None

    @model_validator(mode="after")
    def _check_stop(self) -> GenerationBody:
        stops = self.stop if isinstance(self.stop, list) else [self.stop or ""]
        if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_LENGTH for stop in stops):
            raise ValueError(
                f"stop: at most {MAX_STOPS} strings of at most {MAX_STOP_LENGTH} characters"
            )
        return self

    def sampling(self, seed: int, logprobs: bool) -> SamplingParams:
        """The settings of a text: what the request leaves open is the checkpoint's."""
        given = {name: getattr(self, name) for name in _SETTINGS}
        given = {name: value for name, value in given.items() if value is not None}
        grammar = Grammar.from_response_format(self.response_format)
        own = {"seed": seed, "logprobs": logprobs, "grammar": grammar}
        return SamplingParams.from_checkpoint(**given, **own)

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options.include_usage


class ChatBody(GenerationBody):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: Literal[0] = 0
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] = "auto"
    chat_template_kwargs: dict[str, bool | str] = {}

    @model_validator(mode="after")
    def _check_chat(self) -> ChatBody:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens: differs from max_completion_tokens, its newer name")
        for name in self.chat_template_kwargs:
            if name not in TEMPLATE_ARGUMENTS:
                known = ", ".join(TEMPLATE_ARGUMENTS)
                raise ValueError(f"chat_template_kwargs: {shown(name)} is not one of {known}")
        return self

    @property
    def budget(self) -> int | None:
        """New tokens at most; None: all that fits."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def template_arguments(self) -> dict[str, Any]:
        """What goes to the chat template beside the messages."""
        arguments: dict[str, Any] = dict(self.chat_template_kwargs)
        if self.offered:
            arguments["tools"] = self.offered
        return arguments

    @property
    def offered(self) -> list[dict[str, Any]] | None:
        """The tools that the model may call."""
        return self.tools if self.tool_choice == "auto" else None


class CompletionBody(GenerationBody):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Literal[0] | None = None

    @property
    def prompts(self) -> list[Any]:
        """Each prompt alone: text, or ids."""
        several = isinstance(self.prompt, list) and not all(isinstance(p, int) for p in self.prompt)
        return self.prompt if several and isinstance(self.prompt, list) else [self.prompt]


def seed_of(seed: int, choice: int) -> int:
    """The seed of a choice among ``n``: the request's own for the first one."""
    if choice == 0:
        return seed % 2**64
    digest = hashlib.sha256(f"{seed % 2**64}/{choice}".encode()).digest()
    return int.from_bytes(digest[:6], "big")  # 48 bits: whole in any JSON reader


Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], content: bytes) -> Body:
    """The body of a request. Raises HTTPError and RequestError, which name the field."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False, include_input=False)[0]
    if error["type"] == "json_invalid":
        raise HTTPError(400, one_line(f"body: {error['msg']}"))
    path = [str(part) for part in error["loc"] if part not in _TAGS]
    field = shown(".".join(path)) or None
    if error["type"] == "extra_forbidden":
        raise HTTPError(400, f"{field}: not served", field)
    message = error["msg"].removeprefix("Value error, ")
    raise HTTPError(400, one_line(f"{field}: {message}" if field else message), field)


_TAGS = ("str", "list[str]", "list[int]", "list[list[int]]", "list[any]")  # of unions


def served_name(checkpoint: str | None) -> str:
    """What clients call a checkpoint: no path of this machine."""
    if checkpoint is None:
        return "embedded"
    return Path(checkpoint).resolve().name if os.path.exists(checkpoint) else checkpoint


def check_model(asked: str | None, served: str) -> None:
    """Raise HTTPError for a model that is not served."""
    if asked is not None and asked != served:
        message = f"model: {shown(asked)!r} is not served here; {served!r} is"
        raise HTTPError(404, message, "model", "model_not_found")


def check_fingerprint(asked: str | None, served: str) -> None:
    """Raise HTTPError for texts of another kind of chip, or of other weights, than are here."""
    if asked is not None and asked != served:
        message = f"system_fingerprint: {shown(asked)!r} is not served here; {served!r} is"
        raise HTTPError(404, message, "system_fingerprint", "fingerprint_not_found")


def status_of(error: Exception) -> int:
    """The HTTP status of an error that was raised on purpose."""
    if isinstance(error, HTTPError):
        return error.status
    if isinstance(error, QueueFullError):
        return 429
    return 400 if isinstance(error, (PromptError, RequestError, TemplateError)) else 500
