"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from orthrus_fast.errors import PromptError

if TYPE_CHECKING:
    from torch import Tensor

    from orthrus_fast.matching import Matcher
    from orthrus_fast.sampling import SamplingParams


MAX_GAP = 0.05  # seconds between a text's tokens while somebody else's prompt is prefilled
MAX_WAITING = 1024  # requests


@dataclass(frozen=True)
class Limits:
    """What requests have to fit into."""

    max_seq_len: int  # prompt and new tokens
    positions: int  # the model's own limit of it
    waiting: int = MAX_WAITING  # requests that have no slot yet
    max_gap: float = MAX_GAP

    def check_length(self, n: int, budget: int) -> None:
        """Raise PromptError where a prompt of ``n`` tokens and ``budget`` new ones don't fit."""
        limit, positions = self.max_seq_len, self.positions
        if n == 0:
            raise PromptError("prompt: empty; it needs at least one token")
        if n + budget > limit:
            raise PromptError(
                f"prompt: {n} tokens + max_new_tokens {budget} = {n + budget}, over max_seq_len "
                f"{limit} (the model's own limit is {positions}); shorten the prompt or lower "
                "max_new_tokens" + (", or raise max_seq_len" if limit < positions else "")
            )


@dataclass(frozen=True)
class Request:
    """One prompt of ids and how to go on from there."""

    id: int  # no other request that has not ended has it
    prompt: list[int]
    max_new_tokens: int
    sampling: SamplingParams  # resolved
    drafting: bool  # False: mode ar
    reuse_key: str = ""  # cached rows are shared among requests of one key alone
    keep_logits: bool = False  # whether the first update brings the logits of its token
    matcher: Matcher | None = None  # of ``sampling.grammar``, at the beginning; no other has it

    @property
    def max_length(self) -> int:
        """Tokens at which the text ends, prompt included."""
        return len(self.prompt) + self.max_new_tokens


class Inputs(NamedTuple):
    """What an engine takes in before a launch: the rest of what it does follows from it."""

    requests: list[Request]
    cancelled: list[int]
    times: list[tuple[bool, int, float]]  # of launches: whether a cycle, width, seconds
    digest: int  # of all tokens that have been read


class Peers(Protocol):
    """The engines of other ranks, which do as the first one does.

    ``failure`` says why they have ended, if they have.
    """

    failure: str | None

    def step(self) -> AbstractContextManager[None]:
        """A step, of all of them. Raises RankError where one has ended, as ``check`` does."""
        ...

    def agree(self, inputs: Inputs) -> Inputs:
        """The first rank's inputs, on every rank."""
        ...

    def check(self) -> None: ...

    def fail(self, error: BaseException) -> Exception:
        """End all of them, because of an error here; what to tell of it."""
        ...


@dataclass(frozen=True)
class Update:
    """What one launch gave to one request, or its end by an error."""

    id: int
    tokens: list[int]
    n_accepted: int | None = None  # of the tokens from the draft; None: no cycle gave them
    logprobs: list[float] = field(default_factory=list)  # of the tokens, if asked for
    finish_reason: str | None = None  # eos, length, error; with it comes the last update
    n_reused: int = 0  # rows of the prompt that were cached; with the first token
    error: str | None = None  # one line, with finish_reason error
    logits: Tensor | None = None  # [V], if asked for; with the first token
