"""Compares the decoding of other programs with this project's on the same weights and device.

    python benchmarks/peers.py --shape 1.7B --new-tokens 128 --contexts 1024 --json peers.json
    python benchmarks/peers.py --dtypes bfloat16,float32 --sequences 32 --json peers.json

With --shape the weights are random and the acceptance of drafts is replayed; else weights and
drafts are a checkpoint's. The Qwen3 of transformers shares their memory. Each program is warmed up,
then they take turns on fresh prompts. Tokens/s leave the prompt out for all of them. A program that
is not installed or fails is skipped by name, with the reason. How many texts equal those of AR is
reported for each of --dtypes, not asserted: another program rounds otherwise.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # from a checkout that is not installed, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console

from orthrus_fast.bench.clocks import measuring, summary
from orthrus_fast.bench.common import PREFILL_LENGTHS, ROUNDS, Result, log
from orthrus_fast.bench.decoding import Decoded, decode, ignore_eos, patched
from orthrus_fast.bench.flags import (
    Parser,
    add_decoder_flags,
    check_flags,
    positive,
    positives,
    prompts_path,
)
from orthrus_fast.bench.passes import first_token_ms
from orthrus_fast.bench.results import Report, environment, version_of
from orthrus_fast.bench.session import (
    Session,
    build_session,
    choose_prompts,
    random_prompts,
    release_memory,
)
from orthrus_fast.bench.tables import print_table
from orthrus_fast.errors import OrthrusError, RequestError, one_line
from orthrus_fast.options import DTYPES

LOOKED_UP = 10  # tokens a pass, of prompt lookup: what transformers' documentation takes
MODES = ("diffusion", "ar", "ar_baseline")  # of this project


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
        """The rate after the tokens that came first, of which an assisted pass has several."""
        seconds = self.marks[-1] - self.marks[1]
        return sum(self.counts[2:]) / seconds if seconds > 0 else 0.0


def transformers_model(session: Session) -> Any:
    """Build transformers' Qwen3 over this decoder's own weights, with sdpa attention."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    ours = session.decoder.config
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
    tensors = session.runner.model.tensors().items()
    weights = {name: tensor for name, tensor in tensors if not name.endswith("_diff.weight")}
    if ours.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(session.device)
    every = (*model.named_parameters(), *model.named_buffers())
    missing = [name for name, tensor in every if tensor.is_meta]
    assert not missing, f"no weights for {missing}"
    assert model.config._attn_implementation == "sdpa"
    return model.requires_grad_(False).eval()


def transformers_peer(model: Any, **settings: Any) -> Peer:
    """Return its ``generate``, greedy, with these settings.

    Prompt lookup wants an end-of-sequence id: it gets one that no token has, so that texts have
    the length that was asked for.
    """

    def run(prompt: list[int], n_tokens: int) -> Run:
        clock, ids = Clock(), torch.tensor([prompt], device=model.device)
        begin = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=model.config.vocab_size,
            streamer=clock,
            **settings,
        )
        tokens = out[0, len(prompt) :].tolist()
        return Run(tokens, (clock.marks[1] - begin) * 1e3, clock.tokens_per_second)

    return run


def find_peers(session: Session, skipped: dict[str, str]) -> dict[str, Peer]:
    """Return the peers by name; those that cannot be had go to ``skipped``, with the reason."""
    # With a static cache ``generate`` compiles the decoding forward by itself, in mode
    # reduce-overhead, where the device is a GPU (transformers' docs, "Cache strategies").
    compiled = ", compiled" if session.device.type == "cuda" else ""
    settings: dict[str, dict[str, Any]] = {
        "transformers, dynamic cache": {},
        f"transformers, static cache{compiled}": {"cache_implementation": "static"},
        # The drafts are what followed the same words before; with a dynamic cache, as it demands.
        "transformers, prompt lookup": {"prompt_lookup_num_tokens": LOOKED_UP},
    }
    try:
        model = transformers_model(session)
    except Exception as error:
        skipped.update(dict.fromkeys(settings, reason(error)))
        return {}
    return {name: transformers_peer(model, **of) for name, of in settings.items()}


def reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    traceback.print_exc()
    return one_line(f"{type(error).__name__}: {error}")


def prompt_sets(session: Session) -> list[tuple[int, list[list[int]]]]:
    """Return sets of prompts, the first of each for warming up, with the tokens that a prompt has.

    A checkpoint's are from its file of prompts, where it has one; the longest comes first, so that
    no static cache has to grow while the clock runs. Others are random ids.
    """
    if prompts_path(session.args) is not None:
        prompts = sorted(choose_prompts(session), key=len, reverse=True)
        mean = sum(map(len, prompts)) / len(prompts)
        return [(round(mean), [prompts[0], *prompts])]
    n_rounds = min(ROUNDS, session.args.repeats)
    return [
        (context, random_prompts(session, [context] * (1 + n_rounds), salt=context))
        for context in session.contexts
    ]


