"""Times the server against its own engine: closed and open loops of clients over loopback.

    python benchmarks/serving.py --json result.json

As ``orthrus serve`` does, one process has the decoder and another the connections; the clients are
a third, so that they take no time of the server's. Rounds of the bare engine (``as_completed``,
with the same prompts) and of clients alternate, and a figure is the median of rounds. Every
streamed text is compared with the text that the decoder gives alone. ``--accept`` replays drafts
that are right that often, where a model of random weights would draft nothing that is. Times are
the client's: from the first byte sent to the first event with text (first token), and between
events (gaps).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # from a checkout that is not installed, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console

from orthrus_fast.bench.clocks import summary
from orthrus_fast.bench.common import REPOSITORY, Result, log
from orthrus_fast.bench.decoding import Replay, patched, share_of_right_drafts
from orthrus_fast.bench.flags import Parser, check_flags, positive, positives
from orthrus_fast.bench.results import Report
from orthrus_fast.bench.tables import print_table
from orthrus_fast.errors import OrthrusError

PROMPTS = REPOSITORY / "model" / "heldout.jsonl"
LEFT = -1.0  # a client's first token where it left before one


async def ask(port: int, body: bytes, leave_after: int | None) -> Result:
    """One request of a client that does no more than read; it may leave after some events."""
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    marks, text, n_tokens, whole = [begin], [], 0, False
    try:
        status = (await reader.readline()).split()[1]
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                whole = True
            elif line.startswith(b"data: "):
                choice = json.loads(line[6:])["choices"][0]
                if "orthrus" in choice:
                    marks.append(time.perf_counter())
                    text.append(choice["delta"].get("content", ""))
                    n_tokens += choice["orthrus"]["n_tokens"]
                    if len(marks) - 1 == leave_after:
                        break
    finally:
        writer.close()
    gaps = [b - a for a, b in zip(marks[1:], marks[2:], strict=False)]
    first = marks[1] - begin if len(marks) > 1 else LEFT
    told = {"status": int(status), "whole": whole, "text": "".join(text), "n_tokens": n_tokens}
    return {**told, "first": first, "gaps": gaps, "seconds": time.perf_counter() - begin}


async def closed_loop(port: int, bodies: Sequence[Any], n_clients: int) -> list[Result]:
    """Each client sends its next request when its last one has ended."""
    waiting = iter(list(enumerate(bodies)))
    done: list[Result] = [{}] * len(bodies)

    async def client() -> None:
        for place, (body, leave_after) in waiting:
            done[place] = await ask(port, body, leave_after)

    await asyncio.gather(*(client() for _ in range(n_clients)))
    return done


async def open_loop(port: int, bodies: Sequence[Any], rate: float) -> list[Result]:
    """Requests come at random times, ``rate`` of them a second, whatever has ended."""
    draw, tasks = random.Random(1), []
    for body, leave_after in bodies:
        tasks.append(asyncio.create_task(ask(port, body, leave_after)))
        await asyncio.sleep(draw.expovariate(rate))
    return await asyncio.gather(*tasks)


def run_clients(order: Result) -> Result:
    """The clients' process: obeys one order, of which it says what came of it."""
    leave_after = order["leave_after"]
    bodies = [
        (body.encode(), after) for body, after in zip(order["bodies"], leave_after, strict=True)
    ]
    begin = time.perf_counter()
    if order["rate"] is None:
        done = asyncio.run(closed_loop(order["port"], bodies, order["clients"]))
    else:
        done = asyncio.run(open_loop(order["port"], bodies, order["rate"]))
    return {"seconds": time.perf_counter() - begin, "answers": done}


class Served:
    """A server of the decoder, which decodes in the thread that made it, as bare rounds do."""

    def __init__(self, decoder: Any, max_waiting: int) -> None:
        from orthrus_fast.server.app import ServerSettings
        from orthrus_fast.server.front import Front

        self._decoder = decoder
        self._settings = ServerSettings("model", "fp_benchmark", max_waiting=max_waiting)
        listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.port = int(listener.getsockname()[1])
        self._front = Front(listener, drain_seconds=5)

    def __enter__(self) -> Served:
        assert self._front.start(self._decoder, self._settings), "the front did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._front.end()
        self._front.decode()
        self._front.join()

    def during(self, clients: Callable[[], Result]) -> Result:
        """Serve while ``clients`` runs in another thread; its result."""
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(clients)
            running.add_done_callback(lambda _: self._front.pause())
            self._front.decode()
            return running.result()


