"""The text of one request: its updates become pieces of text, up to a stop string."""

from __future__ import annotations

import time

from orthrus_fast.engine.request import Update
from orthrus_fast.results import Chunk, Generation, Stats
from orthrus_fast.sampling import SamplingParams
from orthrus_fast.text import TextPieces
from orthrus_fast.tokenizer import Detokenizer


class Answer:
    """What has come of a prompt of ``n_prompt`` tokens; ``params`` are resolved."""

    def __init__(
        self, n_prompt: int, params: SamplingParams, detokenizer: Detokenizer | None = None
    ) -> None:
        self.params = params
        self.tokens: list[int] = []
        self.accepted: list[int] = []  # draft tokens emitted, by cycle
        self.finish_reason: str | None = None
        self.error: str | None = None
        self._n_prompt, self._n_reused = n_prompt, 0
        self._started = self._first_at = self._last_at = time.perf_counter()
        self._text = TextPieces(detokenizer, tuple(params.stop))
        self._pieces: list[str] = []
        self._logprobs: list[float] = []

    def extend(self, update: Update) -> Chunk:
        """Record what the engine tells of this request.

        A stop string ends the text before it, and the tokens with the one that completed it; an
        error ends both.
        """
        self._last_at = time.perf_counter()
        pieces: list[str] = []
        for token in update.tokens:
            pieces.append(self._text.push(token))
            if self._text.stopped:
                break
        tokens, self.finish_reason = update.tokens[: len(pieces)], update.finish_reason
        if self._text.stopped:
            self.finish_reason = "stop"
        elif update.finish_reason is not None:
            self.error, held_back = update.error, self._text.finish()
            pieces = [*pieces, held_back] if self.error else [*pieces[:-1], pieces[-1] + held_back]
            if self._text.stopped and self.error is None:  # in what was held back
                self.finish_reason = "stop"
        if not self.tokens:
            self._first_at, self._n_reused = self._last_at, update.n_reused
        n_accepted = min(update.n_accepted or 0, len(tokens))
        if update.n_accepted is not None:  # else by prefill, which is no cycle
            self.accepted.append(n_accepted)
        self.tokens += tokens
        self._pieces += pieces
        logprobs = update.logprobs[: len(tokens)]
        self._logprobs += logprobs
        return Chunk(tokens, pieces, n_accepted, logprobs)

    def result(self) -> Generation:
        """All that came so far."""
        return Generation(
            text="".join(self._pieces),
            tokens=list(self.tokens),
            finish_reason=self.finish_reason,
            seed=self.params.seed,
            stats=self._stats() if self.tokens else None,
            error=self.error,
            logprobs=list(self._logprobs) if self.params.logprobs else None,
        )

    def _stats(self) -> Stats:
        n_after_first = len(self.tokens) - 1
        decoding = self._last_at - self._first_at
        return Stats(
            prompt_tokens=self._n_prompt,
            cycles=len(self.accepted),
            tokens_per_cycle=n_after_first / len(self.accepted) if self.accepted else None,
            accepted=tuple(self.accepted),
            time_to_first_token=self._first_at - self._started,
            seconds=self._last_at - self._started,
            tokens_per_second=n_after_first / decoding if decoding > 0 else None,
            reused_tokens=self._n_reused,
        )
