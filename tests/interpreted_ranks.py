"""A rank that runs several GPUs' kernels in Triton's interpreter: a process that shares a file.

python -m tests.interpreted_ranks CHECKPOINT FILE N, with torchrun's variables. The first rank
prints texts and a digest of each head's cache rows; others leave theirs in FILE.rowsRANK.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from orthrus_fast import SamplingParams
from orthrus_fast.checkpoint import load_model, open_checkpoint
from orthrus_fast.config import ModelConfig
from orthrus_fast.kernels import norm, overlap, products, quantized, symmetric
from orthrus_fast.kernels.custom import CustomProducts
from orthrus_fast.kernels.interface import Kernels
from orthrus_fast.kernels.symmetric import ABSENT, Areas, Exchange, SharedProducts
from orthrus_fast.loading import Options, build_decoder, build_on_ranks
from orthrus_fast.tensor_parallel import Ranks
from tests.decoders import unchecked
from tests.kernel_compile import rounding_as_a_gpu
from tests.ranks import ThreadRanks

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3, 250]]


def shared_kernels(
    ranks: Any, file: Path, kernels: Kernels, config: ModelConfig, *_: Any
) -> Kernels:
    """The kernels of a GPU, whose buffers all processes have in a file."""
    areas = Areas.of(512, 64, config.hidden_size, config.vocab_size * 4, ranks.size)
    n_words, size = areas.n_words, ranks.size
    whole = torch.from_file(str(file), shared=True, size=size * n_words, dtype=torch.int32)
    buffers = list(whole.view(size, n_words))
    buffers[ranks.rank].fill_(ABSENT)
    ranks.share(None)
    exchange = Exchange(ranks.rank, buffers, areas, torch.zeros(1, dtype=torch.int32))
    return replace(kernels, products=SharedProducts(exchange), add_norm=exchange.add_norm)


def decode(decoder: Any) -> dict[str, Any]:
    params = SamplingParams(temperature=0.9, top_k=20, seed=4)
    found: dict[str, Any] = {}
    for mode in ("ar", "diffusion"):
        for how in (SamplingParams(), params):
            results = decoder.generate(PROMPTS, 6, how, mode)
            found[f"{mode} {how.temperature}"] = [(r.tokens, r.error) for r in results]
    return found


def rows_of(decoder: Any) -> list[str]:
    """A digest of each head's committed rows."""
    lengths, cache = decoder.runner.state.length.tolist(), decoder.runner.cache
    digests = []
    for head in range(cache.k[0].shape[1]):
        of_head = [
            t[slot, head, :n] for t in (*cache.k, *cache.v) for slot, n in enumerate(lengths)
        ]
        digests.append(hashlib.sha256(torch.cat(of_head).numpy().tobytes()).hexdigest()[:12])
    return digests


def main() -> None:
    directory, file, n_ranks = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(directory)

    def make_model(config: ModelConfig, *how: Any) -> Any:
        return load_model(replace(checkpoint, config=config), *how)

    options = Options(device="cpu", max_seq_len=64, slots=2, drafting=4, tensor_parallel=n_ranks)
    of = (checkpoint.name, checkpoint.config, make_model, options, checkpoint)
    modules = (overlap, norm, products, quantized, symmetric)
    with unchecked(), rounding_as_a_gpu(*modules):
        if n_ranks == 1:
            ranks: Any = ThreadRanks.alone()
            ranks.kernels = lambda kernels, *_: replace(
                kernels, products=CustomProducts(), add_norm=norm.add_norm
            )
            decoder = build_decoder(*of, ranks=ranks)
        else:
            Ranks.kernels = lambda self, *how: shared_kernels(self, file, *how)  # type: ignore[method-assign]
            serve = Ranks.serve
            Ranks.serve = lambda self, step: report(step.__self__, serve, self)  # type: ignore
            decoder = build_on_ranks(
                lambda ranks: build_decoder(*of, ranks=ranks), checkpoint.config, n_ranks, None
            )
        found = decode(decoder)
        if n_ranks > 1:
            wait_for_rows(decoder, file.with_name(f"{file.name}.rows1"))
        print(json.dumps({"texts": found, "rows": rows_of(decoder)}), flush=True)


def wait_for_rows(decoder: Any, file: Path) -> None:
    """Until the other rank has left its rows of the last cycle."""
    for _ in range(600):
        if file.exists() and json.loads(file.read_text())["lengths"] == lengths_of(decoder):
            return
        time.sleep(0.1)


def lengths_of(decoder: Any) -> Any:
    return decoder.runner.state.length.tolist()


def report(engine: Any, serve: Any, ranks: Ranks) -> None:
    """Serve the first rank; leave this one's rows as they stand after each step."""

    def step() -> None:
        engine.step()
        where = Path(sys.argv[2] + f".rows{ranks.rank}")
        left = {"lengths": lengths_of(engine), "rows": rows_of(engine)}
        where.with_suffix(".new").write_text(json.dumps(left))
        where.with_suffix(".new").replace(where)  # whole, whenever this process ends

    serve(ranks, step)


if __name__ == "__main__":
    main()
