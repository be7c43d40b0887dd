"""orthrus chat: several turns, which the model sees as far as its context reaches."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orthrus_fast.cli.flags import build_chat_parser, check_flags
from orthrus_fast.cli.keyboard import Keyboard
from orthrus_fast.cli.session import (
    begin_loading,
    check_template_flags,
    decode,
    encode,
    has_template,
    load_decoder,
    message,
    report,
)
from orthrus_fast.cli.terminal import fail, printable
from orthrus_fast.errors import PromptError, RequestError, TemplateError
from orthrus_fast.launch import launched
from orthrus_fast.options import MAX_NEW_TOKENS

if TYPE_CHECKING:
    from orthrus_fast import Decoder

Messages = list[dict[str, Any]]
HELP = """\
/help   list the commands
/clear  forget the conversation; --system's message stays
/exit   leave, as /quit and Ctrl-D do
Ctrl-C ends an answer, and discards a line; twice on an empty line leaves.
What is pasted is one turn. A space before a slash makes it a message."""


def run(arguments: Sequence[str], prog: str) -> int:
    """Chat until the input ends; return the exit code."""
    parser = build_chat_parser(prog)
    args = parser.parse_args(arguments)
    check_flags(parser, args)
    if launched().size > 1 and sys.stdin is not None and sys.stdin.isatty():
        without = "start orthrus chat --tensor-parallel N without it"
        raise RequestError(f"chat: under torchrun Ctrl-C ends more than an answer; {without}")
    begin_loading(args)
    if sys.stdin is None:
        raise RequestError("standard input: closed; a chat reads it")
    decoder = load_decoder(args)
    if not has_template(decoder):
        raise RequestError(f"{decoder.name} has no chat template; use: orthrus generate")
    check_template_flags(decoder, args)
    keyboard = Keyboard()
    if keyboard.typed:
        name = printable(decoder.name, True)
        print(f"{name} · context of {decoder.max_seq_len} tokens", file=sys.stderr)
        print("/help lists the commands · Ctrl-C ends an answer · Ctrl-D leaves", file=sys.stderr)
    converse(decoder, args, keyboard)
    return 0


def converse(decoder: Decoder, args: argparse.Namespace, keyboard: Keyboard) -> None:
    """Answer turns and obey commands until the input ends or a command does."""
    messages: Messages = []
    while (text := keyboard.read()) is not None:
        if not text.strip():
            continue
        match find_command(text):
            case None:
                try:
                    with keyboard.held():
                        messages = answer(decoder, args, messages, text)
                except KeyboardInterrupt:  # before the text, or a second one
                    if not keyboard.typed:
                        raise
                    print("interrupted: this turn is dropped", file=sys.stderr)
            case "/exit" | "/quit":
                return
            case "/clear":
                messages = []
                print("the conversation is forgotten", file=sys.stderr)
            case "/help":
                print(HELP, file=sys.stderr)
            case unknown:
                fail(f"{unknown}: no such command; /help lists them (a space before it sends it)")


def find_command(text: str) -> str | None:
    """Return the command that a turn is, known or not; None for a message.

    A command is one line whose first word has one slash, its first character.
    """
    line = text.rstrip()
    return line if re.fullmatch(r"/[^/\s]*([ \t].*)?", line) else None


def answer(decoder: Decoder, args: argparse.Namespace, messages: Messages, text: str) -> Messages:
    """Stream the answer to a turn, and return the conversation with both.

    A turn without an answer is dropped. Raises KeyboardInterrupt where no further turn is typed.
    """
    turn = message("user", text[1:] if text.startswith(" /") else text)
    try:
        ids, kept = fit(decoder, args, [*messages, turn])
        result, interrupted = decode(decoder, args, ids)
    except (PromptError, TemplateError) as error:
        if isinstance(error, TemplateError) and not messages:
            raise  # every turn would fail
        fail(f"{error} (this turn is dropped)")
        return messages
    if result.error is not None:
        fail(f"{result.error} (this turn is dropped)")
        return messages
    report(decoder, args, result, interrupted)
    if interrupted and not sys.stdin.isatty():
        raise KeyboardInterrupt
    if result.stats is None:  # interrupted before the first token
        return messages
    if forgotten := (len(messages) + 1 - len(kept)) // 2:
        turns = "the oldest turn was" if forgotten == 1 else f"the {forgotten} oldest turns were"
        print(f"the context was full: {turns} forgotten", file=sys.stderr)
    return [*kept, message("assistant", result.text)]


def fit(
    decoder: Decoder, args: argparse.Namespace, messages: Messages
) -> tuple[list[int], Messages]:
    """Return the ids of the conversation, and what of it they hold: the newest turns that fit.

    Room for an answer is the limit of new tokens, or, without one, a quarter of the context, of
    256 tokens at most where nobody thinks.
    """
    quarter = decoder.max_seq_len // 4
    answer_room = args.max_new_tokens or (quarter if args.thinks else min(MAX_NEW_TOKENS, quarter))
    ids = encode(decoder, args, messages)
    while len(ids) + answer_room > decoder.max_seq_len and len(messages) > 1:
        messages = messages[2:]
        ids = encode(decoder, args, messages)
    return ids, messages
