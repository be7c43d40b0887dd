"""The flags of the command line, and what of them contradicts each other; free of torch."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from orthrus_fast.errors import RequestError
from orthrus_fast.options import ATTENTION_BACKENDS, MODES, RUNNERS

Group = argparse._ActionsContainer  # a parser, or a group of its flags
DESCRIPTION = "Decode an Orthrus checkpoint losslessly, several tokens per cycle."
FILTERS = ("top_k", "top_p", "min_p")


class Parser(argparse.ArgumentParser):
    """Prints errors as one line, as every other error of this program is printed."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"error: {message} (--help lists the flags)\n")
        raise SystemExit(2)


def build_generate_parser(prog: str) -> Parser:
    """Return the parser of ``orthrus generate``, whose --help lists the flags by group."""
    parser = Parser(prog=prog, description=DESCRIPTION, allow_abbrev=False)
    add_checkpoint_flags(parser.add_argument_group("checkpoint"))
    add_prompt_flags(parser.add_argument_group("prompt"))
    add_template_flags(parser.add_argument_group("chat template"))
    add_decoding_flags(parser.add_argument_group("decoding"))
    add_sampling_flags(parser.add_argument_group("sampling"))
    add_machine_flags(parser.add_argument_group("machine"))
    add_output_flags(parser.add_argument_group("output"))
    return parser


def build_chat_parser(prog: str) -> Parser:
    """Return the parser of ``orthrus chat``."""
    parser = Parser(prog=prog, description="Chat with a checkpoint.", allow_abbrev=False)
    add_checkpoint_flags(parser.add_argument_group("checkpoint"))
    add_template_flags(parser.add_argument_group("chat template"))
    add_decoding_flags(parser.add_argument_group("decoding"))
    add_sampling_flags(parser.add_argument_group("sampling"))
    add_machine_flags(parser.add_argument_group("machine"))
    add_block_flag(parser.add_argument_group("output"))
    return parser


def build_info_parser(prog: str) -> Parser:
    """Return the parser of ``orthrus info``."""
    description = "Print what a checkpoint is and needs, without loading its weights."
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    add_checkpoint_flags(parser)
    add_length_flag(parser)
    return parser


def add_checkpoint_flags(group: Group) -> None:
    """Add the flags that say which weights decode."""
    add = group.add_argument
    where = "directory or Hub repository (default: the embedded checkpoint)"
    add("--checkpoint", "--model", metavar="DIR_OR_REPO", help=where)
    add("--revision", help="branch, tag or commit of a Hub repository")


def add_prompt_flags(group: Group) -> None:
    """Add the flags that say what is decoded."""
    add = group.add_argument
    prompt = "text of the prompt; '-' reads standard input, as a pipe without --prompt does"
    add("--prompt", "-p", metavar="TEXT", help=prompt)
    demo = "a built-in prompt of the embedded checkpoint (default: records)"
    add("--demo", choices=("records", "code", "prose"), help=demo)
    raw = "continue the prompt as it is, without the chat template"
    add("--raw", action="store_true", help=raw)
    lines = (
        'JSON Lines: objects with "prompt", "messages" or "ids"; "id" and settings optional, '
        "other fields go into the result; '-' reads standard input"
    )
    add("--prompts-file", metavar="FILE", help=lines)
    results = (
        "results of --prompts-file, a line as soon as each is finished ('-': print them); "
        "the same command resumes a run that was killed; the exit code is 3 if a prompt failed"
    )
    add("--output", metavar="FILE", help=results)


def add_template_flags(group: Group) -> None:
    """Add the flags that the chat template hears of."""
    add = group.add_argument
    add("--system", metavar="TEXT", help="system message; an empty one is sent, too")
    thinking = "ask the chat template for thinking, or for none (default: the template decides)"
    add("--thinking", action=argparse.BooleanOptionalAction, default=None, help=thinking)


def add_decoding_flags(group: Group) -> None:
    """Add the flags that say how, and how much, is decoded."""
    add = group.add_argument
    slots = "prompts decoded at the same time (default: 1)"
    add("--slots", type=int, default=1, metavar="B", help=slots)
    width = "width of a block, from 2 to the checkpoint's block size (the default)"
    add("--block-size", type=int, metavar="K", help=width)
    limit = "new tokens at most (default: 256)"
    spellings = ("--max-new-tokens", "--max-tokens", "-n")
    add(*spellings, type=int, default=256, metavar="N", help=limit)
    add_length_flag(group)
    mode = "diffusion drafts and verifies blocks; ar decodes a token per pass (default: diffusion)"
    add("--mode", choices=MODES, default="diffusion", help=mode)


