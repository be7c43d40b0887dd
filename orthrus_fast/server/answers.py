"""From pieces of text to the objects of OpenAI's interface, streamed or whole."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from orthrus_fast.results import Chunk, Generation
from orthrus_fast.server.jobs import Piece
from orthrus_fast.server.parsing import AnswerParser, ToolCall
from orthrus_fast.tokenizer import Tokenizer

Json = dict[str, Any]
END = b"data: [DONE]\n\n"  # of a stream
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


class Choice:
    """One text of an answer: ``push`` gives what a piece adds to it, ``whole`` all of it."""

    def __init__(self, index: int, tokenizer: Tokenizer, with_logprobs: bool) -> None:
        self.index = index
        self.result: Generation | None = None
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._logprobs: list[Json] = []

    def push(self, piece: Piece) -> Json:
        """The choice of a chunk of the stream."""
        self.result = piece.result
        chunk, reason = piece.chunk, piece.result.finish_reason if piece.result else None
        shown, n_drafted = self._add(chunk, final=reason is not None)
        told = {"n_tokens": len(chunk.tokens), "n_accepted": chunk.n_accepted}
        told |= {"n_accepted_characters": n_drafted, **report(piece.result)}
        entries = self._entries(chunk)
        self._logprobs += entries
        choice = {"index": self.index, **shown, "finish_reason": reason and self._reason(reason)}
        logprobs = self._listed(entries) if self._with_logprobs else None
        return {**choice, "logprobs": logprobs, "orthrus": told}

    def whole(self) -> Json:
        """The choice of an answer in one piece."""
        assert self.result is not None and self.result.finish_reason is not None
        reason = self._reason(self.result.finish_reason)
        logprobs = self._listed(self._logprobs) if self._with_logprobs else None
        told = {"logprobs": logprobs, "orthrus": report(self.result)}
        return {"index": self.index, **self._all(), "finish_reason": reason, **told}

    def first(self) -> Json | None:
        """The choice of the chunk before the first token, if there is one."""
        return None

    def _add(self, chunk: Chunk, final: bool) -> tuple[Json, int]:
        """What a chunk shows, and how many characters of it come from the draft."""
        raise NotImplementedError

    def _all(self) -> Json:
        raise NotImplementedError

    def _reason(self, reason: str) -> str:
        return REASONS.get(reason, reason)

    def _entries(self, chunk: Chunk) -> list[Json]:
        """Each token with its log-probability."""
        entries = []
        for token, logprob in zip(chunk.tokens, chunk.logprobs, strict=False):
            content = self._tokenizer.bytes_of(token, skip_special=False)
            text = content.decode("utf-8", "replace")
            entries.append({"token": text, "logprob": logprob, "bytes": list(content)})
        return entries

    def _listed(self, entries: list[Json]) -> Json:
        raise NotImplementedError


class ChatChoice(Choice):
    """A message of the assistant: thought, content and tool calls."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        with_logprobs: bool,
        in_thought: bool = False,
        tools: bool = False,
    ) -> None:
        super().__init__(index, tokenizer, with_logprobs)
        self._parser = AnswerParser(in_thought, tools)
        self._reasoning = self._content = ""
        self._calls: list[Json] = []

    def first(self) -> Json:
        delta = {"role": "assistant", "content": ""}
        return {"index": self.index, "delta": delta, "finish_reason": None, "logprobs": None}

    def _add(self, chunk: Chunk, final: bool) -> tuple[Json, int]:
        drafted = chunk.pieces[: chunk.n_accepted]
        parts = self._parser.push("".join(drafted)) if drafted else []
        n_drafted = sum(len(part.reasoning + part.content) for part in parts)
        parts += self._parser.push("".join(chunk.pieces[chunk.n_accepted :]))
        parts += self._parser.finish() if final else []
        delta: Json = {}
        for part in parts:
            if part.call is not None:
                delta.setdefault("tool_calls", []).append(self._called(part.call))
            elif part.reasoning:
                delta["reasoning_content"] = delta.get("reasoning_content", "") + part.reasoning
            else:
                delta["content"] = delta.get("content", "") + part.content
        self._reasoning += delta.get("reasoning_content", "")
        self._content += delta.get("content", "")
        return {"delta": delta}, n_drafted

    def _called(self, call: ToolCall) -> Json:
        function = {"name": call.name, "arguments": call.arguments}
        one: Json = {"id": f"call_{secrets.token_hex(12)}", "type": "function"}
        self._calls.append({**one, "function": function})
        return {"index": len(self._calls) - 1, **one, "function": function}

    def _all(self) -> Json:
        content = self._content if self._content or not self._calls else None
        message: Json = {"role": "assistant", "content": content}
        if self._reasoning:
            message["reasoning_content"] = self._reasoning
        if self._calls:
            message["tool_calls"] = self._calls
        return {"message": message}

    def _reason(self, reason: str) -> str:
        ended = super()._reason(reason)
        return "tool_calls" if self._calls and ended == "stop" else ended

    def _listed(self, entries: list[Json]) -> Json:
        return {"content": [{**entry, "top_logprobs": []} for entry in entries], "refusal": None}


