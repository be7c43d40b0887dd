"""The command line: ``orthrus COMMAND …``, ``python -m orthrus_fast COMMAND …``, ``generate.py …``.

Imports that take long stand where they are needed, so that --help is quick.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence

from orthrus_fast import __version__
from orthrus_fast.cli.terminal import drop_output, fail, prepare_streams
from orthrus_fast.errors import OrthrusError, RequestError

COMMANDS = {
    "generate": "decode a prompt, or a file of prompts",
    "chat": "chat in several turns",
    "bench": "time a decoder, and compare its modes to the bit",
    "info": "print what a checkpoint is and needs",
}
USAGE = "\n".join(
    [
        "usage: orthrus COMMAND [flags]",
        "",
        "Decode an Orthrus checkpoint losslessly, several tokens per cycle.",
        "",
        *(f"  {name:10}{what}" for name, what in COMMANDS.items()),
        "",
        "orthrus COMMAND --help lists a command's flags; --version prints the version.",
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done; 1: --check found a difference; 2: bad input; 3: a prompt of a file failed; 130:
    interrupted; 141: the reader of the output closed it.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    prepare_streams()
    # A warning of torch without NumPy, which nothing here uses.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    try:
        return run(words)
    except OrthrusError as error:
        return fail(str(error))
    except ModuleNotFoundError as error:
        return fail(f"{error.name} is not installed; run: pip install -e . in the repository")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output closed it, as head does
        drop_output()
        return 141
    except OSError as error:  # for example, a full disk
        drop_output()
        return fail(str(error))


def run(words: list[str]) -> int:
    """Run the command that the first word names, with the others as its flags."""
    if sys.stdout is None:
        raise RequestError("standard output: closed")
    command = words[0] if words else "--help"
    if command in ("--help", "-h", "help"):
        print(USAGE)
        return 0
    if command == "--version":
        print(f"orthrus-fast {__version__}")
        return 0
    if command not in COMMANDS:
        raise RequestError(f"{command!r} is no command; there are {', '.join(COMMANDS)}")
    module = importlib.import_module(f"orthrus_fast.cli.{command}")
    return int(module.run(words[1:], f"orthrus {command}"))
