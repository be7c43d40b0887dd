"""Times replicas under Ray Serve against one server: requests a second, and the first token.

    python benchmarks/replicas.py --json result.json

`orthrus serve` on a replica's share of the cores and `orthrus serve --replicas N` on all of them
take the same requests in alternating rounds, from clients in another process; their texts must be
equal. CPU seconds are those of a server and all its children, Ray's included: on a machine that is
busy with other work they say more than requests a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # from a checkout that is not installed, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.serving import PROMPTS, add_load_flags
from orthrus_fast.bench.clocks import summary
from orthrus_fast.bench.common import REPOSITORY, Result, log
from orthrus_fast.bench.flags import Parser, check_flags, positive
from orthrus_fast.bench.results import Report
from orthrus_fast.errors import OrthrusError

WARM_UP = 8  # requests


@dataclass(frozen=True)
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    port: int

    def ask(self, n_requests: int, n_clients: int, new_tokens: int) -> Result:
        """Streamed requests of a closed loop: rate, first tokens in ms, CPU seconds, texts."""
        lines = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
        chats = [line["messages"] for line in lines if "messages" in line]
        how = {"stream": True, "temperature": 0, "max_tokens": new_tokens}
        asked = (chats[i % len(chats)] for i in range(n_requests))
        bodies = [json.dumps({**how, "messages": one}) for one in asked]
        order: Result = {"port": self.port, "clients": n_clients, "rate": None, "bodies": bodies}
        order["leave_after"] = [None] * n_requests
        command = [sys.executable, str(REPOSITORY / "benchmarks/serving.py"), "--clients-process"]
        before = cpu_seconds(self.process.pid)
        done = subprocess.run(command, input=json.dumps(order), stdout=-1, text=True, check=True)
        after = cpu_seconds(self.process.pid)
        result = json.loads(done.stdout)
        answers = result["answers"]
        assert all(one["whole"] for one in answers), "a text did not end"
        return {
            "rate": n_requests / result["seconds"],
            "first_ms": statistics.median(1e3 * one["first"] for one in answers),
            "cpu": sum(seconds - before.get(pid, 0) for pid, seconds in after.items()),
            "texts": [one["text"] for one in answers],
        }


@contextlib.contextmanager
def serving(cores: set[int], n_threads: int, *flags: str) -> Iterator[Server]:
    """`orthrus serve` on these cores; ends with the block."""
    command = [sys.executable, "-m", "orthrus_fast", "serve", "--port", "0", "--no-prefix-reuse"]
    all_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # which the process inherits
    try:
        process = subprocess.Popen(
            [*command, *flags],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": str(n_threads)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    finally:
        os.sched_setaffinity(0, all_cores)
    assert process.stdout is not None
    found = re.search(r":(\d+)/$", process.stdout.readline().strip())
    assert found is not None, "the server did not start"
    try:
        wait_for(int(found[1]))
        yield Server(process, int(found[1]))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_for(port: int) -> None:
    """Return once a server takes connections, a moment after it says that it will."""
    for _ in range(100):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.1)


def cpu_seconds(root: int) -> dict[int, float]:
    """CPU seconds by process, of a process and its children's children."""
    of: dict[int, tuple[int, float]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            ticks = int(fields[11]) + int(fields[12])
            of[int(path.parent.name)] = int(fields[1]), ticks / os.sysconf("SC_CLK_TCK")
    found = {root}
    while more := {pid for pid, (parent, _) in of.items() if parent in found} - found:
        found |= more
    return {pid: of[pid][1] for pid in found if pid in of}


def compare(one: Server, several: Server, args: argparse.Namespace) -> Result:
    """Rounds of both in turn, under load and with one client."""
    loads, firsts = [], []
    for server in (one, several):
        server.ask(WARM_UP, 4, 8)
    for _ in range(args.rounds):
        both = [s.ask(args.requests, args.clients, args.new_tokens) for s in (one, several)]
        assert both[0].pop("texts") == both[1].pop("texts"), "texts differ"
        loads.append(both)
        log(f"{both[0]['rate']:.2f} and {both[1]['rate']:.2f} requests/s")
        firsts += [[s.ask(12, 1, 2)["first_ms"] for s in (one, several)] for _ in range(2)]
    ratios = [b["rate"] / a["rate"] for a, b in loads]
    by_cpu = [args.replicas * a["cpu"] / b["cpu"] for a, b in loads]
    return {
        "requests_per_second": [summary([both[i]["rate"] for both in loads]) for i in (0, 1)],
        "several_over_one": summary(ratios),
        "several_over_one_by_cpu_time": summary(by_cpu),
        "first_token_ms": [summary([both[i] for both in firsts]) for i in (0, 1)],
        "first_token_added_ms": summary([b - a for a, b in firsts]),
        "load_average": os.getloadavg()[0],
    }


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(description=str(__doc__).partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--replicas", type=positive, default=2, metavar="N")
    add("--clients", type=positive, default=16, metavar="N", help="of a closed loop")
    add_load_flags(parser, requests=96, rounds=5)
    parser.set_defaults(shape=None, checkpoint=None, prompts_file=None)
    return parser


def measure(args: argparse.Namespace, report: Report) -> Result:
    """Measure on a CPU, with the embedded checkpoint."""
    import orthrus_fast

    report.describe(orthrus_fast.load(device="cpu").configuration)
    cores = os.sched_getaffinity(0)
    share = max(1, len(cores) // args.replicas)
    flags = ("--device", "cpu", "--slots", str(args.slots))
    more = ("--replicas", str(args.replicas))
    begin = time.perf_counter()
    with (
        serving(set(sorted(cores)[:share]), share, *flags) as one,
        serving(cores, share, *flags, *more) as several,
    ):
        log(f"started after {time.perf_counter() - begin:.1f} s")
        result = compare(one, several, args)
    report.add("parts", "replicas", result)
    return result


def main() -> int:
    """Measure and print."""
    parser = build_parser()
    try:
        args = parser.parse_args()
        check_flags(args)
        result = measure(args, Report("python benchmarks/replicas.py", parser, args))
    except OrthrusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in ("several_over_one", "several_over_one_by_cpu_time", "first_token_added_ms"):
        of = result[name]
        print(f"{name}: {of['median']:.2f} ({of['p10']:.2f} to {of['p90']:.2f}, n = {of['n']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
