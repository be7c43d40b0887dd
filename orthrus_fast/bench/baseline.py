"""AR without the promise: passes of one row, which PyTorch's library multiplies as it likes."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from orthrus_fast.attention import Backend, find_backend
from orthrus_fast.decoder import Decoder
from orthrus_fast.kernels.plain import PlainProducts, plain_kernels
from orthrus_fast.runners import EagerRunner, make_runner


def make_baseline(decoder: Decoder) -> EagerRunner:
    """Return a runner whose ``verify(1)`` decodes by the decoder's own weights, state and cache.

    On a GPU it has cuBLAS and torch.compile in a CUDA graph, and the decoder's attention; on a CPU
    neither products nor attention are padded to whole tiles. Weights in fewer bits, which libraries
    would have to unpack whole, are left to the decoder's own products.
    """
    of, settings = decoder.runner, decoder.configuration
    name, mode = settings["runner"], settings["compile_mode"] or "default"
    backend = Backend("one_row", attend_one_row, lambda _: [], row_invariant=False)
    if of.device.type == "cuda":
        where = (of.device, of.model.embed_tokens.weight.dtype, decoder.config.head_dim)
        name, mode, backend = "graph", "default", find_backend(settings["attention"], *where)
    model, own = copy.copy(of.model), of.model.kernels
    kernels = replace(plain_kernels(backend.attend), sample=own.sample, logprobs=own.logprobs)
    quantized = settings["weights"] != "checkpoint"
    products = own.products if quantized else PlainProducts(row_multiple=1)
    model.kernels = replace(kernels, products=products)
    runner = make_runner(name, model, of.state, of.cache, backend, mode)
    runner.eos = of.eos  # which ``ignore_eos`` changes
    runner.prepare(1)
    return runner


def attend_one_row(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor, slot: Tensor, *_: Any, **__: Any
) -> Tensor:
    """See ``kernels.interface.Attend``: of one row each, over the keys so far and no others."""
    (n_rows, one, n_heads, head_dim), n_kv_heads = q.shape, k_cache.shape[1]
    visible = int(start.max()) + one
    k, v, mask = k_cache[:, :, :visible], v_cache[:, :, :visible], None
    if len(k_cache) > 1:  # with one slot there is nothing to gather or to mask
        k, v, mask = k[slot], v[slot], torch.arange(visible) <= start[:, None, None, None]
    q = q.reshape(n_rows, n_kv_heads, n_heads // n_kv_heads, head_dim)
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.reshape(n_rows, one, n_heads, head_dim).contiguous()