def measure(
    session: Session,
    peers: dict[str, Peer],
    skipped: dict[str, str],
    context: int,
    prompts: list[list[int]],
) -> Result:
    """Return the tokens/s of all programs after these prompts, in turns; the first one warms up."""
    n_tokens = session.args.new_tokens
    rates: dict[str, list[float]] = {name: [] for name in (*MODES, *peers)}
    texts: dict[str, list[list[int]]] = {name: [] for name in rates}
    n_cycles = 0
    for i, prompt in enumerate(prompts):
        log(f"prompt {i} of {len(prompts) - 1}, {len(prompt)} tokens")
        decoded = run_modes(session, prompt, n_tokens, salt=context + i)
        runs = {name: (run.tokens[0], run.tokens_per_second) for name, run in decoded.items()}
        runs |= run_peers(peers, skipped, prompt, n_tokens)
        for name, (tokens, rate) in runs.items() if i else ():
            rates[name].append(rate)
            texts[name].append(tokens)
        n_cycles += len(decoded["diffusion"].accepted) if i else 0
    rows: Result = {
        name: {"tokens_per_second": summary(rates[name]), **likeness(texts, name)}
        for name in rates
        if name not in skipped
    }
    medians = {name: row["tokens_per_second"]["median"] for name, row in rows.items()}
    faster = max(medians["ar"], medians["ar_baseline"])
    for name, row in rows.items():
        row["over_faster_ar"] = medians[name] / faster
    others = {name: rate for name, rate in medians.items() if name not in MODES}
    over = {"the faster AR": faster, **others}
    return {
        "context": context,
        "prompts": len(prompts) - 1,
        "new_tokens": n_tokens,
        "tokens_per_cycle": (len(prompts) - 1) * (n_tokens - 1) / n_cycles,
        "tokens_per_second_of": rows,
        "diffusion_over": {name: medians["diffusion"] / rate for name, rate in over.items()},
    }


def run_peers(
    peers: dict[str, Peer], skipped: dict[str, str], prompt: list[int], n_tokens: int
) -> dict[str, tuple[list[int], float]]:
    """Return the tokens and tokens/s of each peer; one that fails goes to ``skipped``."""
    runs = {}
    for name, peer in peers.items():
        if name not in skipped:
            try:
                run = peer(prompt, n_tokens)
                runs[name] = run.tokens, run.tokens_per_second
            except Exception as error:
                skipped[name] = reason(error)
    return runs


def run_modes(session: Session, prompt: list[int], n_tokens: int, salt: int) -> dict[str, Decoded]:
    """Decode one prompt in this project's modes; random weights get replayed drafts."""
    decoder, width = session.decoder, session.width
    with measuring(session.device), ignore_eos(session.runner):
        ar = decode(decoder, [prompt], n_tokens, False, decoder.ar_width)
        replay = session.replay(salt)
        replay.set_text(0, session.runner.state.tokens[0].clone())
        with patched(session.runner, verify=session.baseline.verify):
            baseline = decode(decoder, [prompt], n_tokens, False, 1)
        drafts = {"draft": replay.draft} if session.args.shape else {}
        with patched(session.runner, **drafts):
            diffusion = decode(decoder, [prompt], n_tokens, True, width)
    return dict(zip(MODES, (diffusion, ar, baseline), strict=True))


def likeness(texts: dict[str, list[list[int]]], name: str) -> Result:
    """Compare a program's texts with those of AR: share equal, tokens before they part."""
    pairs = list(zip(texts[name], texts["ar"], strict=True))
    agreeing = [
        next((i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), len(pair[1]))
        for pair in pairs
    ]
    equal = sum(got == expected for got, expected in pairs) / len(pairs)
    return {"texts_equal_share": equal, "tokens_before_difference": agreeing}


def first_tokens(
    session: Session, peers: dict[str, Peer], skipped: dict[str, str]
) -> Iterator[Result]:
    """Yield the milliseconds to the first token at each prompt length that fits."""
    for length in PREFILL_LENGTHS:
        if length >= session.decoder.max_seq_len:
            continue
        log(f"first token of {length}")
        prompt, repeats = random_prompts(session, [length])[0], min(5, session.args.repeats)
        with measuring(session.device):
            row = {"orthrus_fast": first_token_ms(session.decoder, prompt, repeats)}
        for name, peer in peers.items():
            if name not in skipped:
                try:
                    spans = [peer(prompt, 1).first_token_ms for _ in range(1 + repeats)]
                    row[name] = summary(spans[1:])  # the first one warms up
                except Exception as error:
                    skipped[name] = reason(error)
        yield {"prompt_tokens": length, "ms": row}


