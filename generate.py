"""The command line: parses flags, loads a checkpoint, streams the text, reports.

Imports that take long stand where they are needed, so that --help is quick.
"""

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
PATIENCE = 3.0  # seconds to wait for the first data of a pipe
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"
FILTERS = ("top_k", "top_p", "min_p")
SAMPLING = ("temperature", *FILTERS, "seed", "stop")


class Parser(argparse.ArgumentParser):
    """Prints errors as one line, as every other error of this program is printed."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"error: {message} (--help lists the flags)\n")
        raise SystemExit(2)


def build_parser() -> Parser:
    """Return the parser of all flags, which --help lists by group."""
    parser = Parser(
        prog="generate.py",
        description="Decode an Orthrus checkpoint losslessly, several tokens per cycle.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"orthrus-fast {__version__}")
    add_prompt_flags(parser.add_argument_group("checkpoint and prompt"))
    add_decoding_flags(parser.add_argument_group("decoding"))
    add_sampling_flags(parser.add_argument_group("sampling"))
    add_machine_flags(parser.add_argument_group("machine"))
    add_output_flags(parser.add_argument_group("output"))
    return parser


def add_prompt_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say what is decoded."""
    add = group.add_argument
    add("--checkpoint", metavar="DIR_OR_REPO", help="directory or Hub repository (default: model/)")
    add("--revision", help="branch, tag or commit of a Hub repository")
    prompt = "text of the prompt; '-' reads standard input, as a pipe without --prompt does"
    add("--prompt", metavar="TEXT", help=prompt)
    demo = "a built-in prompt of the embedded checkpoint (default: records)"
    add("--demo", choices=("records", "code", "prose"), help=demo)
    add("--system", metavar="TEXT", help="system message; an empty one is sent, too")
    raw = "continue the prompt as it is, without the chat template"
    add("--raw", action="store_true", help=raw)
    thinking = "ask the chat template for thinking, or for none (default: the template decides)"
    add("--thinking", action=argparse.BooleanOptionalAction, default=None, help=thinking)
    add("--interactive", action="store_true", help="chat in several turns")
    lines = 'JSON Lines: objects with "prompt", "messages" or "ids"; "id" and settings optional'
    add("--prompts-file", metavar="FILE", help=lines)
    results = (
        "results of --prompts-file, a line as soon as each is finished ('-': print them); "
        "the same command resumes a run that was killed"
    )
    add("--output", metavar="FILE", help=results)


def add_decoding_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say how, and how much, is decoded."""
    add = group.add_argument
    slots = "prompts decoded at the same time (default: 1)"
    add("--slots", type=int, default=1, metavar="B", help=slots)
    width = "width of a block, from 2 to the checkpoint's block size (the default)"
    add("--block-size", type=int, metavar="K", help=width)
    limit = "new tokens at most (default: 256)"
    add("--max-new-tokens", type=int, default=256, metavar="N", help=limit)
    length = "prompt and new tokens at most (default: 4096, or the model's limit)"
    add("--max-seq-len", type=int, metavar="N", help=length)
    mode = "diffusion drafts and verifies blocks; ar decodes a token per pass (default: diffusion)"
    add("--mode", choices=MODES, default="diffusion", help=mode)


def add_sampling_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that become SamplingParams."""
    add = group.add_argument
    settings = "greedy (default), or the values of generation_config.json; flags override them"
    add("--sampling", choices=("checkpoint", "greedy"), help=settings)
    add("--temperature", type=float, metavar="T", help="sample, if above 0 (default: 0, greedy)")
    add("--top-k", type=int, metavar="K", help="sample among the K most likely tokens")
    top_p = "sample among the most likely tokens whose probabilities sum up to P"
    add("--top-p", type=float, metavar="P", help=top_p)
    min_p = "sample among the tokens at least P times as likely as the most likely one"
    add("--min-p", type=float, metavar="P", help=min_p)
    add("--seed", type=int, metavar="S", help="seed of the noise; the same gives the same text")
    add("--stop", action="append", metavar="TEXT", help="end the text before TEXT; may be repeated")


