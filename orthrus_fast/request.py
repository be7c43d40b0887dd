"""The host's record of one prompt: what was asked for, and what has come of it so far."""

from __future__ import annotations

import time

from orthrus_fast.results import Chunk, Generation, Stats
from orthrus_fast.runners import SlotOutput
from orthrus_fast.sampling import NO_TOKEN, SamplingParams
from orthrus_fast.text import TextPieces
from orthrus_fast.tokenizer import Detokenizer


class Request:
    """One prompt [ids] on its way through a slot; ``params`` are resolved."""

    def __init__(
        self,
        prompt: list[int],
        max_new_tokens: int,
        params: SamplingParams,
        eos_token_ids: tuple[int, ...] = (),
        detokenizer: Detokenizer | None = None,
        dtype: str = "",
        index: int = 0,
    ) -> None:
        self.prompt = prompt
        self.index = index  # among the prompts of a call
        self.max_length = len(prompt) + max_new_tokens
        self.params = params
        self.tokens: list[int] = []
        self.accepted: list[int] = []  # draft tokens emitted, by cycle
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.started = self.first_at = self.last_at = 0.0
        self._eos_token_ids = eos_token_ids
        self._dtype = dtype  # of the model, by name
        self._text = TextPieces(detokenizer, tuple(params.stop))
        self._pieces: list[str] = []
        self._logprobs: list[float] = []

    def start(self) -> None:
        self.started = time.perf_counter()

    def fail(self, error: str) -> None:
        """End it here; what came before stays."""
        self.finish_reason, self.error = "error", error

    def extend(self, output: SlotOutput) -> Chunk:
        """Record what a pass emitted for this prompt.

        A stop string ends the text before it, and the tokens with the one that completed it;
        NO_TOKEN ends both in an error.
        """
        self.last_at = time.perf_counter()
        pieces: list[str] = []
        for token in output.tokens:
            if token == NO_TOKEN:
                half = self._dtype == "float16"  # which ends at 65504
                advice = "use bfloat16 or float32" if half else "the checkpoint may be damaged"
                self.fail(f"dtype: logits are not finite in {self._dtype}; {advice}")
                break
            pieces.append(self._text.push(token))
            if self._text.stopped:
                break
        tokens = output.tokens[: len(pieces)]
        if output.done and not self._text.stopped:
            held_back = self._text.finish()
            pieces = [*pieces, held_back] if self.error else [*pieces[:-1], pieces[-1] + held_back]
        if self.error is None and self._text.stopped:
            self.finish_reason = "stop"
        elif self.error is None and output.done:
            self.finish_reason = "eos" if tokens[-1] in self._eos_token_ids else "length"
        n_accepted = min(output.n_accepted or 0, len(tokens))
        if output.n_accepted is None:  # by prefill, which is no cycle
            self.first_at = self.last_at
        else:
            self.accepted.append(n_accepted)
        self.tokens += tokens
        self._pieces += pieces
        self._logprobs += output.logprobs[: len(tokens)]
        return Chunk(tokens, pieces, n_accepted)

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
        decoding = self.last_at - self.first_at
        return Stats(
            prompt_tokens=len(self.prompt),
            cycles=len(self.accepted),
            tokens_per_cycle=n_after_first / len(self.accepted) if self.accepted else None,
            accepted=tuple(self.accepted),
            time_to_first_token=self.first_at - self.started,
            seconds=self.last_at - self.started,
            tokens_per_second=n_after_first / decoding if decoding > 0 else None,
        )
