"""orthrus chat: several turns."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from orthrus_fast.cli.flags import build_chat_parser, check_flags
from orthrus_fast.cli.session import (
    announce_loading,
    check_template_flags,
    decode,
    encode_chat,
    has_template,
    load_decoder,
    message,
    report,
)
from orthrus_fast.cli.terminal import fail
from orthrus_fast.errors import PromptError, RequestError


def run(arguments: Sequence[str], prog: str) -> int:
    """Chat until the input ends; Ctrl-C ends an answer, or, while a turn is typed, the chat."""
    parser = build_chat_parser(prog)
    args = parser.parse_args(arguments)
    check_flags(parser, args)
    announce_loading(args)
    if sys.stdin is None:
        raise RequestError("standard input: closed; a chat reads it")
    decoder = load_decoder(args)
    if not has_template(decoder):
        raise RequestError(f"{decoder.name} has no chat template; use: orthrus generate")
    check_template_flags(decoder, args)
    messages: list[dict[str, Any]] = []
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        except UnicodeDecodeError:
            raise PromptError("standard input: not valid UTF-8") from None
        if not text.strip():
            continue
        turn = [*messages, message("user", text)]
        try:
            result, interrupted = decode(decoder, args, encode_chat(decoder, args, turn))
        except PromptError as error:  # only this turn is dropped
            fail(f"{error} (this turn is dropped; a new chat has more room)")
            continue
        report(decoder, args, result, interrupted)
        messages = [*turn, message("assistant", result.text)]