def add_length_flag(group: Group) -> None:
    """Add the flag that sizes the cache."""
    length = "prompt and new tokens at most (default: 4096, or the model's limit)"
    group.add_argument("--max-seq-len", type=int, metavar="N", help=length)


def add_sampling_flags(group: Group) -> None:
    """Add the flags that become SamplingParams."""
    add = group.add_argument
    settings = "greedy (default), or the values of generation_config.json; flags override them"
    add("--sampling", choices=("checkpoint", "greedy"), help=settings)
    add(
        "--temperature",
        "--temp",
        type=float,
        metavar="T",
        help="sample, if above 0 (default: 0, greedy)",
    )
    add("--top-k", type=int, metavar="K", help="sample among the K most likely tokens")
    top_p = "sample among the most likely tokens whose probabilities sum up to P"
    add("--top-p", type=float, metavar="P", help=top_p)
    min_p = "sample among the tokens at least P times as likely as the most likely one"
    add("--min-p", type=float, metavar="P", help=min_p)
    add("--seed", type=int, metavar="S", help="seed of the noise; the same gives the same text")
    add("--stop", action="append", metavar="TEXT", help="end the text before TEXT; may be repeated")


def add_machine_flags(group: Group) -> None:
    """Add the flags that say where and with what the passes run."""
    add = group.add_argument
    add("--device", metavar="D", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--dtype", metavar="T", help="float32, bfloat16, float16 or float64")
    runner = "how passes run (default: auto, which is graph on CUDA and eager on a CPU)"
    add("--runner", choices=("auto", *RUNNERS), default="auto", help=runner)
    backend = "attention backend (default: auto)"
    add("--attention", choices=("auto", *ATTENTION_BACKENDS), default="auto", help=backend)


def add_output_flags(group: Group) -> None:
    """Add the flags that say what is printed."""
    add_block_flag(group)
    add = group.add_argument
    add("--check", action="store_true", help="decode in both modes; exit with 1 if a token differs")
    add("--json", action="store_true", help="print one JSON object instead of the text")


def add_block_flag(group: Group) -> None:
    """Add the flag that shows where text came from."""
    blocks = "mark the text that comes from accepted proposals"
    group.add_argument("--show-blocks", action="store_true", help=blocks)


def check_flags(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse flags that contradict others or would have no effect, before anything is loaded."""
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    chat_flags = ("system", "thinking")
    one_text = ("prompt", "demo", "json", "check", "show_blocks")
    refused: dict[str, tuple[str, ...]] = {
        "prompts_file": one_text,
        "demo": ("prompt", "checkpoint", "raw", *chat_flags),
        "raw": chat_flags,
        "json": ("show_blocks",),
    }
    for flag in given:
        for other in given:
            if other in refused.get(flag, ()):
                raise RequestError(f"{spelled(flag, args)} does not go with {spelled(other, args)}")
    if args.max_new_tokens < 1:
        raise RequestError(f"max_new_tokens: {args.max_new_tokens} is below 1")
    for flag, other in (("prompts_file", "output"), ("output", "prompts_file")):
        if getattr(args, flag, None) is not None and getattr(args, other) is None:
            raise RequestError(f"{spelled(flag, args)} needs {spelled(other, args)}")
    check_sampling_flags(args)


def check_sampling_flags(args: argparse.Namespace) -> None:
    """Refuse filters without sampling, except that lines of a prompts file may ask to sample."""
    if args.sampling == "greedy" and args.temperature:
        raise RequestError("--sampling greedy does not go with --temperature")
    samples = args.temperature or (args.temperature is None and args.sampling == "checkpoint")
    if not samples and getattr(args, "prompts_file", None) is None:
        for flag in FILTERS:
            if getattr(args, flag) is not None:
                needs = "--temperature above 0, or --sampling checkpoint"
                raise RequestError(f"{spelled(flag, args)} needs {needs}")


def spelled(name: str, args: argparse.Namespace) -> str:
    """Return a flag as the user wrote it."""
    negated = name == "thinking" and args.thinking is False
    return f"--{'no-' if negated else ''}{name.replace('_', '-')}"
