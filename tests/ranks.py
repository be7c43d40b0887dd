"""Ranks of one model as threads of one process, which see each other's tensors at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from orthrus_fast import Decoder, runners
from orthrus_fast.checkpoint import load_model, open_checkpoint
from orthrus_fast.config import ModelConfig
from orthrus_fast.engine.request import Inputs, Request
from orthrus_fast.kernels.interface import Kernels
from orthrus_fast.kernels.tiled import TiledProducts
from orthrus_fast.loading import Options, build_decoder
from orthrus_fast.tensor_parallel import all_gather, gloo_group
from tests.decoders import unchecked


class End(BaseException):
    """What ends the step that a rank waits in."""


class Meeting:
    """Where threads leave a value each, and take all of them."""

    def __init__(self, n_ranks: int) -> None:
        self.n_ranks = n_ranks
        self._values: list[Any] = [None] * n_ranks
        self._barrier = threading.Barrier(n_ranks, timeout=60)

    def share(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


class ThreadRanks:
    """``tensor_parallel.Ranks`` of a thread."""

    def __init__(self, rank: int, meeting: Meeting, store: dist.Store | None) -> None:
        self.rank, self.size, self._meeting = rank, meeting.n_ranks, meeting
        self.failure: str | None = None
        self.localize: Callable[[Request], Request] = lambda request: request
        self._group = None if store is None else gloo_group(store, rank, self.size, 60)

    @staticmethod
    def alone() -> ThreadRanks:
        """The only rank."""
        return ThreadRanks(0, Meeting(1), None)

    def share(self, value: Any) -> list[Any]:
        return self._meeting.share(self.rank, value)

    def serve(self, decoder: Decoder) -> None:
        """Step with the first rank until it ends."""
        with contextlib.suppress(End):
            while True:
                decoder.engine.step()

    def end(self) -> None:
        """Let the others leave ``serve``."""
        self.share(None)

    def agree(self, inputs: Inputs) -> Inputs:
        first, *others = self.share(inputs)
        if first is None:
            raise End
        assert all(other.digest == first.digest for other in others)
        if self.rank == 0:
            return inputs
        bare = [replace(request, matcher=None) for request in first.requests]
        return first._replace(requests=list(map(self.localize, bare)))

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        yield

    def check(self) -> None: ...

    def fail(self, error: BaseException) -> BaseException:
        raise error

    def kernels(self, kernels: Kernels, *_: Any) -> Kernels:
        return replace(kernels, products=TiledProducts(self.gather))

    def all_max(self, x: Tensor) -> Tensor:
        return self.gather(x).amax(0)

    def gather(self, x: Tensor) -> Tensor:
        if self._group is None:
            return x[None]
        return all_gather(self._group, x, self.size)


def on_ranks(
    n_ranks: int, function: Callable[[ThreadRanks], Any], checked: bool = False
) -> list[Any]:
    """What ``function`` returns for each of so many ranks, each in a thread.

    Decoders are ``unchecked``, unless ``checked``: for all threads at once, since each would undo
    another's patch.
    """
    meeting = Meeting(n_ranks)
    store = dist.HashStore() if n_ranks > 1 else None

    def run(rank: int) -> Any:
        torch.set_num_threads(1)
        return function(ThreadRanks(rank, meeting, store))

    check = contextlib.nullcontext() if checked else unchecked()
    with check, pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(n_ranks) as pool:
        # Threads that wait for each other within a pass cannot take turns at it.
        patch.setattr(runners, "_TORCH_FLAGS", contextlib.nullcontext())
        return list(pool.map(run, range(n_ranks)))


def decoder_of(directory: Path, ranks: ThreadRanks, **options: Any) -> Decoder:
    """A decoder of one rank's share; of one rank, with the same products as several have."""
    checkpoint = open_checkpoint(directory)

    def make_model(config: ModelConfig, *how: Any) -> Any:
        return load_model(replace(checkpoint, config=config), *how)

    of = (checkpoint.name, checkpoint.config, make_model)
    how = Options(device="cpu", tensor_parallel=ranks.size, **options)
    decoder = build_decoder(*of, how, checkpoint, ranks=ranks)  # type: ignore[arg-type]
    ranks.localize = decoder.localize
    return decoder
