"""One model over several processes, its ranks: who they are, what they tell each other.

A rank holds its share of every weight (``config.share``) and runs the same engine as all others on
the same inputs, so they launch the same passes. Within a pass numbers go from device to device
(``kernels.symmetric``; ``Ranks.gather`` on CPUs). This is the rest: the first rank starts the
others, tells them what its engine takes in at each step, and hears at once when one has ended.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from orthrus_fast.config import ModelConfig
from orthrus_fast.engine.request import Inputs, Request
from orthrus_fast.errors import OrthrusError, RankError, RequestError, one_line
from orthrus_fast.kernels.interface import Kernels
from orthrus_fast.kernels.tiled import TiledProducts
from orthrus_fast.launch import launched

LOCALHOST = "127.0.0.1"  # all ranks are on one host
PATIENCE = 300.0  # seconds that a rank may take for a step, compiling included
# Nothing comes where Ctrl-C was faster.
_RUN = "import pickle, sys; call = sys.stdin.buffer.read(); call and pickle.loads(call)()"
_KEY = "ORTHRUS_FAST_KEY"  # by which processes that were started here know each other
_END = "end"  # what the first rank says when all went well
_log = logging.getLogger("orthrus_fast")
_T = TypeVar("_T")


class Ranks:
    """This process among the ranks of one model. Made by ``start``, on all of them.

    ``failure`` says, once a rank has ended or does not answer, which one and why: from then on
    every call raises that as a RankError. ``on_failure`` is called then, in another thread: it has
    to free whoever waits on a device for what will not come. ``localize`` makes a request of the
    first rank's one that this rank's engine can serve; None: it is asked for the same by itself.
    """

    def __init__(
        self, rank: int, size: int, store: Store, name: str = "", patience: float = PATIENCE
    ) -> None:
        self.rank, self.size, self.store, self.name = rank, size, store, name
        self.failure: str | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.localize: Callable[[Request], Request] | None = None
        self._patience = patience
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._links: dict[int, Connection] = {}  # the first rank's to all, the others' to it
        self._said: dict[int, queue.SimpleQueue[Any]] = {}
        self._busy_since: float | None = None
        self._is_over = False
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._group: ProcessGroupGloo | None = None
        self._secret: str | None = None
        self._keep: Any = None

    def connect(self) -> None:
        """Connect with the others. Raises RankError."""
        secret = os.environ.get(_KEY) if self.rank > 0 else self._secret
        if self.rank == 0:
            key = secret or secrets.token_hex(32)
            with Listener((LOCALHOST, 0), authkey=key.encode()) as listener:
                # Only processes of torchrun's, which nobody handed a key, find it in the store.
                self.store.set("address", f"{listener.address[1]} {'' if secret else key}")
                self._in_background(self._accept, listener)
                self._wait(lambda: len(self._links) == self.size - 1)
            self._in_background(self._watch)
            return
        self.store.wait(["address"], timedelta(seconds=self._patience))
        port, _, key = self.store.get("address").decode().partition(" ")
        link = Client((LOCALHOST, int(port)), authkey=(secret or key).encode())
        link.send(self.rank)
        self._add(0, link)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):  # which torchrun sends to all of them
                signal.signal(number, signal.SIG_IGN)  # the first one decides, and they end with it

    def _accept(self, listener: Listener) -> None:
        with contextlib.suppress(OSError):  # closed, because all have come or one has ended
            while True:
                with contextlib.suppress(AuthenticationError, EOFError):  # a stranger
                    link = listener.accept()
                    self._add(link.recv(), link)

    def _add(self, rank: int, link: Connection) -> None:
        with self._changed:
            self._links[rank], self._said[rank] = link, queue.SimpleQueue()
            self._changed.notify_all()
        self._in_background(self._listen, rank)

    def _in_background(self, function: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=function, args=arguments, daemon=True).start()

    def _listen(self, rank: int) -> None:
        """Take what a rank says, until it says or shows that it has ended."""
        try:
            while True:
                said = self._links[rank].recv()
                if isinstance(said, OrthrusError):
                    return self._broke(f"rank {rank}: {said}")
                if self.rank > 0 and said == _END:
                    os._exit(0)
                self._said[rank].put(said)
        except (EOFError, OSError):
            self._broke(f"rank {rank} has ended{self._exit_code(rank)}")

    def _exit_code(self, rank: int) -> str:
        if rank not in self._children:
            return ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f" with exit code {self._children[rank].wait(5)}"
        return ""

    def _watch(self) -> None:
        """See to it that no rank waits for ever, and that none ends unseen."""
        while not self._is_over and self.failure is None:
            time.sleep(min(1.0, self._patience / 4))
            since = self._busy_since
            if since is not None and time.monotonic() - since > self._patience:
                self._broke(f"a rank did not answer for {self._patience:g} s")

    def _broke(self, text: str) -> None:
        with self._lock:
            if self._is_over or self.failure is not None:
                return
            self.failure = f"tensor_parallel: {text}; load the model again"
        if self.rank > 0:
            print(f"rank {self.rank}: {text}", file=sys.stderr, flush=True)
            os._exit(1)
        self.on_failure()
        self._end_others(None)
        with self._changed:
            self._changed.notify_all()

    def _end_others(self, last_word: str | None) -> None:
        """Have the others end: by themselves after a last word, else at once."""
        if last_word is None:
            for child in self._children.values():
                child.kill()
        for link in self._links.values():
            with contextlib.suppress(OSError):
                if last_word is not None:
                    link.send(last_word)
                else:
                    link.close()

    def _wait(self, is_so: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or is_so())
        self.check()

    def check(self) -> None:
        """Raise RankError if any rank has ended."""
        if self.failure is not None:
            raise RankError(self.failure)

    def _hear(self, rank: int) -> Any:
        """The next thing that a rank says."""
        while True:
            self.check()
            with contextlib.suppress(queue.Empty):
                return self._said[rank].get(timeout=None if self.rank > 0 else 0.1)

    def _say(self, what: Any) -> None:
        """Say something to those that this rank is linked to."""
        self.check()
        message = pickle.dumps(what)
        try:
            for link in self._links.values():
                link.send_bytes(message)
        except OSError:
            self._wait(lambda: False)  # whose end the listener is about to tell

    def share(self, value: _T) -> list[_T]:
        """Each rank's value, in their order, on all of them; all wait for the last. RankError."""
        if self.rank > 0:
            self._say(value)
            values: list[_T] = self._hear(0)
            return values
        values = [value, *(self._hear(rank) for rank in range(1, self.size))]
        self._say(values)
        return values

    def agree(self, inputs: Inputs) -> Inputs:
        """What the first rank's engine takes in, on all ranks. Raises RankError.

        What another one has read must be the same, and its own requests, unless it localizes.
        """
        bare = [replace(request, matcher=None) for request in inputs.requests]
        if self.rank == 0:
            self._say(inputs._replace(requests=bare))
            return inputs
        first: Inputs = self._hear(0)
        if first.digest != inputs.digest:
            raise RankError("its passes gave other tokens than the first rank's")
        if self.localize is not None:
            return first._replace(requests=[self.localize(one) for one in first.requests])
        if first.requests != bare:
            raise RankError("it was asked for other texts than the first rank")
        return first._replace(requests=inputs.requests)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Within, a step of the engine: Ctrl-C waits for its end, for the others go on with it."""
        self.check()
        self._busy_since = time.monotonic()
        interrupted: list[Any] = []
        in_main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGINT)
        if in_main and callable(before):
            signal.signal(signal.SIGINT, lambda *of: interrupted.append(of))
        try:
            yield
        finally:
            self._busy_since = None
            if in_main and callable(before):
                signal.signal(signal.SIGINT, before)
                if interrupted:
                    before(*interrupted[-1])

    def fail(self, error: BaseException) -> RankError:
        """End all ranks after an error on this one; what to tell those that wait here."""
        known = error if isinstance(error, OrthrusError) else None
        text = str(error) if known else f"{type(error).__name__}: {one_line(str(error))}"
        if self.rank > 0:
            with contextlib.suppress(OSError):
                self._links[0].send(RankError(text))
            os._exit(1)
        self._broke(text if known else f"rank 0: {text}")
        return RankError(self.failure or text)

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        """Within, an error on one rank ends the others."""
        try:
            yield
        except BaseException as error:
            known = self.failure  # what followed from it may be anything
            self.fail(error)
            self._leave_group()
            if known is not None:
                raise RankError(known) from None
            raise

    def serve(self, step: Callable[[], object]) -> NoReturn:
        """Step whenever the first rank does, until it ends, and with it this process."""
        while True:
            step()

    def close(self) -> None:
        """End the other ranks; this process goes on without them."""
        with self._lock:
            self._is_over, self.failure = True, self.failure or "tensor_parallel: closed"
        self._end_others(_END)
        self._leave_group()

    def _leave_group(self) -> None:
        """Wait for the group's threads: the last of a tensor's owners must not outlive Python."""
        self._group = None

    def kernels(
        self,
        kernels: Kernels,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        n_rows: int,
        n_decoded: int,
    ) -> Kernels:
        """The kernels of a rank: of passes of ``n_rows`` at most, ``n_decoded`` with logits.

        Raises RequestError where logits don't divide into words, and RankError.
        """
        if device.type == "cpu":
            return replace(kernels, products=TiledProducts(self.gather))
        from orthrus_fast.kernels.symmetric import Areas, Exchange, SharedProducts

        logits_bytes = config.vocab_size * dtype.itemsize
        if logits_bytes % (4 * self.size):
            raise RequestError(
                f"tensor_parallel: {self.size} ranks of {config.vocab_size // self.size} logits "
                f"of {dtype.itemsize} bytes, which are no words of 4 bytes"
            )
        areas = Areas.of(n_rows, n_decoded, config.hidden_size, logits_bytes, self.size)
        buffers = self._symmetric_buffers(areas.n_words, device)
        exchange = Exchange(self.rank, buffers, areas, self._flag(device))
        return replace(kernels, products=SharedProducts(exchange), add_norm=exchange.add_norm)

    def _symmetric_buffers(self, n_words: int, device: torch.device) -> list[Tensor]:
        """Every rank's buffer [n_words] int32, as this one sees it, filled with ABSENT."""
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # which nothing here uses
        from torch._C._distributed_c10d import (
            ProcessGroup,
            _register_process_group,
            _SymmetricMemory,
        )

        from orthrus_fast.kernels.symmetric import ABSENT

        name: Any = self.name
        shape = ((n_words,), (1,), torch.int32)
        # Versions of torch look in one place or the other; all that they ask of it is the store.
        group = ProcessGroup(self.store, self.rank, self.size)
        _register_process_group(name, group)
        _SymmetricMemory.set_group_info(name, self.rank, self.size, self.store)
        own = _SymmetricMemory.empty_strided_p2p(*shape, device, name).fill_(ABSENT)
        torch.cuda.synchronize(device)
        self.share(None)  # or a rank would wait minutes for one that has ended
        handle = _SymmetricMemory.rendezvous(own, name)
        self._keep = group, handle, own  # torch itself keeps none of them
        views = [handle.get_buffer(rank, (n_words,), torch.int32) for rank in range(self.size)]
        self.share(None)  # nobody writes before all have filled theirs
        return views

    def _flag(self, device: torch.device) -> Tensor:
        """[1] int32, which is 0 until a rank has ended, though the device may be waiting for it."""
        flag = torch.zeros(1, dtype=torch.int32, device=device)
        one = torch.ones(1, dtype=torch.int32, device="cpu", pin_memory=True)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

        def raise_flag() -> None:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                flag.copy_(one, non_blocking=True)

        self.on_failure = raise_flag
        return flag

    def all_max(self, x: Tensor) -> Tensor:
        """The greatest of all ranks' x [...], element by element, of any device. RankError."""
        return self.gather(x.cpu()).amax(0).to(x.device)

    def gather(self, x: Tensor) -> Tensor:
        """Each rank's x [...], of a CPU -> all of them [size, ...], in order. Raises RankError."""
        try:
            if self._group is None:
                self._group = gloo_group(self.store, self.rank, self.size, self._patience)
            return all_gather(self._group, x, self.size)
        except RuntimeError as error:  # most often because a rank has ended, as the listener knows
            with self._changed:
                self._changed.wait_for(lambda: self.failure is not None, timeout=10)
            raise RankError(self.failure or one_line(str(error))) from None


