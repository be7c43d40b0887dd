"""What decoding gives back."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stats:
    """What one request took. Times in seconds, from when it was queued."""

    prompt_tokens: int
    cycles: int  # verify passes; a diffusion cycle runs a draft pass before each
    tokens_per_cycle: float | None  # without the first token, which prefill gives; None: no cycle
    accepted: tuple[int, ...]  # draft tokens that each cycle emitted
    time_to_first_token: float
    seconds: float
    tokens_per_second: float | None  # of the tokens after the first, over the time after it
    reused_tokens: int = 0  # of the prompt: their cache rows were those of an earlier request


@dataclass(frozen=True)
class Generation:
    """The result of one prompt. ``tokens`` are the new ones, the end-of-sequence id included."""

    text: str
    tokens: list[int]
    finish_reason: str | None  # eos, length, stop, error; None: the stream was left early
    seed: int | None
    stats: Stats | None  # None where nothing came: an error, or a stream left at once
    error: str | None = None
    logprobs: list[float] | None = None  # of the tokens, where SamplingParams asked for them

    @staticmethod
    def failed(error: Exception, seed: int | None) -> Generation:
        """The result of a prompt that could not be decoded."""
        return Generation("", [], "error", seed, None, str(error))


@dataclass(frozen=True)
class Chunk:
    """What one pass emitted for one prompt.

    ``pieces`` has the text that each token completed, "" while a character is still incomplete;
    one more ends a text that fails, with what was held back. The first ``n_accepted`` tokens came
    from the draft, the rest from the verify (or prefill) pass.
    """

    tokens: list[int]
    pieces: list[str]
    n_accepted: int
    logprobs: list[float] = field(default_factory=list)  # of the tokens, where asked for

    @property
    def text(self) -> str:
        return "".join(self.pieces)
