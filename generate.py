"""The command line: parse, load, stream, report. Heavy imports wait until they are needed."""

from __future__ import annotations

import argparse
import json
import logging
import os
import select
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from unicodedata import category

from orthrus_fast import __version__
from orthrus_fast.errors import CheckpointError, OrthrusError, PromptError, RequestError
from orthrus_fast.files import read_json
from orthrus_fast.options import ATTENTION_BACKENDS, MODES, RUNNERS

if TYPE_CHECKING:
    from orthrus_fast import Chunk, Decoder, Generation, SamplingParams
    from orthrus_fast.cli.batch import PromptLine, Results

EMBEDDED = Path(__file__).resolve().parent / "model"
PATIENCE = 3.0  # seconds for a pipe to send something
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"
FILTERS = ("top_k", "top_p", "min_p")
SAMPLING = ("temperature", *FILTERS, "seed", "stop")


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line as everywhere else."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"error: {message} (--help lists the flags)\n")
        raise SystemExit(2)


def build_parser() -> Parser:
    parser = Parser(
        prog="generate.py",
        description="Decode an Orthrus checkpoint, losslessly, several tokens a pass.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--version", action="version", version=f"orthrus-fast {__version__}")
    add("--checkpoint", metavar="DIR_OR_REPO", help="directory or Hub repository (default: model/)")
    add("--revision", help="branch, tag or commit of a Hub repository")
    add("--prompt", metavar="TEXT", help="'-', or a pipe and no --prompt, reads standard input")
    demo = "a built-in prompt of the embedded checkpoint (default: records)"
    add("--demo", choices=("records", "code", "prose"), help=demo)
    add("--system", metavar="TEXT", help="system message; an empty one is sent, too")
    add("--raw", action="store_true", help="complete the prompt as it stands, without a template")
    thinking = "ask the template to let the model think, or not (its default: not given)"
    add("--thinking", action=argparse.BooleanOptionalAction, default=None, help=thinking)
    add("--interactive", action="store_true", help="a chat of several turns")
    lines = 'JSON Lines: objects with "prompt", "messages" or "ids"; "id" and settings optional'
    add("--prompts-file", metavar="FILE", help=lines)
    results = "its results, a line as each ends; a killed run goes on from there; '-': printed"
    add("--output", metavar="FILE", help=results)
    add("--slots", type=int, default=1, metavar="B", help="prompts decoded at once (default: 1)")
    width = "rows of a block, 2 or more (default and most: the checkpoint's own)"
    add("--block-size", type=int, metavar="K", help=width)
    add("--max-new-tokens", type=int, default=256, metavar="N", help="budget (default: 256)")
    add("--max-seq-len", type=int, metavar="N", help="prompt plus new tokens (default: 4096)")
    add("--mode", choices=MODES, default="diffusion", help="default: diffusion")
    settings = "greedy (the default), or generation_config.json's, under the flags given here"
    add("--sampling", choices=("checkpoint", "greedy"), help=settings)
    add("--temperature", type=float, metavar="T", help="above 0 samples (default: 0, greedy)")
    add("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="among the likeliest that sum up to P")
    add("--min-p", type=float, metavar="P", help="those at least P times as likely as the best")
    add("--seed", type=int, metavar="S", help="of the noise: the same gives the same text")
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    add("--device", metavar="D", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--dtype", metavar="T", help="float32, bfloat16, float16 or float64")
    add("--runner", choices=("auto", *RUNNERS), default="auto")
    add("--attention", choices=("auto", *ATTENTION_BACKENDS), default="auto")
    add("--show-blocks", action="store_true", help="mark the text that came from accepted drafts")
    add("--check", action="store_true", help="decode in both modes; exit 1 if a token differs")
    add("--json", action="store_true", help="print one JSON object in place of the text")
    add("--info", action="store_true", help="say what the checkpoint is and needs, and stop")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """0: done; 1: --check found a difference; 2: bad input; 130: interrupted; 141: nobody reads.

    With --prompts-file a prompt that failed is a result like any other: 0.
    """
    prepare_streams()
    try:
        return run(build_parser().parse_args(arguments))
    except OrthrusError as error:
        return fail(str(error))
    except ModuleNotFoundError as error:
        return fail(f"{error.name} is not installed; run: pip install -e . beside generate.py")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as head does
        drop_output()
        return 141
    except OSError as error:  # a full disk, say
        drop_output()
        return fail(str(error))


def prepare_streams() -> None:
    """Make printing safe: a stream may be closed, and not every terminal can show every text."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (it is to stay open)
    for output in (sys.stdout, sys.stderr):
        if output is not None:
            output.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("orthrus_fast").setLevel(logging.INFO)


def fail(problem: str) -> int:
    line = printable(problem, True).replace("\n", "\\n").replace("\t", "\\t")
    print(f"error: {line}", file=sys.stderr)
    return 2


def drop_output() -> None:
    """Python flushes standard output once more as it ends; let that succeed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(args: argparse.Namespace) -> int:
    check_flags(args)
    if args.info:
        return show_info(args)
    sampling(args)  # refuses what is out of range, before anything is loaded
    if args.prompts_file is not None:
        return run_batch(args)
    demo = choose_demo(args)
    prompt = "" if args.interactive or demo else read_prompt(args)
    decoder = load_decoder(args)
    if args.interactive:
        return chat(decoder, args)
    check_template_flags(decoder, args)
    if args.check and not decoder.config.has_draft_view:
        raise RequestError(f"--check: {decoder.name} has one mode only, ar")
    ids = encode(decoder, args, demo or {"text": prompt})
    result, interrupted = decode(decoder, args, ids)
    report(decoder, args, result, interrupted)
    if "expected" in demo and result.finish_reason == "eos":
        equal = as_parsed(result.text) == demo["expected"]
        print(f"the JSON {'equals' if equal else 'DIFFERS FROM'} the table", file=sys.stderr)
    verdict = None
    try:
        if args.check and not interrupted:
            verdict = check(decoder, args, ids, result)
    except KeyboardInterrupt:
        print("check: interrupted", file=sys.stderr)
        interrupted = True
    finally:  # whatever became of the check, the first decode is done
        if args.json:
            print(as_json(decoder, args, result, verdict), flush=True)
    if interrupted:
        return 130
    return 0 if verdict is None or verdict["identical"] else 1


def check_flags(args: argparse.Namespace) -> None:
    """Refuse, before anything is loaded, flags that would be ignored or cannot be served."""
    if sys.stdout is None:
        raise RequestError("standard output: closed")
    parser = build_parser()
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    chat_flags = ("system", "thinking")
    one_text = ("prompt", "demo", "interactive", "json", "check", "show_blocks", "info")
    refused: dict[str, tuple[str, ...]] = {
        "prompts_file": one_text,
        "interactive": ("prompt", "json", "check", "raw", "demo", "info"),
        "demo": ("prompt", "checkpoint", "raw", "info", *chat_flags),
        "raw": chat_flags,
        "json": ("show_blocks",),
        "info": tuple({*vars(args)} - {"info", "checkpoint", "revision", "max_seq_len"}),
    }
    for flag in given:
        for other in given:
            if other in refused.get(flag, ()):
                raise RequestError(f"{spelled(flag, args)} does not go with {spelled(other, args)}")
    if args.max_new_tokens < 1:
        raise RequestError(f"max_new_tokens: {args.max_new_tokens} is below 1")
    for flag, other in (("prompts_file", "output"), ("output", "prompts_file")):
        if getattr(args, flag) is not None and getattr(args, other) is None:
            raise RequestError(f"{spelled(flag, args)} needs {spelled(other, args)}")
    check_sampling_flags(args)


def check_sampling_flags(args: argparse.Namespace) -> None:
    """Refuse filters where nothing samples; the lines of a prompts file may still ask for that."""
    if args.sampling == "greedy" and args.temperature:
        raise RequestError("--sampling greedy does not go with --temperature")
    samples = args.temperature or (args.temperature is None and args.sampling == "checkpoint")
    if not samples and args.prompts_file is None:
        for flag in FILTERS:
            if getattr(args, flag) is not None:
                needs = "--temperature above 0, or --sampling checkpoint"
                raise RequestError(f"{spelled(flag, args)} needs {needs}")


def spelled(name: str, args: argparse.Namespace) -> str:
    """A flag as the user wrote it."""
    negated = name == "thinking" and args.thinking is False
    return f"--{'no-' if negated else ''}{name.replace('_', '-')}"


def choose_demo(args: argparse.Namespace) -> dict[str, Any]:
    """The built-in prompt to decode: what --demo names, "records" without any prompt, else {}."""
    asked = args.prompt is not None or args.checkpoint is not None or args.interactive
    if args.demo is None and (asked or input_is_piped()):
        return {}
    if args.raw:
        raise RequestError("--raw: there is no prompt to complete; use --prompt TEXT or a pipe")
    path, name = EMBEDDED / "demos.json", args.demo or "records"
    demos = read_json(path)
    if not isinstance(demos, dict) or not isinstance(demos.get(name), dict):
        raise CheckpointError(f"{path}: has no demonstration {name!r}")
    return dict(demos[name])


def as_parsed(text: str) -> Any:
    """The JSON value of a text; the text itself where it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_prompt(args: argparse.Namespace) -> str:
    """--prompt, or standard input where that is a pipe or a file; never empty."""
    text = args.prompt if args.prompt not in (None, "-") else read_input(args)
    if not text:
        raise PromptError("prompt: empty; it needs at least one token")
    return str(text)


def read_input(args: argparse.Namespace) -> str:
    if args.prompt is None and not input_is_piped():
        raise PromptError("prompt: none given; use --prompt TEXT, a pipe, or --interactive")
    if sys.stdin is None:
        raise PromptError("standard input: closed; use --prompt TEXT")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input: not valid UTF-8 at byte {error.start}") from None


def input_is_piped() -> bool:
    """Whether standard input is a file, or a pipe in which something comes, or ends, in time."""
    if sys.stdin is None:
        return False
    mode = os.fstat(sys.stdin.fileno()).st_mode
    if stat.S_ISFIFO(mode) and os.name == "posix":
        if select.select([sys.stdin], [], [], PATIENCE)[0]:
            return True
        # Programs that start others often leave them a pipe that nobody writes to.
        print("nothing comes from standard input; --prompt - waits for it", file=sys.stderr)
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def load_decoder(args: argparse.Namespace) -> Decoder:
    from orthrus_fast import load

    with progress_bar("loading") as progress:
        return load(
            args.checkpoint if args.checkpoint is not None else EMBEDDED,
            device=args.device,
            dtype=args.dtype,
            max_seq_len=args.max_seq_len,
            runner=args.runner,
            attention=args.attention,
            slots=args.slots,
            block_size=args.block_size,
            revision=args.revision,
            draft_view=args.mode == "diffusion" or args.check,
            progress=progress,
        )


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes on a terminal's standard error, once the work has taken a second."""
    import time

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(what)
    begun = time.monotonic()

    def update(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if sys.stderr.isatty() and time.monotonic() - begun > 1:
            bar.start()

    try:
        yield update
    finally:
        if bar.live.is_started:  # stopping prints an empty line even where nothing was shown
            bar.stop()


def encode(decoder: Decoder, args: argparse.Namespace, prompt: dict[str, Any]) -> list[int]:
    """Ids of a prompt's "messages", or of its "text": a user message where there is a template.

    ``--raw``, and a demonstration of raw text, complete the text as it stands.
    """
    if "messages" in prompt:
        return encode_chat(decoder, args, prompt["messages"])
    if has_template(decoder) and not args.raw and not args.demo:
        return encode_chat(decoder, args, [message("user", prompt["text"])])
    return decoder.encode(prompt["text"])


def encode_chat(
    decoder: Decoder, args: argparse.Namespace, messages: list[dict[str, Any]]
) -> list[int]:
    """Ids of a chat, after --system's message where it has none of its own."""
    if decoder.tokenizer is None:
        return decoder.encode(messages)  # which says what is missing
    if messages and messages[0].get("role") != "system":
        messages = [*system_message(args), *messages]
    return decoder.tokenizer.encode_chat(messages, enable_thinking=args.thinking)


def has_template(decoder: Decoder) -> bool:
    return decoder.tokenizer is not None and decoder.tokenizer.has_chat_template


def check_template_flags(decoder: Decoder, args: argparse.Namespace) -> None:
    """Refuse what the checkpoint's template cannot serve; warn of greedy decoding with thinking."""
    for flag in ("system", "thinking"):
        if getattr(args, flag) is not None and not has_template(decoder):
            raise RequestError(f"{spelled(flag, args)}: {decoder.name} has no chat template")
    if args.thinking is None:
        return
    assert decoder.tokenizer is not None
    if not decoder.tokenizer.chat_template.mentions("enable_thinking"):
        flag = spelled("thinking", args)
        raise RequestError(f"{flag}: the template of {decoder.name} has no such mode")
    if args.thinking and resolved(decoder, sampling(args)).temperature == 0:
        print(
            "warning: Qwen advises against greedy decoding in thinking mode; "
            "--sampling checkpoint takes the checkpoint's own settings",
            file=sys.stderr,
        )


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def system_message(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [] if args.system is None else [message("system", args.system)]


def sampling(args: argparse.Namespace, **instead: Any) -> SamplingParams:
    """What the flags ask for, and ``instead`` where it says otherwise."""
    from orthrus_fast import SamplingParams

    given = {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}
    given |= {"stop": tuple(given.get("stop", ()))} | instead
    if args.sampling == "checkpoint":
        return SamplingParams.from_checkpoint(**given)
    return SamplingParams(**given)


def resolved(decoder: Decoder, params: SamplingParams) -> SamplingParams:
    """With the checkpoint's values where --sampling checkpoint leaves them to it."""
    return params.resolved(dict(decoder.config.sampling_defaults))


def decode(decoder: Decoder, args: argparse.Namespace, ids: list[int]) -> tuple[Generation, bool]:
    """Stream the answer to the terminal; Ctrl-C ends it with what was written so far."""
    stream = decoder.stream(ids, args.max_new_tokens, sampling(args), args.mode)
    interrupted = False
    try:
        for chunk in stream:
            if not args.json:
                sys.stdout.write(render(chunk, args.show_blocks, sys.stdout.isatty()))
                sys.stdout.flush()
    except KeyboardInterrupt:
        interrupted = True
        stream.close()
    if not args.json:
        print(flush=True)
    return stream.result, interrupted


def render(chunk: Chunk, show_blocks: bool, terminal: bool) -> str:
    """The chunk's text; with ``show_blocks`` what came from drafts in green, or in ⟨…⟩."""
    accepted = printable("".join(chunk.pieces[: chunk.n_accepted]), terminal)
    own = printable("".join(chunk.pieces[chunk.n_accepted :]), terminal)
    if not show_blocks or not accepted:
        return accepted + own
    if terminal and not os.environ.get("NO_COLOR"):
        return f"{GREEN}{accepted}{PLAIN}{own}"
    return f"⟨{accepted}⟩{own}"


def printable(text: str, terminal: bool) -> str:
    """Escape control characters for a terminal: a model must not move its cursor or its title."""
    if not terminal:
        return text
    return "".join(
        c.encode("unicode_escape").decode() if category(c) == "Cc" and c not in "\n\t" else c
        for c in text
    )


def report(
    decoder: Decoder, args: argparse.Namespace, result: Generation, interrupted: bool
) -> None:
    """One line on standard error, and a second where the budget or Ctrl-C ended the text."""
    stats = result.stats
    if stats is None:
        print("interrupted before the first token", file=sys.stderr)
        return
    parts = [f"{len(result.tokens)} tokens"]
    if stats.tokens_per_cycle is not None:
        parts.append(f"{stats.tokens_per_cycle:.2f} tokens per cycle in {stats.cycles} cycles")
    if stats.tokens_per_second is not None:
        parts.append(f"{stats.tokens_per_second:.1f} tokens/s")
    parts.append(f"first token after {stats.time_to_first_token:.3f} s")
    settings = decoder.configuration
    parts.append(f"{args.mode} on {settings['device']} ({settings['dtype']}, {settings['runner']})")
    if result.seed is not None:
        parts.append(f"seed {result.seed}")
    print(" · ".join(parts), file=sys.stderr)
    if interrupted:
        print("interrupted: the text above is what was written so far", file=sys.stderr)
    elif result.finish_reason == "length":
        budget = f"the budget of {args.max_new_tokens} tokens ended the text"
        print(f"{budget}; --max-new-tokens raises it", file=sys.stderr)


def check(
    decoder: Decoder, args: argparse.Namespace, ids: list[int], result: Generation
) -> dict[str, Any]:
    """Decode in the other mode, too; say where the two first differ, or what drafting gained."""
    other = "ar" if args.mode == "diffusion" else "diffusion"
    print(f"check: decoding in {other} mode …", file=sys.stderr)
    params = sampling(args, seed=result.seed)  # which may have been drawn
    second = decoder.generate(ids, args.max_new_tokens, params, other)
    results = {args.mode: result, other: second}
    if results["ar"].tokens != results["diffusion"].tokens:
        return show_difference(decoder, ids, results["ar"].tokens, results["diffusion"].tokens)
    n_tokens = len(result.tokens)
    print(f"check: identical, {n_tokens} tokens in both modes", file=sys.stderr)
    single = "AR by one row" + (", greedy" if resolved(decoder, params).temperature else "")
    show_speeds(results, decoder.generate_one_row(ids, args.max_new_tokens), single)
    return {"identical": True}


def show_difference(
    decoder: Decoder, ids: list[int], ar: list[int], diffusion: list[int]
) -> dict[str, Any]:
    pairs = zip([*ar, None], [*diffusion, None], strict=False)
    index = next(i for i, (a, d) in enumerate(pairs) if a != d)
    best = decoder.next_logits(ids + ar[:index]).double().topk(2)
    gap = float(best.values[0] - best.values[1])
    got = {"ar": ar[index : index + 1], "diffusion": diffusion[index : index + 1]}
    print(
        f"check: DIFFERENT from token {index}: ar {got['ar']}, diffusion {got['diffusion']}; "
        f"the two best logits there are of {best.indices.tolist()}, {gap:.3g} apart",
        file=sys.stderr,
    )
    return {"identical": False, "first_difference": index, "tokens": got, "logit_gap": gap}


def show_speeds(results: dict[str, Generation], one_row: Generation, name: str) -> None:
    """Tokens/s of this one run; the gain over the faster AR, never over the slower."""
    stats = (results["diffusion"].stats, results["ar"].stats, one_row.stats)
    rates = [s.tokens_per_second for s in stats if s is not None and s.tokens_per_second]
    if len(rates) == 3:
        diffusion, padded, single = rates
        print(
            f"tokens/s, one run each: diffusion {diffusion:.1f}, AR by the same pass {padded:.1f}, "
            f"{name} {single:.1f}; {diffusion / max(padded, single):.2f} times the faster",
            file=sys.stderr,
        )


def as_json(
    decoder: Decoder, args: argparse.Namespace, result: Generation, verdict: dict[str, Any] | None
) -> str:
    """What --json prints; fields that do not apply are null. ASCII, for any terminal or locale."""
    fields = {
        "text": result.text,
        "tokens": result.tokens,
        "finish_reason": result.finish_reason,
        "seed": result.seed,
        "stats": asdict(result.stats) if result.stats else None,
        "configuration": {**decoder.configuration, "mode": args.mode},
        "startup": decoder.startup,
        "invariance": asdict(decoder.invariance) if decoder.invariance else None,
        "check": verdict,
    }
    return json.dumps(fields).replace("\x7f", "\\u007f")


def chat(decoder: Decoder, args: argparse.Namespace) -> int:
    """Turns of a chat until end of input; Ctrl-C ends an answer, or at the prompt the chat."""
    if not has_template(decoder):
        raise RequestError(f"--interactive: {decoder.name} has no chat template")
    if sys.stdin is None:
        raise RequestError("standard input: closed; --interactive reads it")
    check_template_flags(decoder, args)
    messages: list[dict[str, Any]] = []
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        except UnicodeDecodeError:
            raise PromptError("standard input: not valid UTF-8") from None
        if not text.strip():
            continue
        turn = [*messages, message("user", text)]
        try:
            result, interrupted = decode(decoder, args, encode_chat(decoder, args, turn))
        except PromptError as error:  # this turn is dropped, what was said before stays
            fail(f"{error} (this turn is dropped; start anew for more room)")
            continue
        report(decoder, args, result, interrupted)
        messages = [*turn, message("assistant", result.text)]


def run_batch(args: argparse.Namespace) -> int:
    """--prompts-file to --output; what is there already is not done again."""
    from orthrus_fast.cli import batch

    lines = batch.read_prompts(args.prompts_file)
    asked = batch.parameters(lines, lambda own: sampling(args, **{"seed": None, **own}))
    with batch.Results(args.output) as results:
        decoder = load_decoder(args)
        check_template_flags(decoder, args)
        params = [resolved(decoder, one) for one in asked]
        assert decoder.checkpoint is not None  # loaded from one
        settings = batch_settings(args, resolved(decoder, sampling(args)))
        header = batch.make_header(decoder, decoder.checkpoint, lines, settings, args.seed)
        drawing = any(one.temperature > 0 and one.seed is None for one in params)
        seed = results.begin(header, lines, draw_seed=drawing)
        params = batch.seeded(params, seed)
        todo = [line for line in lines if line.index not in results.done]
        done = batch.decode(
            decoder,
            todo,
            [params[line.index] for line in todo],
            lambda line: encode_line(decoder, args, line),
            args.max_new_tokens,
            args.mode,
        )
        return write_results(results, done, len(lines), seed)


def batch_settings(args: argparse.Namespace, params: SamplingParams) -> dict[str, Any]:
    """What decides the texts beside the decoder's configuration."""
    from orthrus_fast.cli.batch import sampling_settings

    names = ("mode", "max_new_tokens", "raw", "system", "thinking")
    return {name: getattr(args, name) for name in names} | {"sampling": sampling_settings(params)}


def encode_line(decoder: Decoder, args: argparse.Namespace, line: PromptLine) -> list[int]:
    """Ids of a prompt of a file. Raises PromptError or TemplateError: it alone fails."""
    if line.kind == "ids":
        return list(line.prompt)
    if not line.prompt:
        raise PromptError(f"{line.kind}: empty; it needs at least one token")
    return encode(decoder, args, {"text" if line.kind == "prompt" else line.kind: line.prompt})


def write_results(
    results: Results,
    done: Iterator[tuple[PromptLine, Generation]],
    n_prompts: int,
    seed: int | None,
) -> int:
    """Write what comes, as it comes; a line of facts at the end. Returns the exit code.

    That is 0 with failed prompts, too: they have results, which say what was wrong.
    """
    import time

    before, n_tokens, n_failed = len(results.done), 0, 0
    begun = time.perf_counter()
    try:
        with batch_bar(n_prompts, before) as show:
            for line, generation in done:
                results.write(line, generation)
                n_tokens += len(generation.tokens)
                n_failed += generation.error is not None
                show(len(results.done), n_tokens / (time.perf_counter() - begun))
    except KeyboardInterrupt:
        more = "; the same command does the rest" if results.resumable else ""
        there = f"{len(results.done)} of {n_prompts} prompts are done{more}"
        print(f"interrupted: {there}", file=sys.stderr)
        return 130
    rate = n_tokens / (time.perf_counter() - begun)
    parts = [f"{n_prompts - before} prompts", f"{n_tokens} tokens", f"{rate:.1f} tokens/s"]
    parts.append(f"{n_failed} failed" + (", as their results say" if n_failed else ""))
    parts += [f"{before} were done before"] if before else []
    parts += [f"seed {seed}"] if seed is not None else []
    print(" · ".join(parts), file=sys.stderr)
    return 0


@contextmanager
def batch_bar(n_prompts: int, before: int) -> Iterator[Callable[[int, float], None]]:
    """Prompts done and tokens/s on a terminal's standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    rate = TextColumn("{task.fields[rate]:.1f} tokens/s")
    console = Console(stderr=True)
    bar = Progress("prompts", BarColumn(), MofNCompleteColumn(), rate, console=console)
    task = bar.add_task("", total=n_prompts, completed=before, rate=0.0)
    if not sys.stderr.isatty():
        yield lambda done, rate: None
        return
    with bar:
        yield lambda done, rate: bar.update(task, completed=done, rate=rate)


def show_info(args: argparse.Namespace) -> int:
    import torch

    from orthrus_fast.checkpoint import count_weights, open_checkpoint
    from orthrus_fast.loading import check_max_seq_len, memory_needed

    path = args.checkpoint if args.checkpoint is not None else EMBEDDED
    checkpoint = open_checkpoint(path, revision=args.revision)
    config = checkpoint.config
    length = check_max_seq_len(args.max_seq_len, config)
    views = "autoregressive and draft" if config.has_draft_view else "autoregressive only"
    facts = {
        "checkpoint": f"{checkpoint.name}"
        + (f" at {checkpoint.commit}" if checkpoint.commit else ""),
        "directory": checkpoint.directory,
        "views": views,
        "block size": config.block_size or "none",
        "parameters": f"{count_weights(config) / 1e6:.1f} million",
        "layers": f"{config.n_layers}, hidden size {config.hidden_size}",
        "heads": f"{config.n_heads}, KV heads {config.n_kv_heads}, head size {config.head_dim}",
        "vocabulary": f"{config.vocab_size}, tied: {'yes' if config.tie_word_embeddings else 'no'}",
        "positions": f"{config.max_position_embeddings}, RoPE {config.rope.type}",
        "end tokens": ", ".join(map(str, config.eos_token_ids)) or "none",
        "on disk": f"{checkpoint.weight_bytes / 1e9:.3f} GB of weights",
    }
    cpu = torch.device("cpu")
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        facts[f"needs in {name}"] = (
            f"{memory_needed(config, dtype, cpu, length, 1)} at {length} tokens"
        )
    for name, fact in facts.items():
        print(f"{name:18}{printable(str(fact), True)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