class Comparison:
    """Prompts with the texts that the decoder gives to them alone."""

    def __init__(self, decoder: Any, n_requests: int, max_tokens: int) -> None:
        lines = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
        chats = [line["messages"] for line in lines if "messages" in line]
        self.decoder, self.max_tokens = decoder, max_tokens
        self.prompts = [chats[i % len(chats)] for i in range(n_requests)]
        # Without drafts, so that the engine learns nothing of them before they are replayed.
        self.results = decoder.generate(self.prompts, max_tokens, mode="ar")
        self.texts = [result.text for result in self.results]

    @contextlib.contextmanager
    def replayed(self, tokens_per_cycle: float | None) -> Iterator[None]:
        """Within, drafts are right so often that cycles give so many tokens; None: as they are."""
        if tokens_per_cycle is None:
            yield
            return
        runner, width = self.decoder.engine.runner, self.decoder.block_width
        replay = Replay(runner, width, share_of_right_drafts(tokens_per_cycle, width), seed=0)
        known: dict[tuple[int, ...], Any] = {}
        for prompt, result in zip(self.prompts, self.results, strict=True):
            ids = self.decoder.encode(prompt)
            known[tuple(ids)] = torch.tensor(ids + result.tokens, device=runner.device)

        def open_slot(slot: int, prompt: list[int], *how: Any) -> None:
            replay.set_text(slot, known[tuple(prompt)])
            type(runner).open(runner, slot, prompt, *how)

        with patched(runner, draft=replay.draft, open=open_slot):
            yield

    def bare(self, one_by_one: bool) -> Result:
        """The engine alone: a request after another, or as many as there are slots."""
        begin, cpu = time.perf_counter(), time.thread_time()
        if one_by_one:
            results = [self.decoder.generate(one, self.max_tokens) for one in self.prompts]
        else:
            results = [one for _, one in self.decoder.as_completed(self.prompts, self.max_tokens)]
        seconds, cpu = time.perf_counter() - begin, time.thread_time() - cpu
        firsts = [result.stats.time_to_first_token for result in results]
        n_tokens = sum(len(result.tokens) for result in results)
        return {"rate": n_tokens / seconds, "cpu": cpu, "first": firsts}

    def by_clients(
        self, served: Served, n_clients: int, rate: float | None = None, leaving: bool = False
    ) -> Result:
        """The same requests of clients; with ``leaving`` a third of them leave early."""
        settings = {"stream": True, "temperature": 0, "max_tokens": self.max_tokens}
        bodies = [json.dumps({**settings, "messages": one}) for one in self.prompts]
        after = [1 + i % 4 if leaving and i % 3 == 0 else None for i in range(len(bodies))]
        order: Result = {"port": served.port, "clients": n_clients, "rate": rate}
        order |= {"bodies": bodies, "leave_after": after}
        result = served.during(lambda: in_another_process(order))
        answers = result["answers"]
        assert all(one["status"] == 200 for one in answers), "a request was refused"
        stayed = [one for one, leave in zip(answers, after, strict=True) if leave is None]
        assert all(one["whole"] for one in stayed), "a text did not end"
        pairs = zip(answers, self.texts, after, strict=True)
        result["wrong"] = sum(
            one["text"] != text if leave is None else not text.startswith(one["text"])
            for one, text, leave in pairs
        )
        result["stayed"] = stayed
        return result


def milliseconds(seconds: Sequence[float]) -> Result:
    """The summary of some times, with the 95th percentile that such reports have."""
    ordered = sorted(1e3 * one for one in seconds)
    return {**summary(ordered), "p95": ordered[round(0.95 * (len(ordered) - 1))]}


def described(result: Result) -> Result:
    """Figures of one round of clients; times in ms."""
    stayed = result["stayed"]
    return {
        "requests_per_second": len(result["answers"]) / result["seconds"],
        "tokens_per_second": sum(one["n_tokens"] for one in result["answers"]) / result["seconds"],
        "first_token_ms": milliseconds([one["first"] for one in stayed]),
        "gap_ms": milliseconds([gap for one in stayed for gap in one["gaps"]]),
        "request_ms": milliseconds([one["seconds"] for one in stayed]),
        "slowest_over_median": max(one["seconds"] for one in stayed)
        / statistics.median(one["seconds"] for one in stayed),
        "texts_that_differ": result["wrong"],
    }


