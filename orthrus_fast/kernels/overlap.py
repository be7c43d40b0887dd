"""How the kernels of a pass overlap, on chips of compute capability 9.0 and later.

A pass is a chain of kernels, each of which needs what the one before it leaves. Programmatic
dependent launch (CUDA programming guide) starts a kernel while its predecessor still runs: it sets
itself up, and only then waits for the predecessor to be done.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels on ``device`` may start before their predecessor is done."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def release(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next kernel start, as soon as every program of this one has come here."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Until the kernels before this one are done and their writes are seen."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
