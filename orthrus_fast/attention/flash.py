"""FlashAttention's ``flash_attn_with_kvcache`` as a backend: version 3 on Hopper, else version 2.

It walks whole tiles of keys at fixed positions, but places the boundaries of splits by the current
length. So the causal view, whose bits must not depend on that, runs unsplit; drafts may split.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from orthrus_fast.attention import Backend
from orthrus_fast.errors import UnsupportedError
from orthrus_fast.kernels.interface import Attend

HOPPER = (9, 0)


@functools.cache  # one function, so that one custom operator is made of it
def backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """This backend, on the installed library. Raises UnsupportedError where none serves."""
    if device.type != "cuda":
        raise UnsupportedError(f"attention 'flash' needs a CUDA device, not {device.type}")
    if dtype not in (torch.bfloat16, torch.float16):
        raise UnsupportedError(f"attention 'flash' needs bfloat16 or float16, not {dtype}")
    if head_dim % 8 or head_dim > 256:
        raise UnsupportedError(f"attention 'flash' has no kernel for head_dim {head_dim}")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise UnsupportedError(f"attention 'flash' needs compute capability 8.0, not {capability}")
    attend = _attend_by(_import_library(capability, dtype))
    return Backend("flash", attend, lambda capacity: [], row_invariant=False)


def _attend_by(flash: Any) -> Attend:
    """``Attend`` by the library's ``flash_attn_with_kvcache``."""

    def attend(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        start: Tensor,
        slot: Tensor,
        prefetch: Tensor | None = None,
        *,
        causal: bool,
    ) -> Tensor:
        """See ``kernels.interface.Attend``. Reads nothing on the host."""
        out = flash(
            q,
            k_cache.transpose(1, 2),  # [B, S, n_kv_heads, head_dim]; any strides but the last's
            v_cache.transpose(1, 2),
            cache_seqlens=(start + q.shape[1]).to(torch.int32),
            cache_batch_idx=slot.to(torch.int32),
            causal=causal,  # aligned so that the last row sees the whole length
            num_splits=1 if causal else 0,  # 0: its own choice
        )
        result: Tensor = out[0] if isinstance(out, tuple) else out  # some add the log-sum-exp
        return result.contiguous()

    return attend


def _import_library(capability: tuple[int, int], dtype: torch.dtype) -> Any:
    """``flash_attn_with_kvcache`` of the best version installed. Raises UnsupportedError."""
    names = ["flash_attn"]
    if capability == HOPPER:  # the wheel fa3-fwd is built without the float16 kernels
        forward_only = ["fa3_fwd_interface"] if dtype == torch.bfloat16 else []
        names = ["flash_attn_interface", *forward_only, *names]
    for name in names:
        try:
            return importlib.import_module(name).flash_attn_with_kvcache
        except (ImportError, OSError, AttributeError):  # absent, or built for another torch
            continue
    wanted = " or ".join(names)
    raise UnsupportedError(
        f"attention 'flash' needs {wanted}: pip install flash-attn, or use 'auto'"
    )
