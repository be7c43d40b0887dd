"""orthrus serve: OpenAI's interface and a page to chat on, until a signal ends it."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orthrus_fast.cli.flags import build_serve_parser, spelled
from orthrus_fast.cli.session import load_decoder, say_loading
from orthrus_fast.cli.terminal import printable, write_output
from orthrus_fast.errors import RequestError
from orthrus_fast.options import ONE_ROW

if TYPE_CHECKING:
    from orthrus_fast import Decoder

KEY_VARIABLE = "ORTHRUS_API_KEY"
FREE = ("slots", "max_seq_len", "block_size")  # what no text depends on, with one row, one result


def run(arguments: Sequence[str], prog: str) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code."""
    args = build_serve_parser(prog).parse_args(arguments)
    check_server_flags(args)
    say_loading(args)
    from orthrus_fast.server.access import Access
    from orthrus_fast.server.app import ServerSettings, create_app
    from orthrus_fast.server.listening import make_server

    access = Access(args.host, read_keys(args.api_key_file), tuple(args.allowed_host))
    allow_connections()
    with bind(args.host, args.port) as listener:
        decoder = load_decoder(args)
        name = args.served_model_name or served_name(args.checkpoint)
        settings = ServerSettings(name, fingerprint(decoder), access, args.mode, args.max_waiting)
        server = make_server(create_app(decoder, settings), args.drain_seconds)
        for number in (signal.SIGTERM, signal.SIGINT):  # which uvicorn raises again at its end
            signal.signal(number, server.handle_exit)
        host = f"[{args.host}]" if ":" in args.host else args.host
        where = f"http://{host}:{listener.getsockname()[1]}"
        said = printable(name, True)
        write_output(f"serving {said!r} on {where}/v1, and a page to chat on at {where}/\n")
        print("Ctrl-C ends the server", file=sys.stderr, flush=True)
        server.run(sockets=[listener])
    return 0


def check_server_flags(args: argparse.Namespace) -> None:
    """Refuse numbers that are out of range."""
    for name, least in (("port", 0), ("max_waiting", 0), ("drain_seconds", 0)):
        if getattr(args, name) < least or (name == "port" and args.port > 65535):
            raise RequestError(f"{spelled(name, args)} {getattr(args, name)} is out of range")


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that has the address, before a model is loaded for it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        why = error.strerror or str(error)
        raise RequestError(f"--host {host} --port {port}: {why}") from None
    return listener


def allow_connections() -> None:
    """Raise the limit of open files, of which each connection is one, as far as it may be."""
    try:
        import resource
    except ModuleNotFoundError:  # no Unix
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def read_keys(file: str | None) -> tuple[str, ...]:
    """Return the keys that open the server: those of a file, or that of the environment."""
    if file is None:
        return tuple(filter(None, [os.environ.get(KEY_VARIABLE)]))
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise RequestError(f"--api-key-file {file}: {why}") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise RequestError(f"--api-key-file {file}: no key in it")
    return keys


def served_name(checkpoint: str | None) -> str:
    """Return what clients call a checkpoint: no path of this machine."""
    if checkpoint is None:
        return "embedded"
    return Path(checkpoint).resolve().name if os.path.exists(checkpoint) else checkpoint


def fingerprint(decoder: Decoder) -> str:
    """Return a short hash of what a text depends on beside the request.

    That is the weights, their dtype, the kind of chip and the libraries' versions; where the
    decoder promises less than one row, one result, also the slots and sizes.
    """
    from orthrus_fast.cli.results_file import settings_of, weights_digest

    assert decoder.checkpoint is not None
    settings = settings_of(decoder.configuration)
    if settings["promise"] == ONE_ROW:
        settings = {name: value for name, value in settings.items() if name not in FREE}
    what = [weights_digest(decoder.checkpoint), settings]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    return f"fp_{digest[:12]}"
