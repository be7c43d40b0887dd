"""orthrus serve: OpenAI's interface and a page to chat on, until a signal ends it."""

from __future__ import annotations

import argparse
import signal
import socket
import sys
from collections.abc import Sequence

from orthrus_fast.cli.flags import build_serve_parser, spelled
from orthrus_fast.cli.session import load_decoder, say_loading
from orthrus_fast.cli.terminal import printable, write_output
from orthrus_fast.errors import RequestError


def run(arguments: Sequence[str], prog: str) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code."""
    args = build_serve_parser(prog).parse_args(arguments)
    check_server_flags(args)
    say_loading(args)
    from orthrus_fast.fingerprint import fingerprint
    from orthrus_fast.server.access import Access, read_keys
    from orthrus_fast.server.app import ServerSettings, create_app
    from orthrus_fast.server.listening import make_server
    from orthrus_fast.server.protocol import served_name

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