def add_machine_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say where and with what the passes run."""
    add = group.add_argument
    add("--device", metavar="D", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--dtype", metavar="T", help="float32, bfloat16, float16 or float64")
    runner = "how passes run (default: auto, which is graph on CUDA and eager on a CPU)"
    add("--runner", choices=("auto", *RUNNERS), default="auto", help=runner)
    backend = "attention backend (default: auto)"
    add("--attention", choices=("auto", *ATTENTION_BACKENDS), default="auto", help=backend)


def add_output_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say what is printed."""
    add = group.add_argument
    blocks = "mark the text that comes from accepted proposals"
    add("--show-blocks", action="store_true", help=blocks)
    add("--check", action="store_true", help="decode in both modes; exit with 1 if a token differs")
    add("--json", action="store_true", help="print one JSON object instead of the text")
    add("--info", action="store_true", help="print what the checkpoint is and needs, and exit")


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code.

    0: done; 1: --check found a difference; 2: bad input; 130: interrupted; 141: the reader of the
    output closed it. With --prompts-file a prompt that failed is a result like any other: 0.
    """
    prepare_streams()
    try:
        return run(build_parser().parse_args(arguments))
    except OrthrusError as error:
        return fail(str(error))
    except ModuleNotFoundError as error:
        return fail(
            f"{error.name} is not installed; run: pip install -e . in the folder of generate.py"
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output closed it, as head does
        drop_output()
        return 141
    except OSError as error:  # for example, a full disk
        drop_output()
        return fail(str(error))


def prepare_streams() -> None:
    """Make printing safe: a stream may be closed, or a terminal may lack a character."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (it is to stay open)
    for output in (sys.stdout, sys.stderr):
        if output is not None:
            output.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("orthrus_fast").setLevel(logging.INFO)


def fail(problem: str) -> int:
    """Print an error as one line and return the exit code of bad input."""
    line = printable(problem, True).replace("\n", "\\n").replace("\t", "\\t")
    print(f"error: {line}", file=sys.stderr)
    return 2


def drop_output() -> None:
    """Let the last flush of standard output succeed, which Python does as it exits."""
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
    finally:  # print the first result, however the check ended
        if args.json:
            print(as_json(decoder, args, result, verdict), flush=True)
    if interrupted:
        return 130
    return 0 if verdict is None or verdict["identical"] else 1


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict others or would have no effect, before anything is loaded."""
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
    """Refuse filters without sampling, except that lines of a prompts file may ask to sample."""
    if args.sampling == "greedy" and args.temperature:
        raise RequestError("--sampling greedy does not go with --temperature")
    samples = args.temperature or (args.temperature is None and args.sampling == "checkpoint")
    if not samples and args.prompts_file is None:
        for flag in FILTERS:
            if getattr(args, flag) is not None:
                needs = "--temperature above 0, or --sampling checkpoint"
                raise RequestError(f"{spelled(flag, args)} needs {needs}")


def spelled(name: str, args: argparse.Namespace) -> str:
    """Return a flag as the user wrote it."""
    negated = name == "thinking" and args.thinking is False
    return f"--{'no-' if negated else ''}{name.replace('_', '-')}"


def choose_demo(args: argparse.Namespace) -> dict[str, Any]:
    """Return the demo to decode, "records" where no prompt is given; {} if there is a prompt."""
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
    """Return all of standard input. Raises PromptError."""
    if args.prompt is None and not input_is_piped():
        raise PromptError("prompt: none given; use --prompt TEXT, a pipe, or --interactive")
    if sys.stdin is None:
        raise PromptError("standard input: closed; use --prompt TEXT")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input: not valid UTF-8 at byte {error.start}") from None


def input_is_piped() -> bool:
    """Return whether standard input is a file, or a pipe that sends data or closes in time."""
    if sys.stdin is None:
        return False
    mode = os.fstat(sys.stdin.fileno()).st_mode
    if stat.S_ISFIFO(mode) and os.name == "posix":
        if select.select([sys.stdin], [], [], PATIENCE)[0]:
            return True
        # A program that starts another often gives it a pipe and never writes to it.
        print("no data on standard input; --prompt - waits for it", file=sys.stderr)
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def load_decoder(args: argparse.Namespace) -> Decoder:
    """Load the checkpoint as the flags say."""
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
    """Show a bar of bytes on a terminal's standard error, once the work has taken a second."""
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
    """Return the ids of a prompt.

    "messages" are chat messages. "text" is a user message where there is a chat template; with
    ``--raw``, and in a demo, the model continues the text as it is.
    """
    if "messages" in prompt:
        return encode_chat(decoder, args, prompt["messages"])
    if has_template(decoder) and not args.raw and not args.demo:
        return encode_chat(decoder, args, [message("user", prompt["text"])])
    return decoder.encode(prompt["text"])