class TextChoice(Choice):
    """The continuation of a raw prompt."""

    def __init__(self, index: int, tokenizer: Tokenizer, with_logprobs: bool) -> None:
        super().__init__(index, tokenizer, with_logprobs)
        self._text = ""

    def _add(self, chunk: Chunk, final: bool) -> tuple[Json, int]:
        self._text += chunk.text
        n_drafted = sum(map(len, chunk.pieces[: chunk.n_accepted]))
        return {"text": chunk.text}, n_drafted

    def _all(self) -> Json:
        return {"text": self._text}

    def _listed(self, entries: list[Json]) -> Json:
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": None,
            "text_offset": None,
        }


class Answer:
    """The objects around the choices of one request."""

    def __init__(
        self, kind: str, model: str, fingerprint: str, choices: Sequence[Choice], n_prompt: int
    ) -> None:
        self.choices: list[Choice] = list(choices)
        self._n_prompt = n_prompt
        self._kind = kind  # "chat.completion" or "text_completion"
        prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
        self._head: Json = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time())}
        self._tail: Json = {"model": model, "system_fingerprint": fingerprint}

    def chunk(self, choices: list[Json], **more: Any) -> Json:
        """One event of the stream."""
        kind = f"{self._kind}.chunk" if self._kind.startswith("chat") else self._kind
        return {**self._head, "object": kind, **self._tail, "choices": choices, **more}

    def whole(self) -> Json:
        """The answer in one piece."""
        choices = [choice.whole() for choice in self.choices]
        head = {**self._head, "object": self._kind, **self._tail}
        return {**head, "choices": choices, "usage": self.usage()}

    def usage(self) -> Json:
        """Numbers of tokens; ``cached_tokens`` of the prompts were not computed again."""
        results = [choice.result for choice in self.choices if choice.result is not None]
        n_new = sum(len(result.tokens) for result in results)
        stats = [result.stats for result in results if result.stats is not None]
        n_cached = min(sum(one.reused_tokens for one in stats), self._n_prompt)
        return {
            "prompt_tokens": self._n_prompt,
            "completion_tokens": n_new,
            "total_tokens": self._n_prompt + n_new,
            "prompt_tokens_details": {"cached_tokens": n_cached},
        }


def report(result: Generation | None) -> Json:
    """The seed of a text that has ended, and how drafting went."""
    if result is None or (stats := result.stats) is None:
        return {}
    return {
        "seed": result.seed,
        "cycles": stats.cycles,
        "tokens_per_cycle": stats.tokens_per_cycle,
        "tokens_per_second": stats.tokens_per_second,
        "time_to_first_token": stats.time_to_first_token,
    }


def event(content: Json) -> bytes:
    """A server-sent event."""
    return b"data: %s\n\n" % _ENCODER.encode(content).encode()
