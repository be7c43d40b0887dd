"""The command line: ``orthrus COMMAND …``, ``python -m orthrus_fast COMMAND …``, ``generate.py …``.

Imports that take long stand where they are needed, so that --help is quick.
"""

from __future__ import annotations

import difflib
import importlib
import os
import shlex
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

from orthrus_fast import __version__
from orthrus_fast.cli.flags import EXIT_CODES, NEAR
from orthrus_fast.cli.terminal import drop_output, fail, prepare_streams, write_output
from orthrus_fast.errors import OrthrusError, RequestError
from orthrus_fast.launch import leave_talking_to_the_first

COMMANDS = {
    "generate": "decode a prompt, or a file of prompts",
    "chat": "chat in several turns",
    "serve": "answer OpenAI's clients, and chat on a page",
    "bench": "time a decoder, and compare its modes to the bit",
    "info": "print what a checkpoint is and needs",
    "tune": "measure the fastest tiles on this GPU, once",
}
OF_THE_SERVER = "anyio fastapi httptools prometheus_client pydantic starlette uvicorn".split()
USAGE = "\n".join(
    [
        "usage: orthrus COMMAND [flags]",
        "",
        "Decode an Orthrus checkpoint losslessly, several tokens per cycle.",
        "",
        *(f"  {name:10}{what}" for name, what in COMMANDS.items()),
        "",
        "orthrus COMMAND --help lists a command's flags; --version prints the version.",
        "",
        *textwrap.wrap(EXIT_CODES, 80),
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done; 1: --check found a difference; 2: bad input, or a prompt that failed; 3: prompts of a
    file failed; 130: interrupted; 141: the reader of the output closed it.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    leave_talking_to_the_first()
    prepare_streams()
    # A warning of torch without NumPy, which nothing here uses.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    try:
        code = run(words)
        write_output("")  # what a full disk cannot take is an error here, not at exit
        return code
    except OrthrusError as error:
        return fail(str(error))
    except ModuleNotFoundError as error:
        what = "'.[server]'" if error.name in OF_THE_SERVER else "."
        what = "'.[ray]'" if error.name == "ray" else what
        return fail(f"{error.name} is not installed; run: pip install -e {what} in the repository")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output closed it, as head does
        drop_output()
        return 141
    except OSError as error:  # for example, a full disk
        drop_output()
        what = error.strerror or str(error)
        return fail(what if error.filename is None else f"{error.filename}: {what}")


def run(words: list[str]) -> int:
    """Run the command that the first word names, with the others as its flags."""
    if sys.stdout is None:
        raise RequestError("standard output: closed")
    command = words[0] if words else "--help"
    if command in ("--help", "-h", "help"):
        write_output(USAGE + "\n")
        return 0
    if command == "--version":
        write_output(f"orthrus-fast {__version__}\n")
        return 0
    if command not in COMMANDS:
        raise RequestError(explain(words))
    module = importlib.import_module(f"orthrus_fast.cli.{command}")
    return int(module.run(words[1:], program(command)))


def program(command: str) -> str:
    """Return a command as it was started here."""
    started = Path(sys.argv[0])
    if started.name == "generate.py" and command == "generate":
        return "generate.py"
    by_name = started.name not in ("generate.py", "__main__.py")
    return f"{'orthrus' if by_name else 'python -m orthrus_fast'} {command}"


def explain(words: list[str]) -> str:
    """Return what is wrong with words that begin with no command, and what to type instead."""
    word, typed = words[0], shlex.join(words)[:200]
    if word.startswith("-"):
        name = NEAR.get(word.lstrip("-"), "").partition(",")[0]
        meant = name if name.startswith("orthrus") else f"orthrus generate {typed}"
        return f"{word[:200]}: a command comes first; did you mean: {meant}?"
    if os.path.exists(word) or "/" in word:
        return f"{word!r} is no command; did you mean: orthrus generate --checkpoint {typed}?"
    there = f"{word[:200]!r} is no command; there are {', '.join(COMMANDS)}"
    if " " in word:
        return f"{there}; did you mean: orthrus generate --prompt {typed}?"
    near = next(iter(difflib.get_close_matches(word, COMMANDS, 1)), None)
    return there + (f"; did you mean: orthrus {near}?" if near else "")
