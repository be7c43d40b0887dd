"""What is counted while serving, for Prometheus."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric

from orthrus_fast.results import Stats
from orthrus_fast.server.jobs import Piece

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
PER_CYCLE = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        name = "orthrus_requests"
        self._requests = Counter(name, "HTTP requests", ["path", "status"], registry=registry)
        name, what = "orthrus_texts", "Texts that ended, by their reason"
        self._texts = Counter(name, what, ["reason"], registry=registry)
        name = "orthrus_prompt_tokens"
        self._prompt = Counter(name, "Tokens of prompts", registry=registry)
        name = "orthrus_reused_tokens"
        what = "Tokens of prompts whose cache rows were an earlier request's"
        self._reused = Counter(name, what, registry=registry)
        self._tokens = Counter("orthrus_tokens", "New tokens", registry=registry)
        self._cycles = Counter("orthrus_cycles", "Cycles of texts that ended", registry=registry)
        name = "orthrus_accepted"
        what = "Cycles of texts that ended whose draft was accepted at this position"
        self._accepted = Counter(name, what, ["position"], registry=registry)
        name = "orthrus_tokens_per_cycle"
        self._per_cycle = Histogram(name, "By text", buckets=PER_CYCLE, registry=registry)
        name, what = "orthrus_first_token_seconds", "From queued to the first token"
        self._first = Histogram(name, what, buckets=SECONDS, registry=registry)
        name, what = "orthrus_gap_seconds", "Between the chunks of a text"
        self._gaps = Histogram(name, what, buckets=SECONDS, registry=registry)
        self._gauges = {
            "running": Gauge("orthrus_running", "Texts that have a slot", registry=registry),
            "waiting": Gauge("orthrus_waiting", "Texts that wait for a slot", registry=registry),
        }

    def show(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Read the gauges from here."""
        self._gauges["running"].set_function(running)
        self._gauges["waiting"].set_function(waiting)

    def answered(self, path: str, status: int) -> None:
        """A request got this status. ``path`` is a route's, not what somebody typed."""
        self._requests.labels(path, str(status)).inc()

    def saw(self, piece: Piece) -> None:
        """A piece came."""
        self._tokens.inc(len(piece.chunk.tokens))
        (self._first if piece.is_first else self._gaps).observe(piece.seconds)
        if piece.result is not None:
            self._texts.labels(piece.result.finish_reason).inc()
            if piece.result.stats is not None:
                self._ended(piece.result.stats)

    def _ended(self, stats: Stats) -> None:
        self._prompt.inc(stats.prompt_tokens)
        self._reused.inc(stats.reused_tokens)
        self._cycles.inc(stats.cycles)
        if stats.tokens_per_cycle is not None:
            self._per_cycle.observe(stats.tokens_per_cycle)
        tally = Tally(stats.accepted)
        n_reached = 0
        for n_accepted in range(max(stats.accepted, default=0), 0, -1):
            n_reached += tally[n_accepted]
            self._accepted.labels(str(n_accepted)).inc(n_reached)

    def exposition(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return prometheus_client.generate_latest(self._registry)

    def collect(self) -> list[Metric]:
        """All of it, for ``merged``."""
        return list(self._registry.collect())


def merged(of_replicas: Iterable[tuple[str, list[Metric]]]) -> bytes:
    """The metrics of several processes, each with its name as the label ``replica``."""
    families: dict[str, Metric] = {}
    for replica, metrics in of_replicas:
        for one in metrics:
            family = families.setdefault(one.name, Metric(one.name, one.documentation, one.type))
            for sample in one.samples:
                labels = {**sample.labels, "replica": replica}
                family.samples.append(sample._replace(labels=labels))
    registry: Any = SimpleNamespace(collect=families.values)
    return prometheus_client.generate_latest(registry)
