"""Which kernels run on a device: Triton's where they can, plain PyTorch's elsewhere."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from orthrus_fast.kernels import plain_sampling
from orthrus_fast.kernels.interface import Attend, Kernels
from orthrus_fast.kernels.plain import PlainProducts, embed, padded_linear_op, plain_kernels
from orthrus_fast.sampling import Settings


def why_no_triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps the Triton kernels from running here; None: nothing."""
    if device.type != "cuda":
        return "needs a CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs compute capability 8.0, not that of {torch.cuda.get_device_name(device)}"
    if dtype == torch.float64:
        return "has no float64"
    if head_dim not in (16, 32, 64, 128, 256):
        return f"has no head_dim {head_dim}"
    return None


def select_kernels(
    attend: Attend, device: torch.device, dtype: torch.dtype, head_dim: int
) -> Kernels:
    """The kernels to build a model with, ``attend`` among them."""
    kernels = plain_kernels(attend)
    if device.type == "cuda":  # at any dtype: the compiler's own code for it does not compile there
        from orthrus_fast.kernels.sample import logprobs, sample

        kernels = replace(kernels, sample=sample, logprobs=logprobs)
    if why_no_triton(device, dtype, head_dim):
        return kernels
    from orthrus_fast.kernels import blocks, norm, rope
    from orthrus_fast.kernels.custom import CustomProducts

    return replace(
        kernels,
        qk_norm_rope_write=rope.qk_norm_rope_write,
        add_norm=norm.add_norm,
        products=CustomProducts(),
        embed=blocks.embed,
        commit_accepted=blocks.commit_accepted,
    )


def register_custom_ops(kernels: Kernels, attend: Attend) -> Kernels:
    """The same kernels as custom operators, which a compiler calls without looking inside.

    ``attend`` is such an operator already. Of plain PyTorch the products and sampling become some,
    so that their bits are those of eager code, in which a first token is chosen; the compiler
    should see through the rest. Triton's products and sampling always are.
    """
    kernels = replace(kernels, attend=attend, embed=embed, commit_accepted=None)
    if kernels.sample is plain_sampling.sample:
        kernels = replace(kernels, sample=_sample, logprobs=_logprobs_op)
    if isinstance(kernels.products, PlainProducts):
        return replace(kernels, products=replace(kernels.products, linear=padded_linear_op))
    from orthrus_fast.kernels import norm, rope
    from orthrus_fast.kernels.custom import CompiledProducts

    return replace(
        kernels,
        qk_norm_rope_write=rope.qk_norm_rope_write_op,
        add_norm=norm.add_norm_op,
        products=CompiledProducts(),
    )


_sample_op: Any = torch.library.custom_op(
    "orthrus_fast::plain_sample",
    lambda logits, position, *settings: plain_sampling.sample(
        logits, position, Settings(*settings)
    ),
    mutates_args=(),
    schema="(Tensor logits, Tensor position, Tensor temperature, Tensor top_k, Tensor top_p, "
    "Tensor min_p, Tensor seed) -> Tensor",
)
_sample_op.register_fake(lambda logits, position, *_: torch.empty_like(position))
_logprobs_op: Any = torch.library.custom_op(
    "orthrus_fast::plain_logprobs", plain_sampling.logprobs, mutates_args=()
)
_logprobs_op.register_fake(
    lambda logits, tokens: tokens.new_empty(tokens.shape, dtype=torch.float32)
)


def _sample(logits: Tensor, position: Tensor, settings: Settings) -> Tensor:
    tokens: Tensor = _sample_op(logits, position, *settings)
    return tokens


@contextlib.contextmanager
def each_compiled_once() -> Iterator[Callable[[Callable[[], object]], None]]:
    """What runs jobs in several threads so that of all Triton kernels none is compiled twice.

    A job skips the launches of which another one has begun to compile the kernel: their results are
    nobody's. What runs in other threads knows nothing of it.
    """
    import triton

    mine, lock, taken = threading.local(), threading.Lock(), set[tuple[str, str]]()

    def run(job: Callable[[], object]) -> None:
        mine.is_job = True
        job()
        mine.is_job = False

    def skips(*, key: Any, fn: Any, **of: Any) -> bool | None:
        if not getattr(mine, "is_job", False):
            return before(key=key, fn=fn, **of) if before else None
        kernel = f"{fn.module}.{fn.name}", str(key)
        with lock:
            is_taken = kernel in taken
            taken.add(kernel)
        return is_taken

    runtime: Any = triton.knobs.runtime
    before, runtime.jit_cache_hook = runtime.jit_cache_hook, skips
    try:
        yield run
    finally:
        runtime.jit_cache_hook = before
