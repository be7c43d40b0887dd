"""Other programs' decoding against this project's: same weights, prompts and device, one run.

    python benchmarks/peers.py --shape 1.7B --new-tokens 128 --contexts 1024 --json peers.json
    python benchmarks/peers.py --dtypes bfloat16,float32 --sequences 32 --json peers.json

With --shape weights are random and our drafts' acceptance is replayed; else they are a checkpoint's
and so are the drafts. transformers' Qwen3 shares their memory. Each peer is warmed up, then takes
turns with our modes on fresh prompts. Tokens/s leave the prompt out on both sides. A peer that is
not installed or fails is skipped by name, with the reason. Whose text equals ours is reported for
each of --dtypes, not asserted: another program rounds otherwise.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if __name__ == "__main__":  # from a checkout that is not installed, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orthrus_fast import bench as own
from orthrus_fast.bench.common import write_whole
from orthrus_fast.bench.prompts import chosen_prompts, prompts_file
from orthrus_fast.errors import OrthrusError, RequestError, one_line

if TYPE_CHECKING:
    from orthrus_fast.bench import Bench

ROUNDS = 3  # prompts a context, each decoded once by everybody
LOOKED_UP = 10  # tokens a pass, of prompt lookup: what transformers' documentation takes
OURS = ("diffusion", "ar_padded", "ar_one_row")


class Run(NamedTuple):
    """One prompt decoded by one program. Times in ms."""

    tokens: list[int]
    first_token_ms: float
    tokens_per_second: float  # of the tokens after the first; 0 where there are none


Peer = Callable[[list[int], int], Run]  # prompt, new tokens


class Clock:
    """A transformers streamer that notes when ids arrive: the prompt's first, then the tokens."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.counts: list[int] = []

    def put(self, value: Any) -> None:
        self.marks.append(time.perf_counter())
        self.counts.append(value.numel())

    def end(self) -> None:
        pass

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after those that came first, of which an assisted pass has several."""
        seconds = self.marks[-1] - self.marks[1]
        return sum(self.counts[2:]) / seconds if seconds > 0 else 0.0


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
        return Run(tokens, (clock.marks[1] - begin) * 1e3, clock.tokens_per_second)

    return run


def find_peers(bench: Bench, skipped: dict[str, str]) -> dict[str, Peer]:
    """The peers by name; those that cannot be had go to ``skipped``, with the reason."""
    names = ["transformers, dynamic cache", "transformers, static cache"]
    if bench.device.type == "cuda":
        names[1] += ", compiled"
    names.append("transformers, prompt lookup")
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
        # The drafts are what followed the same words before; with a dynamic cache, as it demands.
        names[2]: transformers_peer(model, prompt_lookup_num_tokens=LOOKED_UP),
    }


def reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    traceback.print_exc()
    return one_line(f"{type(error).__name__}: {error}")


def prompts_of(bench: Bench) -> list[tuple[int, list[list[int]]]]:
    """Sets of prompts, the first of each for warming up, with the tokens that a prompt has.

    A checkpoint's are of its file of prompts, where it has one; the longest comes first, so that
    no static cache has to grow while the clock runs. Others are random ids.
    """
    if prompts_file(bench) is not None:
        prompts = sorted(chosen_prompts(bench), key=len, reverse=True)
        mean = sum(map(len, prompts)) / len(prompts)
        return [(round(mean), [prompts[0], *prompts])]
    n_rounds = min(ROUNDS, bench.args.repeats)
    return [
        (context, own.random_prompts(bench, [context] * (1 + n_rounds), salt=context))
        for context in bench.contexts
    ]


def measure(
    bench: Bench,
    peers: dict[str, Peer],
    skipped: dict[str, str],
    context: int,
    prompts: list[list[int]],
) -> dict[str, Any]:
    """Tokens/s of everybody after these prompts, in turns; the first one warms up."""
    n_tokens = bench.args.new_tokens
    rates: dict[str, list[float]] = {name: [] for name in (*OURS, *peers)}
    texts: dict[str, list[list[int]]] = {name: [] for name in rates}
    cycles = 0
    for i, prompt in enumerate(prompts):
        own.tell(f"prompt {i} of {len(prompts) - 1}, {len(prompt)} tokens")
        decoded = our_runs(bench, prompt, n_tokens, salt=context + i)
        runs = {name: (run.tokens[0], run.tokens_per_second) for name, run in decoded.items()}
        runs |= their_runs(peers, skipped, prompt, n_tokens)
        for name, (tokens, rate) in runs.items() if i else ():
            rates[name].append(rate)
            texts[name].append(tokens)
        cycles += len(decoded["diffusion"].accepted) if i else 0
    rows = {
        name: {"tokens_per_second": own.summary(rates[name]), **likeness(texts, name)}
        for name in rates
        if name not in skipped
    }
    faster = max(rows[name]["tokens_per_second"]["median"] for name in ("ar_padded", "ar_one_row"))
    for row in rows.values():
        row["over_faster_ar"] = row["tokens_per_second"]["median"] / faster
    return {
        "context": context,
        "prompts": len(prompts) - 1,
        "new_tokens": n_tokens,
        "tokens_per_cycle": (len(prompts) - 1) * (n_tokens - 1) / cycles,
        "tokens_per_second_of": rows,
        "diffusion_over": ratios(rows),
    }


def their_runs(
    peers: dict[str, Peer], skipped: dict[str, str], prompt: list[int], n_tokens: int
) -> dict[str, tuple[list[int], float]]:
    """Tokens and tokens/s of each peer; one that fails goes to ``skipped``."""
    runs = {}
    for name, peer in peers.items():
        if name not in skipped:
            try:
                run = peer(prompt, n_tokens)
                runs[name] = run.tokens, run.tokens_per_second
            except Exception as error:
                skipped[name] = reason(error)
    return runs


def our_runs(bench: Bench, prompt: list[int], n_tokens: int, salt: int) -> dict[str, own.Decoded]:
    """Our modes on one prompt; random weights draft with replayed acceptance."""
    with own.measuring(bench.device), own.endless(bench.runner):
        padded = own.decode(bench.decoder, [prompt], n_tokens, False, bench.width)
        replay = own.Replay(bench, salt=salt)
        replay.know(0, bench.runner.state.tokens[0].clone())
        one_row = own.decode(bench.decoder, [prompt], n_tokens, False, 1)
        drafts = {"draft": replay.draft} if bench.args.shape else {}
        with own.replaced(bench.runner, **drafts):
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


def first_tokens(
    bench: Bench, peers: dict[str, Peer], skipped: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """Milliseconds to the first token at each prompt length that fits."""
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
        yield {"prompt_tokens": length, "ms": row}


def show(result: dict[str, Any]) -> None:
    """Two tables and the reasons of the absent."""
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=100)
    for at in result["at"]:
        title = f"after {at['context']} tokens; {result['label'].upper()}: "
        dtype = result["run"]["configuration"]["dtype"]
        title += f"{at['tokens_per_cycle']:.2f} tokens a cycle; {dtype}"
        dtypes = list(result["by_dtype"])
        columns = (f"texts equal to our AR's, {dtype}" for dtype in dtypes)
        table = Table("", "tokens/s", "over our faster AR", *columns, title=title)
        for name, row in at["tokens_per_second_of"].items():
            rate, equal = row["tokens_per_second"]["median"], row["texts_equal_share_by_dtype"]
            shares = (f"{equal[dtype]:.0%}" if dtype in equal else "–" for dtype in dtypes)
            table.add_row(name, f"{rate:.1f}", f"{row['over_faster_ar']:.2f}", *shares)
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
    add("--checkpoint", metavar="DIR_OR_REPO", help="directory or Hub repository (default: model/)")
    add("--shape", choices=("1.7B", "4B", "8B", "tiny"), help="of random weights")
    add("--device", metavar="D")
    add("--dtype", metavar="T")
    dtypes = "one after another; the first one's speeds are shown, and all texts compared"
    add("--dtypes", type=lambda text: text.split(","), metavar="T,…", help=dtypes)
    prompts = "of a checkpoint: JSON lines (default: random ids; of model/ its held-out prompts)"
    add("--prompts-file", metavar="FILE", help=prompts)
    add("--sequences", type=own.positive, default=8, metavar="N", help="prompts of that file")
    add("--runner", choices=("auto", "eager", "compiled", "graph"), default="auto")
    add("--attention", choices=("auto", "sdpa", "triton", "flash"), default="auto")
    add("--contexts", type=own.integers, default=[1024], metavar="N,…", help="tokens of prompt")
    add("--new-tokens", type=own.positive, default=128, metavar="N")
    add("--max-seq-len", type=own.positive, metavar="N", help="(default: room for everything)")
    own.add_accept(parser)
    add("--seed", type=int, default=0, metavar="N", help="of weights, prompts and drafts")
    add("--repeats", type=own.positive, default=5, metavar="N", help=f"{ROUNDS} at most a decode")
    add("--json", metavar="FILE")
    parser.set_defaults(slots=1, block_size=None, compile_mode="default")
    return parser


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """All dtypes; the first one's results also stand at the top."""
    result: dict[str, Any] = {
        "arguments": {name: value for name, value in vars(args).items() if name != "json"},
        "run": None,
        "transformers": own.version_of("transformers"),
        "label": "replayed acceptance" if args.shape else "the checkpoint's own drafts",
        "accept": args.accept if args.shape else None,
        "accept_source": args.accept_source if args.shape else None,
        "at": [],
        "first_token": [],
        "skipped": {},
        "by_dtype": {},
    }
    for dtype in args.dtypes or [args.dtype]:
        asked = argparse.Namespace(**{**vars(args), "dtype": dtype})
        for found in compare_in(asked):
            result["by_dtype"][found["run"]["configuration"]["dtype"]] = found
            first = next(iter(result["by_dtype"].values()))
            result |= {name: first[name] for name in ("run", "at", "first_token", "skipped")}
            add_shares(result)
            write(args.json, result)
        own.release_memory()
    return result