def encode_chat(
    decoder: Decoder, args: argparse.Namespace, messages: list[dict[str, Any]]
) -> list[int]:
    """Return the ids of a chat; --system's message comes first where the chat has none."""
    if decoder.tokenizer is None:
        return decoder.encode(messages)  # which says what is missing
    if messages and messages[0].get("role") != "system":
        messages = [*system_message(args), *messages]
    return decoder.tokenizer.encode_chat(messages, enable_thinking=args.thinking)


def has_template(decoder: Decoder) -> bool:
    """Return whether the checkpoint has a chat template."""
    return decoder.tokenizer is not None and decoder.tokenizer.has_chat_template


def check_template_flags(decoder: Decoder, args: argparse.Namespace) -> None:
    """Refuse flags that the chat template does not support; warn of greedy thinking."""
    for flag in ("system", "thinking"):
        if getattr(args, flag) is not None and not has_template(decoder):
            raise RequestError(f"{spelled(flag, args)}: {decoder.name} has no chat template")
    if args.thinking is None:
        return
    assert decoder.tokenizer is not None
    if not decoder.tokenizer.chat_template.mentions("enable_thinking"):
        flag = spelled("thinking", args)
        raise RequestError(f"{flag}: the template of {decoder.name} has no thinking mode")
    if args.thinking and resolved(decoder, sampling(args)).temperature == 0:
        print(
            "warning: Qwen advises against greedy decoding in thinking mode; "
            "--sampling checkpoint takes the checkpoint's own settings",
            file=sys.stderr,
        )


def message(role: str, content: str) -> dict[str, Any]:
    """Return a chat message."""
    return {"role": role, "content": content}


