"""One row, one result, at full depth: how many rows differ in a bit, however they are computed?

    python benchmarks/rows.py --shape 8B --json rows-8B.json

Random weights in the shape of a public model. One text passes through the model in blocks of its
full width, in one slot; that is the reference. Then again in narrower blocks, down to single rows,
in chunks of prefill, and in a slot among others whose contents are random. Compared are the bits of
K and V in every layer, logits and log-probabilities, and the sampled tokens. The exit code is 1 if
anything differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # from a checkout that is not installed, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from orthrus_fast.bench.clocks import measuring
from orthrus_fast.bench.common import Result
from orthrus_fast.bench.session import release_memory
from orthrus_fast.bench.shapes import random_model, shape_config
from orthrus_fast.decoder import Decoder
from orthrus_fast.files import write_whole
from orthrus_fast.invariance import bits_of
from orthrus_fast.loading import Options, build_decoder
from orthrus_fast.sampling import SamplingParams

CHUNKS = (64, 100, 1000, 2048)
PASSES = 96  # of blocks narrower than the model's, at most: single rows are compared at the end
SETTINGS = SamplingParams(temperature=0.8, top_k=50, top_p=0.95, seed=5, logprobs=True)


class Rows(NamedTuple):
    """What passes over tokens ``begin`` … ``end`` - 1 left behind; all but ids as bits."""

    begin: int
    end: int
    logits: Tensor  # [n, V]; of prefill, of the chunks' last rows
    ids: Tensor  # [n] sampled
    logprobs: Tensor  # [n]
    caches: list[Tensor]  # [n_kv_heads, n, head_dim], of K and V in every layer


class Probe:
    """Passes one text through a slot of a decoder, from ``base`` on, beside random neighbours."""

    def __init__(self, decoder: Decoder, base: int, n_tokens: int, slot: int) -> None:
        self.runner, self.state = decoder.runner, decoder.runner.state
        self.caches = (*decoder.runner.cache.k, *decoder.runner.cache.v)
        self.base, self.slot, self.vocab_size = base, slot, decoder.config.vocab_size
        n = base + n_tokens + decoder.block_width
        generator = torch.Generator().manual_seed(1)
        self.text = torch.randint(self.vocab_size, (n,), generator=generator).to(self.runner.device)

    def blocks(self, width: int, begin: int, end: int, expected: Rows | None) -> Rows:
        """In blocks of ``width``, after the ``expected`` rows before ``begin``."""
        self._reset(begin, expected)
        state, n_slots = self.state, len(self.state.slots)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for first in range(begin, end, width):
            block = torch.randint(self.vocab_size, (n_slots, width), device=self.text.device)
            block[self.slot] = self.text[first : first + width]
            state.length.random_(end - width)
            state.length[self.slot] = first
            state.anchor.copy_(block[:, 0])
            state.proposals[:, : width - 1].copy_(block[:, 1:])
            report = self.runner.verify(width, sampling=True)[self.slot].clone()
            logits = bits_of(self.runner.logits[self.slot]).clone()
            parts.append((logits, report[:width], report[width + 3 :]))
        logits, ids, logprobs = (torch.cat(of)[: end - begin] for of in zip(*parts, strict=True))
        return Rows(begin, end, logits, ids, logprobs, self._cached(begin, end))

    def chunks(self, width: int, end: int) -> Rows:
        """In chunks of prefill, from ``base`` on."""
        self._reset(self.base, None)
        found = []
        for first in range(self.base, end, width):
            chunk = self.text[first : min(first + width, end)]
            hidden = self.runner.prefill_chunk(chunk[None].clone(), first, self.slot)
            logits = self.runner.model.greedy(hidden[0, len(chunk) - 1], return_logits=True)[1]
            found.append(bits_of(logits).clone())
        nothing = self.text[:0]
        cached = self._cached(self.base, end)
        return Rows(self.base, end, torch.stack(found), nothing, nothing, cached)

    def _reset(self, begin: int, expected: Rows | None) -> None:
        """Every slot ended, garbage in the cache, but for this slot's rows before ``begin``."""
        self.state.reset()
        self.state.drafting.fill_(True)
        for slot in range(len(self.state.slots)):
            self.state.settings.put(slot, SETTINGS)
        for layer, rows in enumerate(self.caches):
            rows.normal_()
            generator = torch.Generator(rows.device).manual_seed(layer)
            rows[self.slot, :, : self.base] = rows[self.slot, :, : self.base].normal_(
                generator=generator
            )
            if expected is not None:
                own = bits_of(rows)[self.slot, :, self.base : begin]
                own.copy_(expected.caches[layer][:, : begin - self.base])

    def _cached(self, begin: int, end: int) -> list[Tensor]:
        return [bits_of(rows)[self.slot, :, begin:end].clone() for rows in self.caches]


