"""Other programs' decoding against this project's: same weights, prompts and device, one run.

    python benchmarks/peers.py --shape 1.7B --new-tokens 128 --contexts 1024 --json peers.json

Random weights are drawn once; transformers' Qwen3 shares their memory. Each peer is warmed up, then
takes turns with our modes on fresh prompts. Tokens/s leave the prompt out on both sides. A peer
that is not installed or fails is skipped by name, with the reason. Whose text equals ours in
bfloat16 is reported, not asserted: another program rounds otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if __name__ == "__main__":  # from a checkout that is not installed, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orthrus_fast import bench as own
from orthrus_fast.errors import OrthrusError, one_line

if TYPE_CHECKING:
    from orthrus_fast.bench import Bench

ROUNDS = 3  # prompts a context, each decoded once by everybody
OURS = ("diffusion", "ar_padded", "ar_one_row")


class Run(NamedTuple):
    """One prompt decoded by one program. Times in ms."""

    tokens: list[int]
    first_token_ms: float
    tokens_per_second: float  # of the tokens after the first; 0 where there are none


Peer = Callable[[list[int], int], Run]  # prompt, new tokens


class Clock:
    """A transformers streamer that notes when ids arrive: the prompt's first, then each token."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def put(self, value: Any) -> None:
        self.marks.append(time.perf_counter())

    def end(self) -> None:
        pass


def their_model(bench: Bench) -> Any:
    """transformers' Qwen3 over this decoder's own weights, with sdpa attention."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from orthrus_fast.checkpoint import tensor_views

    ours = bench.decoder.config
    config = Qwen3Config(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_hidden_layers=ours.n_layers,
        num_attention_heads=ours.n_heads,
        num_key_value_heads=ours.n_kv_heads,
        head_dim=ours.head_dim,
        rms_norm_eps=ours.rms_norm_eps,
        max_position_embeddings=ours.max_position_embeddings,
        tie_word_embeddings=ours.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope.theta},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )
    with torch.device("meta"):
        model: Any = Qwen3ForCausalLM(config)
    views = tensor_views(bench.runner.model)
    weights = {name: view for name, view in views.items() if not name.endswith("_diff.weight")}
    if ours.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(bench.device)
    missing = [name for name, weight in model.named_parameters() if weight.is_meta]
    missing += [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not missing, f"no weights for {missing}"
    assert model.config._attn_implementation == "sdpa"
    return model.requires_grad_(False).eval()


def transformers_peer(model: Any, **settings: Any) -> Peer:
    """Its ``generate``, greedy, with these settings."""
    import torch

    def run(prompt: list[int], n_tokens: int) -> Run:
        clock, ids = Clock(), torch.tensor([prompt], device=model.device)
        begin = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
            **settings,
        )
        tokens = out[0, len(prompt) :].tolist()
        first, last = clock.marks[1], clock.marks[-1]
        rate = (n_tokens - 1) / (last - first) if n_tokens > 1 else 0.0
        return Run(tokens, (first - begin) * 1e3, rate)

    return run


def find_peers(bench: Bench, skipped: dict[str, str]) -> dict[str, Peer]:
    """The peers by name; those that cannot be had go to ``skipped``, with the reason."""
    names = ["transformers, dynamic cache", "transformers, static cache"]
    if bench.device.type == "cuda":
        names[1] += ", compiled"
    try:
        model = their_model(bench)
    except Exception as error:
        for name in names:
            skipped[name] = reason(error)
        return {}
    # With a static cache ``generate`` compiles the decoding forward by itself, in mode
    # reduce-overhead, where the device is a GPU (transformers' docs, "Cache strategies").
    return {
        names[0]: transformers_peer(model),
        names[1]: transformers_peer(model, cache_implementation="static"),
    }


def reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    traceback.print_exc()
    return one_line(f"{type(error).__name__}: {error}")


def measure(
    bench: Bench, peers: dict[str, Peer], skipped: dict[str, str], context: int
) -> dict[str, Any]:
    """Tokens/s of everybody after prompts of ``context`` random ids, in turns."""
    n_tokens = bench.args.new_tokens
    n_rounds = min(ROUNDS, bench.args.repeats)
    prompts = own.random_prompts(bench, [context] * (1 + n_rounds), salt=context)
    rates: dict[str, list[float]] = {name: [] for name in (*OURS, *peers)}
    texts: dict[str, list[list[int]]] = {name: [] for name in rates}
    cycles = 0
    for i, prompt in enumerate(prompts):  # the first one warms up
        own.tell(f"{context} tokens of prompt, round {i}")
        decoded = our_runs(bench, prompt, n_tokens, salt=context + i)
        runs = {name: (run.tokens[0], run.tokens_per_second) for name, run in decoded.items()}
        for name, peer in peers.items():
            if name not in skipped:
                try:
                    run = peer(prompt, n_tokens)
                    runs[name] = run.tokens, run.tokens_per_second
                except Exception as error:
                    skipped[name] = reason(error)
        for name, (tokens, rate) in runs.items() if i else ():
            rates[name].append(rate)
            texts[name].append(tokens)
        cycles += len(decoded["diffusion"].accepted) if i else 0
    rows = {
        name: {"tokens_per_second": own.summary(rates[name]), **likeness(texts, name)}
        for name in rates
        if name not in skipped
    }
    return {
        "context": context,
        "new_tokens": n_tokens,
        "tokens_per_cycle": n_rounds * (n_tokens - 1) / cycles,
        "tokens_per_second_of": rows,
        "diffusion_over": ratios(rows),
    }


def our_runs(bench: Bench, prompt: list[int], n_tokens: int, salt: int) -> dict[str, own.Decoded]:
    """Our modes on one prompt; diffusion with replayed acceptance."""
    with own.measuring(bench.device):
        padded = own.decode(bench.decoder, [prompt], n_tokens, False, bench.width)
        replay = own.Replay(bench, salt=salt)
        replay.know(0, bench.runner.state.tokens[0].clone())
        one_row = own.decode(bench.decoder, [prompt], n_tokens, False, 1)
        with own.replaced(bench.runner, draft=replay.draft):
            diffusion = own.decode(bench.decoder, [prompt], n_tokens, True, bench.width)
    return dict(zip(OURS, (diffusion, padded, one_row), strict=True))


def likeness(texts: dict[str, list[list[int]]], name: str) -> dict[str, Any]:
    """How a program's texts compare with our AR's: share equal, tokens before they part."""
    pairs = list(zip(texts[name], texts["ar_padded"], strict=True))
    agreeing = [
        next((i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), len(pair[1]))
        for pair in pairs
    ]
    equal = sum(got == expected for got, expected in pairs) / len(pairs)
    return {"texts_equal_share": equal, "tokens_before_difference": agreeing}


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Diffusion's rate over the faster of our two ARs', and over each peer's."""
    medians = {name: row["tokens_per_second"]["median"] for name, row in rows.items()}
    diffusion = medians["diffusion"]
    faster = max(medians["ar_padded"], medians["ar_one_row"])
    others = {name: diffusion / rate for name, rate in medians.items() if name not in OURS}
    return {"the faster of our ARs": diffusion / faster, **others}