def gloo_group(store: Store, rank: int, size: int, patience: float = PATIENCE) -> ProcessGroupGloo:
    """A group of processes, or threads, of this host, which no other code knows of."""
    of_group: Any = ProcessGroupGloo  # whose stubs know of no options
    options = of_group._Options()
    options._devices = [of_group.create_device(hostname=LOCALHOST)]
    options._timeout = timedelta(seconds=patience)
    group: ProcessGroupGloo = of_group(PrefixStore("gloo", store), rank, size, options)
    return group


def all_gather(group: Any, x: Tensor, size: int) -> Tensor:
    """Each rank's x [...] -> all of them [size, ...], in order."""
    out = x.new_empty(size, *x.shape)
    group.allgather([list(out)], [x.contiguous()]).wait()
    return out


def start(size: int, call: Callable[[], object] | None) -> Ranks:
    """The ranks of a model: those that torchrun has started, or else new processes.

    These make the ``call``, which is pickled. Raises RequestError where torchrun started others.
    """
    n_ranks = launched().size
    if n_ranks not in (1, size):
        raise RequestError(f"tensor_parallel: {size}, but torchrun started {n_ranks} processes")
    if n_ranks > 1:
        store, rank, _ = next(rendezvous("env://"))
        name = _name(os.environ["MASTER_PORT"], store, rank)
        ranks = Ranks(rank, size, PrefixStore(name, store), name)
        if rank > 0:
            ranks.connect()
            return ranks
    else:
        store = TCPStore(LOCALHOST, 0, is_master=True, wait_for_workers=False)
        name = _name(store.port, store, 0)
        ranks = Ranks(0, size, PrefixStore(name, store), name)
    with ranks.ending_together():
        if n_ranks == 1:
            ranks._secret = secrets.token_hex(32)
            where = {"WORLD_SIZE": size, "MASTER_ADDR": LOCALHOST, "MASTER_PORT": store.port}
            where[_KEY] = ranks._secret
            for rank in range(1, size):
                _spawn(ranks, rank, where, call)
        ranks.connect()
    return ranks


