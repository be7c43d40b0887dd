"""From prompts to the ids that a model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

from orthrus_fast.errors import PromptError, RequestError
from orthrus_fast.tokenizer import Tokenizer

Prompt = str | list[int] | list[dict[str, Any]]


class Encoder:
    """Encodes prompts for the checkpoint ``name``; without its tokenizer only ids are prompts."""

    def __init__(self, name: str, tokenizer: Tokenizer | None) -> None:
        self.name, self.tokenizer = name, tokenizer

    def encode(self, prompt: Prompt, **template_arguments: Any) -> list[int]:
        """The ids of a prompt: text as it stands, messages through the checkpoint's template."""
        self.check_arguments([prompt], template_arguments)
        if isinstance(prompt, list) and all(hasattr(part, "__index__") for part in prompt):
            return [part if isinstance(part, bool) else index(part) for part in prompt]  # type: ignore[arg-type]
        if not is_chat(prompt) and not isinstance(prompt, str):
            kinds = {type(part).__name__ for part in prompt} if isinstance(prompt, list) else set()
            kind = type(prompt).__name__ + (f" of {', '.join(sorted(kinds))}" if kinds else "")
            raise PromptError(f"prompt: {kind} is not a string, or a list of messages or of ids")
        if self.tokenizer is None:
            raise PromptError(f"{self.name}: has no tokenizer.json; pass ids")
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode_chat(prompt, **template_arguments)  # type: ignore[arg-type]

    def check_arguments(self, prompts: Sequence[object], arguments: Mapping[str, Any]) -> None:
        """Raises RequestError for arguments that none of the prompts would heed."""
        if arguments and not any(map(is_chat, prompts)):
            names = ", ".join(arguments)
            raise RequestError(f"{names}: for a chat template; the prompt is no list of messages")
        if self.tokenizer is None or not self.tokenizer.has_chat_template:
            return  # which encoding says
        for name, value in arguments.items():
            if value is not None and not self.tokenizer.chat_template.mentions(name):
                raise RequestError(f"{name}: the chat template of {self.name} has no such variable")


def is_chat(prompt: object) -> bool:
    """Whether ``prompt`` is a list of messages."""
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) for m in prompt)