def compare_in(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The results in one dtype, as far as they have come, each time that there are more."""
    bench = own.build(args)
    skipped: dict[str, str] = {}
    found: dict[str, Any] = {
        "run": own.surroundings(bench.decoder.configuration),
        "at": [],
        "first_token": [],
        "skipped": skipped,
    }
    peers = find_peers(bench, skipped)
    for context, prompts in prompts_of(bench):
        found["at"].append(measure(bench, peers, skipped, context, prompts))
        yield found
    for row in first_tokens(bench, peers, skipped):
        found["first_token"].append(row)
        yield found


def add_shares(result: dict[str, Any]) -> None:
    """Beside each program's speed, how many texts equalled ours in each dtype."""
    for i, at in enumerate(result["at"]):
        for name, row in at["tokens_per_second_of"].items():
            row["texts_equal_share_by_dtype"] = {
                dtype: found["at"][i]["tokens_per_second_of"][name]["texts_equal_share"]
                for dtype, found in result["by_dtype"].items()
                if len(found["at"]) > i and name in found["at"][i]["tokens_per_second_of"]
            }


def check_dtypes(names: list[str]) -> None:
    """Raise RequestError for a name that is none, before the first one is measured."""
    from orthrus_fast.decoder import parse_dtype

    for name in names:
        parse_dtype(name)


def write(path: str | None, result: dict[str, Any]) -> None:
    if path is not None:
        write_whole(Path(path), result)


def main(arguments: list[str] | None = None) -> int:
    """0: done, though peers may have been skipped; 2: bad input; 130, 143: interrupted."""
    try:
        with own.heeding_sigterm():
            args = build_parser().parse_args(arguments)
            own.check_flags(args)
            if args.dtype is not None and args.dtypes is not None:
                raise RequestError("--dtype does not go with --dtypes")
            check_dtypes(args.dtypes or [])
            if args.json is not None and Path(args.json).exists():
                raise RequestError(f"json: {args.json}: exists; name another file, or remove it")
            show(compare(args))
        return 0
    except OrthrusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        return own.status(interruption)


if __name__ == "__main__":
    sys.exit(main())