def _name(port: int | str, store: Store, rank: int) -> str:
    """That of a model on all its ranks; no other that this process loads has it."""
    return f"orthrus_fast/{port}/{store.add(f'orthrus_fast/models of {rank}', 1)}"


def _spawn(
    ranks: Ranks, rank: int, where: Mapping[str, Any], call: Callable[[], object] | None
) -> None:
    """Start a process of a session of its own, so that Ctrl-C reaches the first rank alone.

    It has as many threads as this one, whoever set them: bits of a CPU's products depend on them.
    """
    n_threads, paths = torch.get_num_threads(), os.pathsep.join(filter(None, sys.path))
    of_rank = {**where, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": n_threads}
    of_rank = {name: str(value) for name, value in of_rank.items()}
    environment = {**os.environ, **of_rank, "PYTHONPATH": paths}
    command = [sys.executable, "-c", _RUN]
    how: dict[str, Any] = {"stdin": subprocess.PIPE, "start_new_session": True}
    child = ranks._children[rank] = subprocess.Popen(command, env=environment, **how)
    ranks._in_background(_report_end, ranks, rank, child)
    assert child.stdin is not None
    with child.stdin:
        pickle.dump(call, child.stdin)


def _report_end(ranks: Ranks, rank: int, child: subprocess.Popen[bytes]) -> None:
    code = child.wait()
    time.sleep(0.2)  # it may have said why
    ranks._broke(f"rank {rank} has ended with exit code {code}")
