"""orthrus generate: one prompt, streamed."""

from __future__ import annotations

import argparse
import json
import os
import select
import stat
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from orthrus_fast.cli.flags import build_generate_parser, check_flags, spelled
from orthrus_fast.cli.session import (
    begin_loading,
    budget,
    check_template_flags,
    decode,
    encode,
    load_decoder,
    report,
    sampling,
)
from orthrus_fast.cli.terminal import fail, show_prompt, write_output
from orthrus_fast.errors import CheckpointError, PromptError, RequestError
from orthrus_fast.files import embedded_checkpoint, read_json

if TYPE_CHECKING:
    from orthrus_fast import Decoder, Generation

PATIENCE = 1.0  # seconds of silence before a user is told what is waited for


def run(arguments: Sequence[str], prog: str) -> int:
    """Decode one prompt, or those of a file; return the exit code."""
    parser = build_generate_parser(prog)
    args = parser.parse_args(arguments)
    check_flags(parser, args)
    begin_loading(args)
    if args.prompts_file is not None:
        from orthrus_fast.cli.batch import run_batch

        return run_batch(args)
    demo = choose_demo(args)
    prompt = demo.get("messages") or demo.get("text") or read_prompt(args)
    args.stop = args.stop or demo.get("stop")
    decoder = load_decoder(args)
    check_template_flags(decoder, args)
    if args.check and not decoder.config.has_draft_view:
        raise RequestError(f"--check: {decoder.name} has one mode only, ar")
    if demo:
        show_prompt(prompt if isinstance(prompt, str) else prompt[-1]["content"])
    return answer(decoder, args, encode(decoder, args, prompt), demo.get("expected"))


def answer(decoder: Decoder, args: argparse.Namespace, ids: list[int], expected: Any) -> int:
    """Decode and print the answer, compare it with what is ``expected``; return the exit code."""
    result, interrupted = decode(decoder, args, ids)
    report(decoder, args, result, interrupted)
    if expected is not None and result.finish_reason == "eos":
        equal = as_parsed(result.text) == expected
        print(f"the JSON {'equals' if equal else 'DIFFERS FROM'} the table", file=sys.stderr)
    verdict = None
    try:
        if args.check and not interrupted and result.finish_reason != "error":
            verdict = check(decoder, args, ids, result)
    except KeyboardInterrupt:
        print("check: interrupted", file=sys.stderr)
        interrupted = True
    finally:  # print the first result, however the check ended
        if args.json:
            write_output(as_json(decoder, args, result, verdict) + "\n")
    if result.finish_reason == "error":
        return fail(result.error or "decoding failed")
    if interrupted:
        return 130
    return 0 if verdict is None or verdict["identical"] else 1


def choose_demo(args: argparse.Namespace) -> dict[str, Any]:
    """Return the demo to decode, "records" where no prompt is given; {} if there is a prompt."""
    asked = args.prompt is not None or args.checkpoint is not None
    if args.demo is None and (asked or input_is_piped()):
        return {}
    for flag in ("raw", "system", "thinking"):
        if getattr(args, flag) is not (False if flag == "raw" else None):
            raise RequestError(f"{spelled(flag, args)} needs a prompt: --prompt TEXT, or a pipe")
    path, name = embedded_checkpoint() / "demos.json", args.demo or "records"
    demos = read_json(path)
    if not isinstance(demos, dict) or not isinstance(demos.get(name), dict):
        raise CheckpointError(f"{path}: has no demonstration {name!r}")
    return dict(demos[name])


