"""orthrus serve: OpenAI's interface and a page to chat on, until a signal ends it."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from orthrus_fast.cli.flags import build_serve_parser, spelled
from orthrus_fast.cli.session import load_decoder, load_settings, say_loading
from orthrus_fast.cli.terminal import printable, write_output
from orthrus_fast.errors import RequestError
from orthrus_fast.launch import launched

if TYPE_CHECKING:
    from orthrus_fast.server.access import Access

WITHOUT_NUMPY = "ignore:Failed to initialize NumPy"  # as ``main`` has it
OF_RAY = {
    "RAY_AUTH_MODE": "token",  # without one a cluster runs whatever it is sent
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on every system: Ray's own ports are on loopback
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # ten times a second takes the decoders' time
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def run(arguments: Sequence[str], prog: str) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code."""
    args = build_serve_parser(prog).parse_args(arguments)
    check_server_flags(args)
    say_loading(args)
    from orthrus_fast.server.access import Access, read_keys
    from orthrus_fast.server.protocol import served_name

    access = Access(args.host, read_keys(args.api_key_file), tuple(args.allowed_host))
    allow_connections()
    args.served_model_name = args.served_model_name or served_name(args.checkpoint)
    with bind(args.host, args.port) as listener:
        host = f"[{args.host}]" if ":" in args.host else args.host
        where = f"http://{host}:{listener.getsockname()[1]}"
        said = f"serving {printable(args.served_model_name, True)!r} on {where}/v1"

        def ready() -> None:
            write_output(f"{said}, and a page to chat on at {where}/\n")
            print("Ctrl-C ends the server", file=sys.stderr, flush=True)

        serve = serve_decoder if args.replicas is None else serve_replicas
        serve(args, access, listener, ready)
    return 0


def serve_decoder(
    args: argparse.Namespace, access: Access, listener: socket.socket, ready: Callable[[], None]
) -> None:
    """Serve a decoder of this process, whose clients another one talks to."""
    from orthrus_fast.fingerprint import fingerprint
    from orthrus_fast.server.app import ServerSettings
    from orthrus_fast.server.front import SIGNALS, Front

    os.environ.setdefault("PYTHONWARNINGS", WITHOUT_NUMPY)  # of the front: main's are its own
    front = Front(listener, args.drain_seconds)
    decoder = load_decoder(args)
    how = (fingerprint(decoder), access, args.mode, args.max_waiting)
    for number in SIGNALS:
        signal.signal(number, lambda *_: front.end())
    if front.start(decoder, ServerSettings(args.served_model_name, *how)):
        ready()
        front.decode()
    front.join()


def serve_replicas(
    args: argparse.Namespace, access: Access, listener: socket.socket, ready: Callable[[], None]
) -> None:
    """Serve decoders in processes that Ray starts."""
    for name, value in OF_RAY.items():  # which it reads when it is imported
        os.environ.setdefault(name, value)
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # else Ray writes one to a file
    import torch

    from orthrus_fast.server.front import SIGNALS
    from orthrus_fast.server.listening import make_server
    from orthrus_fast.server.ray import Arguments, create_front, local_replicas

    on_gpus = args.device == "cuda" or (args.device is None and torch.cuda.is_available())
    here = args.checkpoint is not None and os.path.exists(args.checkpoint)
    settings = Arguments(
        checkpoint=os.path.abspath(args.checkpoint) if here else args.checkpoint,
        slots=args.slots,
        load=load_settings(args),
        model=args.served_model_name,
        mode=args.mode,
        max_waiting=args.max_waiting,
    )
    with local_replicas(settings, args.replicas, on_gpus) as replicas:
        server = make_server(create_front(replicas, access), args.drain_seconds)
        for number in SIGNALS:  # which uvicorn raises again at its end
            signal.signal(number, server.handle_exit)
        ready()
        server.run(sockets=[listener])


def check_server_flags(args: argparse.Namespace) -> None:
    """Refuse numbers that are out of range."""
    for name, least in (("port", 0), ("max_waiting", 0), ("drain_seconds", 0), ("replicas", 1)):
        value = getattr(args, name)
        if value is not None and (value < least or (name == "port" and value > 65535)):
            raise RequestError(f"{spelled(name, args)} {value} is out of range")
    if args.replicas is not None and launched().size > 1:
        raise RequestError("--replicas does not go with torchrun: Ray starts its own processes")
    if args.replicas is not None and args.device not in (None, "cpu", "cuda"):
        raise RequestError(
            f"--device {args.device} does not go with --replicas: Ray gives out GPUs"
        )


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
