"""Runners: three ways to run the same steps.

``eager`` runs them as they stand. ``compiled`` puts them through torch.compile, once for blocks of
any width. ``graph`` captures two CUDA graphs a width, one that drafts and one that verifies,
accepts and commits; AR decoding replays the second alone, of one row. What a cycle emitted reaches
the host through a mailbox, so that a GPU can be a cycle ahead of whoever reads.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import struct
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from orthrus_fast import steps
from orthrus_fast.attention import Backend
from orthrus_fast.cache import KVCache
from orthrus_fast.errors import RequestError, UnsupportedError, one_line
from orthrus_fast.kernels.interface import Kernels, Sample
from orthrus_fast.kernels.plain import PlainProducts
from orthrus_fast.kernels.select import each_compiled_once, register_custom_ops
from orthrus_fast.matching import Block
from orthrus_fast.model import Layer, PassPositions, RMSNorm, Stack, Transformer
from orthrus_fast.options import COMPILE_MODES, RUNNERS, listed
from orthrus_fast.sampling import SamplingParams

CALLS_TO_RECORD = 3  # of a function in torch's own CUDA graphs: warm-up, recording, first replay

_TORCH_FLAGS = threading.RLock()  # guards what torch itself keeps for the whole process
_log = logging.getLogger("orthrus_fast")
_T = TypeVar("_T")
_Kind = tuple[int, bool]  # of graphs: the width, and whether they sample
_Parse = Callable[[Any], "list[SlotOutput]"]  # of a report as lists


class SlotOutput(NamedTuple):
    """What one pass emitted for one slot."""

    tokens: list[int]
    n_accepted: int | None  # how many of them were proposed; None: prefill emitted them
    done: bool
    logprobs: list[float]  # of the tokens, where they were asked for; else empty


class EagerRunner:
    """Runs the steps kernel by kernel, as they are written."""

    lookahead = 0  # launches that stay unread, so that a device has work while the host reads
    prefill_widths: Sequence[int] = ()  # of the passes over a prompt; empty: any

    def __init__(self, model: Transformer, state: steps.State, cache: KVCache) -> None:
        self.model = model
        self.passes = model  # draft's and verify's, as its kernels are
        self.prefilling = model  # prefill's
        self.state = state
        self.cache = cache
        self.device = state.tokens.device
        self.seconds: dict[str, float] = {}  # what preparing took, by stage
        self.cycle_seconds: dict[int, float] = {}  # by width, where ``measure`` has timed them
        self.chunk_seconds: dict[int, float] = {}  # of passes over a prompt
        self.logits = torch.empty(0)  # [B, T, V] of the last verify pass, until the next pass
        self.eos = torch.tensor(model.config.eos_token_ids, dtype=torch.int64, device=self.device)
        # Like the state's tensors, and unlike any made in inference mode, which the compiler minds.
        self._start = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._slot = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._accept_and_commit = steps.accept_and_commit
        self._sample_block = steps.sample_block
        self._mailbox = _Mailbox(self.device)
        self._masks: Tensor | None = None  # [B, K, ceil(V / 32)] int32, once any text has a grammar

    def compile_kernels(self, widths: Sequence[int]) -> None:
        """Have what compiles kernels do so for blocks of ``widths``, and for prompts, at once."""

    def prepare(self, width: int, sampling: bool = False, masked: bool = False) -> None:
        """Make ready for blocks of ``width`` rows, ``masked`` ones by grammars; no slot moves."""

    def prepare_prefill(self) -> None:
        """Make ready for prompts in passes of a few widths, where those are faster."""

    def measure(self, widths: Sequence[int]) -> None:
        """Time cycles of prepared ``widths`` and passes over prompts, where that takes no time."""

    def ids(self, prompt: list[int]) -> Tensor:
        """The prompt [n] on the device; nothing waits for the copy."""
        pinned = self.device.type == "cuda"
        ids = torch.tensor(prompt, dtype=torch.int64, device="cpu", pin_memory=pinned)
        return ids.to(self.device, non_blocking=True)

    @torch.inference_mode()
    def open(
        self,
        slot: int,
        prompt: list[int],
        n_cached: int,
        max_length: int,
        params: SamplingParams | None = None,
        drafting: bool = False,
    ) -> None:
        """Give ``slot`` a prompt of which it has ``n_cached`` rows; cycles leave it alone.

        ``drafting``: whether the slot is to use proposals, in launches that draft.
        """
        self.state.settings.put(slot, params or SamplingParams())
        if self._masks is not None:
            self._masks[slot] = -1
        steps.open_slot(self.state, slot, self.ids(prompt), n_cached, max_length, drafting)

    @torch.inference_mode()
    def copy_rows(self, source: int, target: int, begin: int, end: int) -> None:
        """Copy cache rows ``begin`` … ``end`` - 1 of one slot to another."""
        self.cache.copy_rows(source, target, begin, end)

    @torch.inference_mode()
    def prefill(self, slot: int, begin: int, end: int, width: int) -> None:
        """Launch a pass of ``width`` rows over the tokens ``begin`` … ``end`` - 1 of a prompt.

        It reports nothing, but is read as any launch.
        """
        self._prefill(slot, begin, end, width)
        self.state.length[slot] = end  # or a neighbour's cycle would write over these rows
        self._mailbox.send(None, lambda _: [])

    @torch.inference_mode()
    def start(
        self,
        slot: int,
        begin: int,
        end: int,
        width: int,
        params: SamplingParams,
        mask: bytes | None = None,
    ) -> Tensor:
        """Launch the last pass over a prompt and its first new token -> the token's logits [V].

        From then on cycles move the slot; one with a ``mask`` of that token, those alone that bring
        a block of its.
        """
        hidden = self._prefill(slot, begin, end, width)
        with full_precision_matmul(self.device):
            logits = self.model.greedy(hidden[0, end - 1 - begin], return_logits=True)[1]
            if mask is not None:
                logits = steps.constrain(logits, self._bits([mask])[0])[1]
            sample = self._sample(params.temperature > 0)
            first = steps.first_token(self.state, slot, logits, end, sample)
            steps.start_sequence(self.state, slot, end, first, self.eos)
            report = [first, self.state.done[slot].long()]
            if params.logprobs:
                bits = self.passes.kernels.logprobs(logits, first).view(torch.int32)
                report.append(bits.long())
        self._mailbox.send(torch.stack(report), _parse_first)
        if mask is not None:
            self.state.done[slot] = True
        return logits

    def _prefill(self, slot: int, begin: int, end: int, width: int) -> Tensor:
        """A pass over a part of the slot's text -> hidden [1, W, hidden_size], until the next."""
        with full_precision_matmul(self.device):
            # What follows ``end`` in the slot's text is as good a padding as any. A copy, because
            # the compiler would make another artifact for a view.
            tokens = self.state.tokens[slot, begin : begin + width].clone()
            return self.prefill_chunk(tokens[None], begin, slot)

    def prefill_chunk(self, tokens: Tensor, start: int, slot: int) -> Tensor:
        """One pass over tokens [1, W] of a prompt -> hidden [1, W, hidden_size], until the next.

        Padding at the end may be any token: it lands in scratch rows.
        """
        where = self._start.fill_(start), self._slot.fill_(slot)
        return self.prefilling(tokens, *where, self.cache, self.model.verifier)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def resume(self, slot: int, tokens: list[int], masked: bool = False) -> None:
        """Let cycles go on after ``tokens``, all but the last of which ``slot`` has in its cache.

        The slot has been opened for their prompt. A ``masked`` one waits for a block of its own.
        """
        steps.start_sequence(self.state, slot, len(tokens) - 1, self.ids(tokens)[-1], self.eos)
        if masked:
            self.state.done[slot] = True

    @torch.inference_mode()
    def close(self, slot: int) -> None:
        """End a slot from the host's side: what a stop string does."""
        self.state.done[slot] = True

    @property
    def in_flight(self) -> int:
        """Launches that have not been read yet."""
        return len(self._mailbox)

    @torch.inference_mode()
    def launch(
        self,
        drafting: bool,
        width: int,
        sampling: bool = False,
        blocks: Mapping[int, Block] | None = None,
        is_ahead: bool = False,
    ) -> None:
        """Draft, if ``drafting``, then verify, accept and commit, for all slots at once.

        Blocks have ``width`` rows. A slot that ``open`` gave no ``drafting`` emits one token. Slots
        under a grammar move only with ``blocks`` of their own, drafts and masks. Where ``propose``
        has verified what the drafts are part of, ``is_ahead``, only the slots of ``blocks`` move.
        """
        blocks = blocks or {}
        parse = partial(_parse_cycle, sampling=sampling)
        with full_precision_matmul(self.device):
            if drafting and width > 1:
                self.draft(width, sampling)
            if is_ahead:
                with self._nothing_moves():
                    self._put(blocks, width)
                    self._mailbox.send(self.judge(width, sampling), parse)
                return
            self._put(blocks, width)
            self._mailbox.send(self.verify(width, sampling, bool(blocks)), parse)
            for slot in blocks:
                self.state.done[slot] = True

    @torch.inference_mode()
    def propose(
        self, width: int, sampling: bool = False, drafting: bool = True, ahead: bool = False
    ) -> None:
        """Launch a draft pass of blocks of ``width``, which reports each slot's proposals.

        ``ahead``: then the verify pass over them, which a launch with masks is to follow, before
        any other cycle. Without ``drafting`` that is all.
        """
        n_proposals = width - 1 if drafting else 0
        with full_precision_matmul(self.device):
            if drafting:
                self.draft(width, sampling)
            self._mailbox.send(self.state.proposals[:, :n_proposals], _parse_proposals)
            if ahead:
                self.score(width)

    @contextlib.contextmanager
    def _nothing_moves(self) -> Iterator[None]:
        """Every slot is done within, but for what is started there."""
        done = self.state.done.clone()
        self.state.done.fill_(True)
        try:
            yield
        finally:
            self.state.done.copy_(done)

    def _put(self, blocks: Mapping[int, Block], width: int) -> None:
        """Give slots their blocks, and let them move."""
        for slot, block in blocks.items():
            drafts = self.ids(block.drafts_for(width))
            self.state.proposals[slot, : width - 1] = drafts
            self._allocated_masks()[slot, : len(block.masks)] = self._bits(block.masks)
            self.state.done[slot] = False

    def _bits(self, masks: list[bytes]) -> Tensor:
        """Masks [n, ceil(V / 32)] int32 on the device; nothing waits for the copy."""
        bits = torch.frombuffer(bytearray().join(masks), dtype=torch.int32)
        bits = bits.view(len(masks), -1)[:, : self._mask_words].contiguous()
        bits = bits.pin_memory() if self.device.type == "cuda" else bits
        return bits.to(self.device, non_blocking=True)

    @property
    def _mask_words(self) -> int:
        return -(-self.model.config.vocab_size // 32)

    def _allocated_masks(self) -> Tensor:
        if self._masks is None:
            n_slots, n_proposals = self.state.proposals.shape
            shape = n_slots, n_proposals + 1, self._mask_words
            self._masks = torch.full(shape, -1, dtype=torch.int32, device=self.device)
        return self._masks

    @property
    def has_arrived(self) -> bool:
        """Whether the oldest unread launch has ended while the host did something else."""
        return self._mailbox.has_arrived

    def read(self) -> list[SlotOutput]:
        """What the oldest unread launch emitted; waits for it.

        A cycle's is a list entry per slot; that of a prompt's last pass is one; others are empty.
        """
        return self._mailbox.receive()

    def drain(self) -> None:
        """Wait for the launches in flight, and forget what they emitted."""
        while self.in_flight:
            self._mailbox.receive()

    def draft(self, width: int, sampling: bool = False) -> None:
        """One draft pass over blocks of ``width``: proposals for every slot."""
        mask = self.model.config.mask_token_id
        assert mask is not None  # the decoder refuses to draft without the draft view
        sample = self._sample(sampling)
        tokens = partial(self._sample_block, sample=sample) if sample else None
        steps.draft(self.passes, self.cache, self.state, mask, width, tokens)

    def verify(self, width: int, sampling: bool = False, masked: bool = False) -> Tensor:
        """One verify pass and what follows it -> ``steps.accept_and_commit``'s report."""
        block = steps.make_block(self.state, width)
        greedy, self.logits = steps.verify(self.passes, self.cache, self.state, block)
        if masked:
            return EagerRunner.judge(self, width, sampling)  # and no replay of a graph's
        return self._accept(block, greedy, self.logits, sampling)

    def score(self, width: int) -> None:
        """A verify pass alone: it leaves ``logits``."""
        block = steps.make_block(self.state, width)
        self.logits = steps.verify(self.passes, self.cache, self.state, block)[1]

    def judge(self, width: int, sampling: bool = False) -> Tensor:
        """What follows ``score`` under grammars -> ``steps.accept_and_commit``'s report."""
        greedy, logits = steps.constrain(self.logits, self._allocated_masks()[:, :width])
        return self._accept(steps.make_block(self.state, width), greedy, logits, sampling)

    def _accept(self, block: Tensor, greedy: Tensor, logits: Tensor, sampling: bool) -> Tensor:
        return self._accept_and_commit(
            self.state,
            block,
            greedy,
            logits,
            self.eos,
            self._sample(sampling),
            self.passes.kernels.logprobs,
            self.passes.kernels.commit_accepted,
        )

    def _sample(self, sampling: bool) -> Sample | None:
        return self.passes.kernels.sample if sampling else None


def _parse_cycle(report: list[list[int]], sampling: bool) -> list[SlotOutput]:
    """``steps.accept_and_commit``'s report, a row for each slot."""
    outputs = []
    for row in report:
        width = (len(row) - 3) // 2 if sampling else len(row) - 3
        n_new, n_accepted, done = row[width : width + 3]
        logprobs = _floats(row[width + 3 :][:n_new])
        outputs.append(SlotOutput(row[:n_new], n_accepted, bool(done), logprobs))
    return outputs


def _parse_proposals(report: list[list[int]]) -> list[SlotOutput]:
    """Proposals, a row for each slot."""
    return [SlotOutput(row, None, False, []) for row in report]


def _parse_first(report: list[int]) -> list[SlotOutput]:
    """The report of ``EagerRunner.start``."""
    token, done, *bits = report
    return [SlotOutput([token], None, bool(done), _floats(bits))]


def _floats(bits: list[int]) -> list[float]:
    """float32 numbers by their bits as int32."""
    return list(struct.unpack(f"{len(bits)}f", struct.pack(f"{len(bits)}i", *bits)))


class CompiledRunner(EagerRunner):
    """Runs the steps through torch.compile: one artifact for each view, for blocks of any width."""

    def __init__(
        self,
        model: Transformer,
        state: steps.State,
        cache: KVCache,
        kernels: Kernels,
        compile_mode: str = "default",
    ) -> None:
        super().__init__(model, state, cache)
        self._options = compiler_options(compile_mode)
        trees = bool(self._options["triton.cudagraphs"])
        self._cudagraph_trees = trees and self.device.type != "cpu"
        self._prepared: set[tuple[int, bool]] = set()
        if not self._compiles:
            self.passes = copy.copy(model)
            self.passes.kernels = kernels
            return
        self.passes = model.compiled(kernels, self._compile)
        if self.device.type == "cpu":  # where the eager layers' bits are others
            self.prefilling = self.passes
        state_and = (None, "BT", "BT", "BTV")
        self._accept_and_commit = self._compile(steps.accept_and_commit, *state_and)
        self._sample_block = self._compile(steps.sample_block, None, "BTV")

    @property
    def _compiles(self) -> bool:
        return True

    def _compile(self, function: Callable[..., _T], *sizes: Any) -> Callable[..., _T]:
        """``function`` compiled once for all R and T that ``sizes`` name, for exact other shapes.

        ``sizes`` has a letter for each dimension of each tensor among the first arguments.
        """
        options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "options": self._options}
        compiled = torch.compile(function, **options)

        def call(*arguments: Any, **named: Any) -> _T:
            _mark_varying(arguments, sizes)
            return compiled(*arguments, **named)

        return call

    @torch.inference_mode()
    def prepare(self, width: int, sampling: bool = False, masked: bool = False) -> None:
        """Compile what blocks of ``width`` rows need. Raises UnsupportedError where that fails.

        No slot moves: requests may be on their way. Masks are applied by what is not compiled.
        """
        # Blocks of one row have no draft; torch's own graphs are recorded for each size.
        kind = (width if self._per_width else min(width, 2), sampling)
        if kind in self._prepared:
            return
        _log.info("compiling for blocks of %d%s", width, ", sampling" if sampling else "")
        with (
            self._timed("compile"),
            compiler_limits(),
            full_precision_matmul(self.device),
            self._nothing_moves(),
        ):
            self._warm_up(width, sampling)
        self._prepared.add(kind)

    @property
    def _per_width(self) -> bool:
        """Whether each width needs to be warmed up."""
        return self._cudagraph_trees or not isinstance(self.model.kernels.products, PlainProducts)

    def _warm_up(self, width: int, sampling: bool) -> None:
        """Run each step once, so that torch.compile does its work."""
        with _compiler_errors(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TensorFloat32")  # left off on purpose
            for _ in range(CALLS_TO_RECORD if self._cudagraph_trees else 1):
                if self._drafts_at(width):
                    CompiledRunner.draft(self, width, sampling)
                CompiledRunner.verify(self, width, sampling)

    @torch.inference_mode()
    def compile_kernels(self, widths: Sequence[int]) -> None:
        """Have Triton compile side by side what passes would compile one after the other.

        Widths ascend; the widest comes first.
        """
        products = self.model.kernels.products
        if isinstance(products, PlainProducts):
            return
        *others, widest = widths
        jobs = [*self._block_jobs(widest), *self._prefill_jobs()]
        jobs += [] if self._compiles else [self._commit_job(widest)]
        jobs += [job for width in others for job in self._block_jobs(width)]

        @torch.inference_mode()
        def run(job: Callable[[], object]) -> None:
            with torch.cuda.device(self.device):
                torch.zeros(1, device=self.device)  # or there is no context in a new thread
                once(job)

        exchange = getattr(products, "exchange", None)  # with other GPUs, which take no part
        alone = contextlib.nullcontext() if exchange is None else exchange.rehearsal()
        with (
            self._timed("compile"),
            _compiler_errors(),
            full_precision_matmul(self.device),
            alone,
            each_compiled_once() as once,
            ThreadPoolExecutor(os.cpu_count()) as pool,
        ):
            list(pool.map(run, jobs))

    def _block_jobs(self, width: int) -> list[Callable[[], object]]:
        """What launches each kernel of a pass over blocks of ``width``.

        Where the rows sit is computed here: a job may skip launches (``each_compiled_once``).
        """
        model, state = self.model, self.state
        x, at = model.embed(state.anchor[:, None].expand(-1, width), state.length, state.slots)
        # Verification is causal and keeps the logits, the draft neither.
        jobs = self._layer_jobs(model.verifier, x, at)
        jobs.append(partial(model.greedy, x, True))
        if self._drafts_at(width):
            assert model.drafter is not None
            jobs += self._layer_jobs(model.drafter, x, at)
            jobs.append(partial(model.greedy, x, False, model.drafter))
        return jobs

    def _commit_job(self, width: int) -> Callable[[], object]:
        """What launches what follows a pass, while no slot moves."""
        block = steps.make_block(self.state, width)
        shape = (*block.shape, self.model.config.vocab_size)
        logits = self.model.embed_tokens.weight.new_empty(shape)
        return partial(self._accept, block, torch.zeros_like(block), logits, False)

    def _prefill_jobs(self) -> list[Callable[[], object]]:
        """What launches each kernel of passes over prompts."""
        model, jobs = self.model, []
        for width in self._fitting_widths():
            tokens = self._slot.new_zeros(1, width)
            jobs += self._layer_jobs(model.verifier, *model.embed(tokens, self._start, self._slot))
        return jobs

    def _fitting_widths(self) -> list[int]:
        """Those of passes over prompts."""
        return [width for width in steps.PREFILL_WIDTHS if width <= self.cache.capacity]

    def _layer_jobs(self, stack: Stack, x: Tensor, at: PassPositions) -> list[Callable[[], object]]:
        """The halves of a layer, each with the norms that may follow; and the very first norm."""
        layer, kernels = stack.layers[0], self.model.kernels
        assert isinstance(layer, Layer)
        caches = (self.cache.k[0], self.cache.v[0])
        after_attention = (layer.mlp_norm, layer.mlp.gate_up.weight)
        before_attention = (layer.attention_norm, layer.attention.qkv.weight)

        def add(update: Tensor, norm: RMSNorm, *prefetch: Tensor) -> None:
            kernels.add_norm(x, update, norm.weight, norm.eps, *prefetch)

        def attention() -> None:
            add(layer.attention(x, at, *caches, kernels, layer.causal), *after_attention)

        def mlp() -> None:
            update = layer.mlp(x, kernels)
            add(update, *before_attention)
            add(update, stack.norm)

        return [attention, mlp, partial(add, torch.zeros_like(x)[None], *before_attention)]

    def _drafts_at(self, width: int) -> bool:
        return self.model.has_draft_view and width > 1

    @torch.inference_mode()
    def launch(
        self,
        drafting: bool,
        width: int,
        sampling: bool = False,
        blocks: Mapping[int, Block] | None = None,
        is_ahead: bool = False,
    ) -> None:
        with compiler_limits():  # torch compiles anew where its global settings have changed
            super().launch(drafting, width, sampling, blocks, is_ahead)

    @torch.inference_mode()
    def propose(
        self, width: int, sampling: bool = False, drafting: bool = True, ahead: bool = False
    ) -> None:
        with compiler_limits():
            super().propose(width, sampling, drafting, ahead)

    def prefill_chunk(self, tokens: Tensor, start: int, slot: int) -> Tensor:
        with compiler_limits():
            return super().prefill_chunk(tokens, start, slot)

    def draft(self, width: int, sampling: bool = False) -> None:
        self._begin_pass()
        super().draft(width, sampling)

    def verify(self, width: int, sampling: bool = False, masked: bool = False) -> Tensor:
        self._begin_pass()
        return super().verify(width, sampling, masked)

    def _begin_pass(self) -> None:
        """Torch's own graphs may reuse the memory of the last pass, but not of this one."""
        if self._cudagraph_trees:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin


class GraphRunner(CompiledRunner):
    """Replays the steps from CUDA graphs, a cycle ahead of the reader.

    Custom kernels are captured as they stand: they leave nothing to a compiler.
    """

    lookahead = 1

    def __init__(
        self, model: Transformer, state: steps.State, cache: KVCache, kernels: Kernels
    ) -> None:
        super().__init__(model, state, cache, kernels)
        # What one graph of a pool has computed may be written over by the replay of any other. Only
        # scores have to outlast one: a pass over a prompt may come before they are judged.
        self._pool, self._score_pool = (torch.cuda.graph_pool_handle() for _ in range(2))
        self._stream: torch.cuda.Stream | None = None
        self._draft_graphs: dict[_Kind, torch.cuda.CUDAGraph] = {}
        self._verify_graphs: dict[_Kind, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._score_graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._judge_graphs: dict[_Kind, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._prefill_graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._prefill_inputs = (  # tokens, start, slot: of every prefill graph
            torch.zeros(1, steps.PREFILL_CHUNK, dtype=torch.int64, device=self.device),
            self._start,
            self._slot,
        )

    @property
    def _compiles(self) -> bool:
        return isinstance(self.model.kernels.products, PlainProducts)

    @property
    def _per_width(self) -> bool:
        return True  # the libraries, too, choose kernels by width, and load them at the first call

    @torch.inference_mode()
    def prepare(self, width: int, sampling: bool = False, masked: bool = False) -> None:
        """Compile and capture for blocks of ``width`` rows."""
        key = width, sampling
        if key in (self._judge_graphs if masked else self._verify_graphs):  # captured last
            return
        super().prepare(width, sampling)
        _log.info("capturing CUDA graphs for blocks of %d", width)
        with self._timed("capture"), full_precision_matmul(self.device), self._nothing_moves():
            if self._drafts_at(width) and key not in self._draft_graphs:
                self._draft_graphs[key], _ = self._capture(lambda: EagerRunner.draft(self, *key))
            if masked:
                self._capture_masked(width, sampling)
                return
            graph, report = self._capture(lambda: EagerRunner.verify(self, *key))
            self._verify_graphs[key] = graph, report, self.logits

    def _capture_masked(self, width: int, sampling: bool) -> None:
        """A pass and, apart from it, what follows once there are masks."""
        self._allocated_masks()  # outside the graphs, which share it
        if width not in self._score_graphs:
            score = partial(EagerRunner.score, self, width)
            graph, _ = self._capture(score, self._score_pool)
            self._score_graphs[width] = graph, self.logits
        _, self.logits = self._score_graphs[width]
        judge = partial(EagerRunner.judge, self, width, sampling)
        self._judge_graphs[width, sampling] = self._capture(judge)

    @torch.inference_mode()
    def prepare_prefill(self) -> None:
        """Capture passes over a prompt, each of whose graphs keeps its output."""
        _log.info("capturing CUDA graphs of passes over a prompt")
        (tokens, *where), how = self._prefill_inputs, (self.cache, self.model.verifier)
        widths = self._fitting_widths()
        passes = [partial(self.model, tokens[:, :width], *where, *how) for width in widths]
        with full_precision_matmul(self.device):
            with self._timed("compile"):
                for run in passes:
                    run()
            with self._timed("capture"):
                for width, run in zip(widths, passes, strict=True):
                    self._prefill_graphs[width] = self._capture(run)
        self.prefill_widths = widths

    @torch.inference_mode()
    def measure(self, widths: Sequence[int]) -> None:
        """Time cycles of ``widths`` and passes over prompts, while no slot is in use."""
        tokens = self.state.tokens[:1]
        with self._timed("measure"), full_precision_matmul(self.device):
            for width in widths:
                self.cycle_seconds[width] = self._seconds_of(partial(self._cycle, width))
            for width in self.prefill_widths:
                chunk = partial(self.prefill_chunk, tokens[:, :width], 0, 0)
                self.chunk_seconds[width] = self._seconds_of(chunk)

    def _cycle(self, width: int) -> None:
        if self._drafts_at(width):
            self.draft(width)
        self.verify(width)

    def _seconds_of(self, step: Callable[[], object], repeats: int = 2) -> float:
        torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        torch.cuda.synchronize(self.device)
        return (time.perf_counter() - begin) / repeats

    def _capture(self, step: Callable[[], _T], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, _T]:
        graph = torch.cuda.CUDAGraph()
        if self._stream is None:  # torch's own is of one device, whichever captured first
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        how: dict[str, Any] = {"pool": pool or self._pool, "stream": self._stream}
        with torch.cuda.graph(graph, capture_error_mode="thread_local", **how):
            out = step()
        return graph, out

    def draft(self, width: int, sampling: bool = False) -> None:
        self._draft_graphs[width, sampling].replay()

    def verify(self, width: int, sampling: bool = False, masked: bool = False) -> Tensor:
        if masked:
            GraphRunner.score(self, width)
            return GraphRunner.judge(self, width, sampling)
        graph, report, self.logits = self._verify_graphs[width, sampling]
        graph.replay()
        return report

    def score(self, width: int) -> None:
        graph, self.logits = self._score_graphs[width]
        graph.replay()

    def judge(self, width: int, sampling: bool = False) -> Tensor:
        graph, report = self._judge_graphs[width, sampling]
        graph.replay()
        return report

    def prefill_chunk(self, tokens: Tensor, start: int, slot: int) -> Tensor:
        width = tokens.shape[1]
        if width not in self._prefill_graphs:
            return super().prefill_chunk(tokens, start, slot)
        held, at, where = self._prefill_inputs
        held[:, :width].copy_(tokens)
        at.fill_(start)
        where.fill_(slot)
        graph, hidden = self._prefill_graphs[width]
        graph.replay()
        return hidden


def _mark_varying(arguments: Sequence[Any], sizes: Sequence[Any]) -> None:
    """Tell the compiler to know nothing of the dimensions R and T of these arguments."""
    for value, names in zip(arguments, sizes, strict=False):
        if isinstance(names, tuple):
            _mark_varying(value, names)
        elif names and not hasattr(value, "_dynamo_unbacked_indices"):
            for dim, name in enumerate(names):
                if name in "RT":
                    torch._dynamo.decorators.mark_unbacked(value, dim, shape_id=name)


class _Mailbox:
    """Reports on their way to the host, oldest first, each with the function that reads it.

    From a GPU they travel through a ring of pinned buffers, each with its event, copied outside the
    graphs; so only so many may be unread. A buffer grows to the longest report that it has had. A
    launch that reports nothing has an event alone.
    """

    RING = 3  # the most that are unread: a cycle, then a draft pass and the cycle after it

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._unread: deque[tuple[Tensor | None, torch.cuda.Event | None, _Parse]] = deque()
        self._ring: list[tuple[Tensor, torch.cuda.Event]] = []
        self._n_sent = 0

    def __len__(self) -> int:
        return len(self._unread)

    def send(self, report: Tensor | None, parse: _Parse) -> None:
        if self._device.type == "cpu":
            self._unread.append((report, None, parse))
            return
        buffer, event = self._entry(0 if report is None else report.numel())
        if report is not None:
            buffer = buffer[: report.numel()].view(report.shape)
            buffer.copy_(report, non_blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        self._unread.append((None if report is None else buffer, event, parse))

    @property
    def has_arrived(self) -> bool:
        """Whether nobody has to wait for the oldest; on a CPU the host is the device."""
        event = self._unread[0][1]
        return event is not None and bool(event.query())  # type: ignore[no-untyped-call]

    def receive(self) -> list[SlotOutput]:
        report, event, parse = self._unread[0]
        if event is not None:
            event.synchronize()
        outputs = parse(None if report is None else report.tolist())
        self._unread.popleft()  # only now: a Ctrl-C while waiting leaves it to be drained
        return outputs

    def _entry(self, size: int) -> tuple[Tensor, torch.cuda.Event]:
        """The next buffer, of ``size`` at least, and its event."""
        assert len(self._unread) < self.RING
        if not self._ring:
            self._ring = [(_pinned(size), torch.cuda.Event()) for _ in range(self.RING)]  # type: ignore[no-untyped-call]
        index = self._n_sent % self.RING
        buffer, event = self._ring[index]
        if len(buffer) < size:
            self._ring[index] = buffer, event = _pinned(size), event
        self._n_sent += 1
        return buffer, event


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=True)


@contextlib.contextmanager
def _compiler_errors() -> Iterator[None]:
    """Turn what torch.compile raises within into UnsupportedError."""
    remedy = "use runner 'eager'"
    try:
        yield
    except Exception as error:
        if isinstance(getattr(error, "inner_exception", error), OSError):  # its cache, importing it
            places = "TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR"
            remedy = f"set {places} to directories that can be written, or {remedy}"
        elif not isinstance(
            error, (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError)
        ):
            raise
        raise UnsupportedError(
            f"runner: torch.compile failed ({one_line(str(error))}); {remedy}"
        ) from error


def check_runner(runner: str, compile_mode: str, device: torch.device) -> str:
    """The runner's name, with ``auto`` resolved. Raises RequestError, UnsupportedError."""
    if runner not in ("auto", *RUNNERS):
        raise RequestError(f"runner: {runner!r} is not one of {listed(RUNNERS, 'auto')}")
    if compile_mode not in COMPILE_MODES:
        raise RequestError(f"compile_mode: {compile_mode!r} is not one of {listed(COMPILE_MODES)}")
    if runner == "auto":
        runner = "graph" if device.type == "cuda" else "eager"
    if runner == "graph" and device.type != "cuda":
        raise UnsupportedError(
            f"runner 'graph' needs a CUDA device, not {device}; use 'eager' or 'compiled'"
        )
    if compile_mode != "default" and runner != "compiled":
        raise UnsupportedError(
            f"compile_mode {compile_mode!r}: runner {runner!r} has none; use runner 'compiled'"
        )
    if runner != "eager":
        with _compiler_errors():
            switched_off = torch._dynamo.config.disable
        if switched_off or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
            raise UnsupportedError(
                f"runner {runner!r}: torch.compile is switched off; unset TORCHDYNAMO_DISABLE and "
                "TORCH_COMPILE_DISABLE, or use runner 'eager'"
            )
    return runner


def compiler_options(compile_mode: str) -> dict[str, Any]:
    """What torch.compile's ``mode`` stands for, as options, since it takes one or the other.

    The default picks nothing by timing. max-autotune does, so two starts may round differently.
    """
    options: dict[str, Any] = {
        "triton.cudagraphs": False,
        "deterministic": True,
        "max_autotune": False,
        "max_autotune_gemm": False,
        "max_autotune_pointwise": False,
        "coordinate_descent_tuning": False,
    }
    of_mode = torch._inductor.list_mode_options(compile_mode)
    if of_mode.get("max_autotune"):  # which these would forbid
        for name in ("deterministic", "max_autotune_gemm", "max_autotune_pointwise"):
            del options[name]
    return options | of_mode


def make_runner(
    name: str,
    model: Transformer,
    state: steps.State,
    cache: KVCache,
    backend: Backend,
    compile_mode: str = "default",
) -> EagerRunner:
    """The runner of that name, not yet prepared for any width.

    ``backend`` is the attention of ``model.kernels``.
    """
    if name == "eager":
        return EagerRunner(model, state, cache)
    kernels = model.kernels
    if name == "compiled" or isinstance(kernels.products, PlainProducts):  # a compiler sees them
        kernels = register_custom_ops(kernels, backend.custom_op())
    if name == "graph":
        return GraphRunner(model, state, cache, kernels)
    return CompiledRunner(model, state, cache, kernels, compile_mode)


def compiler_limits() -> Any:
    """Room for the artifacts of many decoders in one process; torch's own limit is 8."""
    return torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096)


@contextlib.contextmanager
def full_precision_matmul(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32 within, whatever the caller has switched on; both put back after.

    And ``device`` is current, for the kernels that start there.

    The TF32 switches are the process's, so two decoders in two threads take turns here.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with _TORCH_FLAGS, current:
        before = [backend.fp32_precision for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"
        try:
            with torch.autocast(device.type, enabled=False):
                yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