def as_parsed(text: str) -> Any:
    """Return the JSON value of a text, or the text itself where it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_prompt(args: argparse.Namespace) -> str:
    """Return --prompt, or standard input where that is a pipe or a file; refuse an empty prompt."""
    text = args.prompt if args.prompt not in (None, "-") else read_input(args)
    if not text:
        raise PromptError("prompt: empty; it needs at least one token")
    return str(text)


def read_input(args: argparse.Namespace) -> str:
    """Return all of standard input, however late it ends. Raises PromptError."""
    if args.prompt is None and not input_is_piped():
        raise PromptError("prompt: none given; use --prompt TEXT, or a pipe")
    if sys.stdin is None:
        raise PromptError("standard input: closed; use --prompt TEXT")
    waits = args.prompt is None and os.name == "posix"
    if waits and not select.select([sys.stdin], [], [], PATIENCE)[0]:
        # A program that starts another often gives it a pipe and never writes to it.
        without = "--prompt TEXT" if args.checkpoint else "--prompt, --demo or < /dev/null"
        told = f"reading the prompt from standard input … ({without} does without)"
        print(told, file=sys.stderr, flush=True)
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input: not valid UTF-8 at byte {error.start}") from None


def input_is_piped() -> bool:
    """Return whether standard input is a pipe or a file: neither a terminal nor a socket."""
    if sys.stdin is None:
        return False
    mode = os.fstat(sys.stdin.fileno()).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def check(
    decoder: Decoder, args: argparse.Namespace, ids: list[int], result: Generation
) -> dict[str, Any]:
    """Decode in the other mode, too; print where the two first differ, or both modes' speeds."""
    other = "ar" if args.mode == "diffusion" else "diffusion"
    print(f"check: decoding in {other} mode …", file=sys.stderr)
    params = sampling(args, seed=result.seed)  # which the first decode may have drawn
    limit = budget(decoder, args, len(ids))
    second = decoder.generate(ids, limit, params, other)
    results = {args.mode: result, other: second}
    if results["ar"].tokens != results["diffusion"].tokens:
        return show_difference(decoder, ids, results["ar"].tokens, results["diffusion"].tokens)
    n_tokens = len(result.tokens)
    print(f"check: identical, {n_tokens} tokens in both modes", file=sys.stderr)
    show_speeds(decoder, results)
    return {"identical": True}


def show_difference(
    decoder: Decoder, ids: list[int], ar: list[int], diffusion: list[int]
) -> dict[str, Any]:
    """Print the first difference and the gap of the two best logits there; return both."""
    pairs = zip([*ar, None], [*diffusion, None], strict=False)
    index = next(i for i, (a, d) in enumerate(pairs) if a != d)
    best = decoder.next_logits(ids + ar[:index]).double().topk(2)
    gap = float(best.values[0] - best.values[1])
    got = {"ar": ar[index : index + 1], "diffusion": diffusion[index : index + 1]}
    print(
        f"check: DIFFERENT from token {index}: ar {got['ar']}, diffusion {got['diffusion']}; "
        f"the two best logits there belong to {best.indices.tolist()} and are {gap:.3g} apart",
        file=sys.stderr,
    )
    return {"identical": False, "first_difference": index, "tokens": got, "logit_gap": gap}


def show_speeds(decoder: Decoder, results: dict[str, Generation]) -> None:
    """Print tokens/s of this one run, their ratio, and where it flatters: AR may pay for more rows.

    A CPU's library multiplies whole tiles of rows; where the promise is the narrower one, AR has as
    many rows as a block.
    """
    from orthrus_fast.kernels.plain import ROW_MULTIPLE

    stats = [results[mode].stats for mode in ("diffusion", "ar")]
    rates = [s.tokens_per_second for s in stats if s is not None and s.tokens_per_second]
    if len(rates) < 2:
        return
    gain = rates[0] / rates[1]
    line = f"tokens/s, one run each: diffusion {rates[0]:.1f}, AR {rates[1]:.1f}; {gain:.2f}× the "
    line += f"speed of AR{' (slower)' if gain < 1 else ''}"
    n_rows = decoder.ar_width
    if decoder.runner.device.type == "cpu":
        n_rows = -(-n_rows // ROW_MULTIPLE) * ROW_MULTIPLE
    if n_rows > 1:
        line += f", which multiplies {n_rows} rows a token here (orthrus bench has a one-row AR)"
    print(line, file=sys.stderr)


def as_json(
    decoder: Decoder, args: argparse.Namespace, result: Generation, verdict: dict[str, Any] | None
) -> str:
    """Return what --json prints, in ASCII for any terminal; fields that do not apply are null."""
    fields = {
        "text": result.text,
        "tokens": result.tokens,
        "finish_reason": result.finish_reason,
        "error": result.error,
        "seed": result.seed,
        "stats": asdict(result.stats) if result.stats else None,
        "configuration": {**decoder.configuration, "mode": args.mode},
        "startup": decoder.startup,
        "invariance": asdict(decoder.invariance) if decoder.invariance else None,
        "check": verdict,
    }
    return json.dumps(fields).replace("\x7f", "\\u007f")