def first_tokens(bench: Bench, peers: dict[str, Peer], skipped: dict[str, str]) -> list[Any]:
    """Milliseconds to the first token at each prompt length that fits."""
    results = []
    for length in own.PREFILL_LENGTHS:
        if length >= bench.decoder.max_seq_len:
            continue
        own.tell(f"first token of {length}")
        prompt, repeats = own.random_prompts(bench, [length])[0], min(5, bench.args.repeats)
        with own.measuring(bench.device):
            ours = own.first_token_ms(bench.decoder, prompt, repeats)
        row = {"orthrus_fast": ours}
        for name, peer in peers.items():
            if name in skipped:
                continue
            try:
                spans = [peer(prompt, 1).first_token_ms for _ in range(1 + repeats)]
                row[name] = own.summary(spans[1:])  # the first one warms up
            except Exception as error:
                skipped[name] = reason(error)
        results.append({"prompt_tokens": length, "ms": row})
    return results


def show(result: dict[str, Any]) -> None:
    """Two tables and the reasons of the absent."""
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=100)
    for at in result["at"]:
        title = f"after {at['context']} tokens; REPLAYED ACCEPTANCE: {at['tokens_per_cycle']:.2f}"
        table = Table("", "tokens/s", "texts equal to our AR's", title=f"{title} tokens a cycle")
        for name, row in at["tokens_per_second_of"].items():
            rate = row["tokens_per_second"]["median"]
            table.add_row(name, f"{rate:.1f}", f"{row['texts_equal_share']:.0%}")
        console.print(table)
        for name, ratio in at["diffusion_over"].items():
            console.print(f"diffusion over {name}: {ratio:.2f}", highlight=False)
    table = Table("first token, ms", *(str(at["prompt_tokens"]) for at in result["first_token"]))
    for name in {name: None for at in result["first_token"] for name in at["ms"]}:
        spans = [at["ms"].get(name) for at in result["first_token"]]
        table.add_row(name, *(f"{span['median']:.1f}" if span else "–" for span in spans))
    console.print(table)
    for name, why in result["skipped"].items():
        console.print(f"skipped: {name}: {why}", highlight=False, markup=False)


def build_parser() -> own.Parser:
    parser = own.Parser(description=str(__doc__).partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--shape", choices=("1.7B", "4B", "8B", "tiny"), required=True, help="of random weights")
    add("--device", metavar="D")
    add("--dtype", metavar="T")
    add("--runner", choices=("auto", "eager", "compiled", "graph"), default="auto")
    add("--attention", choices=("auto", "sdpa", "triton", "flash"), default="auto")
    add("--contexts", type=own.integers, default=[1024], metavar="N,…", help="tokens of prompt")
    add("--new-tokens", type=own.positive, default=128, metavar="N")
    add("--max-seq-len", type=own.positive, metavar="N", help="(default: room for everything)")
    own.add_accept(parser)
    add("--seed", type=int, default=0, metavar="N", help="of weights, prompts and drafts")
    add("--repeats", type=own.positive, default=5, metavar="N", help=f"{ROUNDS} at most a decode")
    add("--json", metavar="FILE")
    parser.set_defaults(
        checkpoint=None, slots=1, block_size=None, prompts_file=None, compile_mode="default"
    )
    return parser


def compare(args: argparse.Namespace) -> dict[str, Any]:
    bench = own.build(args)
    skipped: dict[str, str] = {}
    peers = find_peers(bench, skipped)
    result: dict[str, Any] = {
        "arguments": {name: value for name, value in vars(args).items() if name != "json"},
        "run": own.surroundings(bench.decoder.configuration),
        "transformers": own.version_of("transformers"),
        "label": "replayed acceptance",
        "accept": args.accept,
        "at": [],
        "first_token": [],
        "skipped": skipped,
    }
    for context in bench.contexts:
        result["at"].append(measure(bench, peers, skipped, context))
        write(args.json, result)
    result["first_token"] = first_tokens(bench, peers, skipped)
    write(args.json, result)
    return result


def write(path: str | None, result: dict[str, Any]) -> None:
    if path is not None:
        Path(path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """0: done, though peers may have been skipped; 2: bad input; 130: interrupted."""
    try:
        args = build_parser().parse_args(arguments)
        own.check_flags(args)
        show(compare(args))
        return 0
    except OrthrusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