def in_another_process(order: Result) -> Result:
    """What the clients' process says."""
    command = [sys.executable, __file__, "--clients-process"]
    text = json.dumps(order)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    said: Result = json.loads(done.stdout)
    return said


def at_once(compared: Comparison, served: Served, n_clients: int, rounds: int) -> Result:
    """A closed loop against the bare engine, in alternating rounds."""
    log(f"{n_clients} clients")
    bare, clients = [], []
    for _ in range(rounds):
        bare.append(compared.bare(one_by_one=n_clients == 1))
        before = time.thread_time()
        clients.append(described(compared.by_clients(served, n_clients)))
        clients[-1]["cpu"] = time.thread_time() - before
    ratios = [c["tokens_per_second"] / b["rate"] for b, c in zip(bare, clients, strict=True)]
    of_cpu = [b["cpu"] / c.pop("cpu") for b, c in zip(bare, clients, strict=True)]
    middle = sorted(clients, key=lambda one: one["tokens_per_second"])[len(clients) // 2]
    result = {"clients": n_clients, **middle, "server_over_engine": summary(ratios)}
    result["server_over_engine_by_cpu_time"] = summary(of_cpu)
    result["engine_tokens_per_second"] = summary([one["rate"] for one in bare])
    if n_clients == 1:
        firsts = [first for one in bare for first in one["first"]]
        result["engine_first_token_ms"] = milliseconds(firsts)
    return result


def wait_for_the_end(decoder: Any) -> Result:
    """Until the engine has nothing left of clients that have gone."""
    begin = time.perf_counter()
    while decoder.engine.has_work:
        assert time.perf_counter() - begin < 10, "a request is stuck"
        time.sleep(0.01)
    return {}


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(description=str(__doc__).partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--clients-process", action="store_true", help=argparse.SUPPRESS)
    add("--checkpoint", metavar="DIR_OR_REPO", help="(default: the embedded one)")
    add("--device", metavar="D", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    clients = "numbers of clients, of closed loops"
    add("--clients", type=positives, default=[1, 8, 32, 64], metavar="N,…", help=clients)
    add("--accept", type=float, metavar="N", help="tokens per cycle of drafts that are replayed")
    add_load_flags(parser, requests=64, rounds=3)
    parser.set_defaults(shape=None, block_size=None, prompts_file=None)
    return parser


def add_load_flags(parser: Parser, requests: int, rounds: int) -> None:
    """Add the flags of any load, with the defaults of so many requests and rounds."""
    add = parser.add_argument
    add("--slots", type=positive, default=8, metavar="B")
    add("--requests", type=positive, default=requests, metavar="N", help="in a round")
    add("--new-tokens", type=positive, default=96, metavar="N", help="of a request at most")
    add("--rounds", type=positive, default=rounds, metavar="N")
    add("--json", metavar="FILE", help="where the results go; no file may be there yet")


def measure(args: argparse.Namespace, report: Report) -> Result:
    """Measure closed loops, then an open one."""
    import orthrus_fast

    options = {"device": args.device, "slots": args.slots, "prefix_reuse": False}
    decoder = orthrus_fast.load(args.checkpoint, **options)
    report.describe(decoder.configuration)
    compared = Comparison(decoder, args.requests, args.new_tokens)
    part: Result = {"requests": args.requests, "new_tokens": args.new_tokens, "at": []}
    with compared.replayed(args.accept), Served(decoder, max_waiting=1000) as served:
        for n_clients in args.clients:
            part["at"].append(at_once(compared, served, n_clients, args.rounds))
            report.add("parts", "serving", part)
        rate = part["at"][-1]["requests_per_second"] / 2
        log(f"an open loop of {rate:.2f} requests/s, of whose clients a third leave")
        leaving = compared.by_clients(served, 0, rate, leaving=True)
        part["open_loop"] = {"rate": rate, **described(leaving)}
        report.add("parts", "serving", part)
        served.during(lambda: wait_for_the_end(decoder))
    return part


def main() -> int:
    """Measure and print."""
    parser = build_parser()
    try:
        args = parser.parse_args()
        if args.clients_process:
            json.dump(run_clients(json.load(sys.stdin)), sys.stdout)
            return 0
        check_flags(args)
        part = measure(args, Report("python benchmarks/serving.py", parser, args))
    except OrthrusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(Console(), "clients", [*part["at"], {"clients": "open loop", **part["open_loop"]}])
    return 0


if __name__ == "__main__":
    sys.exit(main())