def compare(what: str, got: Rows, expected: Rows, chunk: int = 0) -> Result:
    """Count and print what differs; ``chunk``: the width of those whose last rows have logits."""
    rows = slice(got.begin - expected.begin, got.end - expected.begin)
    device, n = got.logits.device, got.end - got.begin
    last = torch.arange(rows.start, rows.stop, device=device)
    if chunk:
        last = torch.cat((last[chunk - 1 :: chunk], last[-1:]))[: len(got.logits)]
    pairs = zip(got.caches, expected.caches, strict=True)
    cached = torch.stack([(a != b[:, rows]).any(-1).any(0) for a, b in pairs]).any(0)
    result: Result = {"what": what, "rows": n, "cache_rows": int(cached.sum())}
    result["logit_rows"] = int((got.logits != expected.logits[last]).any(-1).sum())
    for name in ("ids", "logprobs") if not chunk else ():
        result[name] = int((getattr(got, name) != getattr(expected, name)[rows]).sum())
    print(", ".join(f"{name} {value}" for name, value in result.items()), flush=True)
    return result


def compare_all(probe: Probe, widths: Sequence[int], expected: Rows) -> list[Result]:
    """Compare blocks of ``widths`` and chunks with the ``expected`` rows."""
    slots, end = f"{len(probe.state.slots)} slots", expected.end
    found = []
    for width in widths:
        begin = max(probe.base, end - PASSES * width)
        rows = probe.blocks(width, begin, end, expected)
        found.append(compare(f"{slots}, blocks of {width}", rows, expected))
    for width in CHUNKS:
        rows = probe.chunks(width, end)
        found.append(compare(f"{slots}, chunks of {width}", rows, expected, width))
    return found


def measure(args: argparse.Namespace) -> list[Result]:
    """Compare all ways to compute the rows, at each number of slots."""
    config = shape_config(args.shape)
    block = config.block_size or 1
    widths = [block >> n for n in range(block.bit_length())]
    found: list[Result] = []
    expected: Rows | None = None
    end = args.begin + args.tokens
    for slots in args.slots:
        options = Options(args.device, args.dtype, max_seq_len=end, slots=slots)
        decoder = build_decoder(args.shape, config, partial(random_model, seed=0), options)
        print(f"{slots} slots: {decoder.configuration['promise']}; {decoder.invariance}")
        probe = Probe(decoder, args.begin, args.tokens, slots // 2)
        with measuring(decoder.runner.device):
            for width in widths:
                decoder.runner.prepare(width, sampling=True)
            expected = expected or probe.blocks(block, args.begin, end, None)
            found += compare_all(probe, widths, expected)
        del decoder, probe
        release_memory()
    return found


def main() -> int:
    """Return 1 if any row differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1.7B", help="a public model's shape (default: 1.7B)")
    parser.add_argument("--device", help="default: CUDA where there is one")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4, 32])
    parser.add_argument("--begin", type=int, default=0, help="random cache rows before the text")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text")
    parser.add_argument("--json", type=Path, help="a file for the counts")
    args = parser.parse_args()
    found = measure(args)
    names = ("cache_rows", "logit_rows", "ids", "logprobs")
    differing = sum(result.get(name, 0) for result in found for name in names)
    print(f"{sum(result['rows'] for result in found)} rows compared, {differing} differ")
    if args.json is not None:
        content = {"shape": args.shape, "differing": differing, "compared": found}
        write_whole(args.json, json.dumps(content, indent=1) + "\n")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