def dtypes(text: str) -> list[str]:
    if not set(text.split(",")) <= set(DTYPES):
        raise argparse.ArgumentTypeError(f"not of {', '.join(DTYPES)}")
    return text.split(",")


def build_parser() -> Parser:
    parser = Parser(description=str(__doc__).partition("\n")[0], allow_abbrev=False)
    add_decoder_flags(parser)
    add = parser.add_argument
    text = "one after another; the first one's speeds are shown, and the texts of all compared"
    add("--dtypes", type=dtypes, metavar="T,…", help=text)
    add("--sequences", type=positive, default=8, metavar="N", help="prompts of the file")
    add(
        "--contexts", type=positives, default=[1024], metavar="N,…", help="tokens of random prompts"
    )
    add("--new-tokens", type=positive, default=128, metavar="N")
    add("--repeats", type=positive, default=5, metavar="N", help=f"{ROUNDS} at most a decode")
    parser.set_defaults(slots=1, block_size=None, widths=None, compile_mode="default")
    parser.set_defaults(tensor_parallel=1, temperature=0.0, top_k=None, top_p=None)
    return parser


def compare(args: argparse.Namespace, report: Report) -> Result:
    """Measure in all dtypes; the first one's results also stand at the top."""
    label = "replayed acceptance" if args.shape else "the checkpoint's own drafts"
    part: Result = {"transformers": version_of("transformers"), "label": label, "by_dtype": {}}
    for dtype in args.dtypes or [args.dtype]:
        for found in compare_in(argparse.Namespace(**{**vars(args), "dtype": dtype})):
            part["by_dtype"][found["environment"]["configuration"]["dtype"]] = found
            first = next(iter(part["by_dtype"].values()))
            part |= {name: value for name, value in first.items() if name != "environment"}
            add_shares(part)
            report.describe(first["environment"]["configuration"])
            report.add("parts", "peers", part)
        release_memory()
    return part


def compare_in(args: argparse.Namespace) -> Iterator[Result]:
    """Yield the results in one dtype, as far as they have come, each time that there are more."""
    session = build_session(args)
    skipped: dict[str, str] = {}
    found: Result = {"environment": environment(session.decoder.configuration)}
    found |= {"accept": None, "accept_source": None, **(session.acceptance if args.shape else {})}
    found |= {"at": [], "first_token": [], "skipped": skipped}
    found.pop("label", None)
    peers = find_peers(session, skipped)
    for context, prompts in prompt_sets(session):
        found["at"].append(measure(session, peers, skipped, context, prompts))
        yield found
    for row in first_tokens(session, peers, skipped):
        found["first_token"].append(row)
        yield found


def add_shares(part: Result) -> None:
    """Add to each program's speed how many texts equalled those of AR in each dtype."""
    for i, at in enumerate(part["at"]):
        for name, row in at["tokens_per_second_of"].items():
            row["texts_equal_share_by_dtype"] = {
                dtype: found["at"][i]["tokens_per_second_of"][name]["texts_equal_share"]
                for dtype, found in part["by_dtype"].items()
                if len(found["at"]) > i and name in found["at"][i]["tokens_per_second_of"]
            }


def show(part: Result) -> None:
    """Print a table for each context, one of first tokens, and the reasons of the skipped."""
    console = Console() if sys.stdout.isatty() else Console(width=100)
    for at in part["at"]:
        title = f"after {at['context']} tokens; {part['label'].upper()}: "
        console.print(f"{title}{at['tokens_per_cycle']:.2f} tokens a cycle", style="bold")
        rows = at["tokens_per_second_of"].items()
        print_table(console, "program", [{"program": name, **row} for name, row in rows])
    if part["first_token"]:
        console.print("first token", style="bold")
        print_table(console, "prompt_tokens", part["first_token"])
    for name, why in part["skipped"].items():
        console.print(f"skipped: {name}: {why}", highlight=False, markup=False)


def main(arguments: list[str] | None = None) -> int:
    """Return 0: done, though peers may have been skipped; 2: bad input; 130: interrupted."""
    try:
        parser = build_parser()
        args = parser.parse_args(arguments)
        check_flags(args)
        if args.dtype is not None and args.dtypes is not None:
            raise RequestError("--dtype does not go with --dtypes")
        if args.weights != "checkpoint":
            raise RequestError(f"--weights {args.weights}: others have the checkpoint's own alone")
        show(compare(args, Report("python benchmarks/peers.py", parser, args)))
        return 0
    except OrthrusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