def system_message(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the message of --system, or nothing."""
    return [] if args.system is None else [message("system", args.system)]


def sampling(args: argparse.Namespace, **instead: Any) -> SamplingParams:
    """Return the sampling settings of the flags, overridden by those of ``instead``."""
    from orthrus_fast import SamplingParams

    given = {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}
    given |= {"stop": tuple(given.get("stop", ()))} | instead
    if args.sampling == "checkpoint":
        return SamplingParams.from_checkpoint(**given)
    return SamplingParams(**given)


def resolved(decoder: Decoder, params: SamplingParams) -> SamplingParams:
    """Return the settings with the checkpoint's values filled in, for --sampling checkpoint."""
    return params.resolved(dict(decoder.config.sampling_defaults))


def decode(decoder: Decoder, args: argparse.Namespace, ids: list[int]) -> tuple[Generation, bool]:
    """Stream the answer to the terminal; Ctrl-C ends it and keeps what was written so far."""
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
    if stream.result.error is not None:
        raise RequestError(stream.result.error)
    return stream.result, interrupted


def render(chunk: Chunk, show_blocks: bool, terminal: bool) -> str:
    """Return a chunk's text; ``show_blocks`` marks accepted proposals in green, or by ⟨…⟩."""
    accepted = printable("".join(chunk.pieces[: chunk.n_accepted]), terminal)
    bonus = printable("".join(chunk.pieces[chunk.n_accepted :]), terminal)
    if not show_blocks or not accepted:
        return accepted + bonus
    if terminal and not os.environ.get("NO_COLOR"):
        return f"{GREEN}{accepted}{PLAIN}{bonus}"
    return f"⟨{accepted}⟩{bonus}"


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
    """Print a line on standard error, and another if Ctrl-C or the token limit ended the text."""
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
        ended = f"the text ended at its limit of {args.max_new_tokens} new tokens"
        print(f"{ended}; --max-new-tokens raises it", file=sys.stderr)


def check(
    decoder: Decoder, args: argparse.Namespace, ids: list[int], result: Generation
) -> dict[str, Any]:
    """Decode in the other mode, too; print where the two first differ, or both modes' speeds."""
    other = "ar" if args.mode == "diffusion" else "diffusion"
    print(f"check: decoding in {other} mode …", file=sys.stderr)
    params = sampling(args, seed=result.seed)  # which the first decode may have drawn
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


def show_speeds(results: dict[str, Generation], one_row: Generation, name: str) -> None:
    """Print tokens/s of this one run, and the gain over the faster AR."""
    stats = (results["diffusion"].stats, results["ar"].stats, one_row.stats)
    rates = [s.tokens_per_second for s in stats if s is not None and s.tokens_per_second]
    if len(rates) == 3:
        diffusion, padded, single = rates
        print(
            f"tokens/s, one run each: diffusion {diffusion:.1f}, AR by the same pass {padded:.1f}, "
            f"{name} {single:.1f}; {diffusion / max(padded, single):.2f} × the faster AR",
            file=sys.stderr,
        )


def as_json(
    decoder: Decoder, args: argparse.Namespace, result: Generation, verdict: dict[str, Any] | None
) -> str:
    """Return what --json prints, in ASCII for any terminal; fields that do not apply are null."""
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
    """Chat until the input ends; Ctrl-C ends an answer, or, while a turn is typed, the chat."""
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
        except PromptError as error:  # only this turn is dropped
            fail(f"{error} (this turn is dropped; a new chat has more room)")
            continue
        report(decoder, args, result, interrupted)
        messages = [*turn, message("assistant", result.text)]


def run_batch(args: argparse.Namespace) -> int:
    """Decode --prompts-file into --output, except the prompts whose results are there already."""
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
    """Return what decides the texts, apart from the decoder's configuration and the prompts."""
    from orthrus_fast.cli.batch import sampling_settings

    names = ("mode", "max_new_tokens", "raw", "system", "thinking")
    return {name: getattr(args, name) for name in names} | {"sampling": sampling_settings(params)}


def encode_line(decoder: Decoder, args: argparse.Namespace, line: PromptLine) -> list[int]:
    """Return the ids of a file's prompt. Raises PromptError, TemplateError: only this one fails."""
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
    """Write each result as it comes, print a summary, and return the exit code.

    The code is 0 with failed prompts, too: their results say what was wrong.
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
        more = "; the same command resumes" if results.resumable else ""
        there = f"{len(results.done)} of {n_prompts} prompts are done{more}"
        print(f"interrupted: {there}", file=sys.stderr)
        return 130
    rate = n_tokens / (time.perf_counter() - begun)
    parts = [f"{n_prompts - before} prompts", f"{n_tokens} tokens", f"{rate:.1f} tokens/s"]
    parts.append(f"{n_failed} failed" + (" (see their results)" if n_failed else ""))
    parts += [f"{before} were done before"] if before else []
    parts += [f"seed {seed}"] if seed is not None else []
    print(" · ".join(parts), file=sys.stderr)
    return 0


@contextmanager
def batch_bar(n_prompts: int, before: int) -> Iterator[Callable[[int, float], None]]:
    """Show the finished prompts and tokens/s on a terminal's standard error."""
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
    """Print what the checkpoint is and needs."""
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
