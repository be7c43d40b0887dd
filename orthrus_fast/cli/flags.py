"""The flags of the command line, and what of them contradicts each other; free of torch."""

from __future__ import annotations

import argparse
import difflib
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

from orthrus_fast import __version__
from orthrus_fast.errors import RequestError
from orthrus_fast.options import (
    ATTENTION_BACKENDS,
    COMPILE_MODES,
    DRAFT_WEIGHTS,
    MODES,
    PUBLIC_SHAPES,
    RANKS,
    RUNNERS,
    TILED_ROWS,
    WEIGHTS,
)

Group = argparse._ActionsContainer  # a parser, or a group of its flags
DESCRIPTION = "Decode an Orthrus checkpoint losslessly, several tokens per cycle."
EXIT_CODES = (
    "Exit codes: 0 done; 1 --check found a difference; 2 bad input, or a prompt that failed; "
    "3 prompts of a file failed; 130 interrupted; 141 the reader of the output left."
)
FILTERS = {"top_k": (0, -1), "top_p": (1,), "min_p": (0,)}  # and what spells them as off
DEMOS = ("records", "keyed", "columns", "code")
CHAT, INFO = (
    "orthrus chat, or python -m orthrus_fast chat",
    "orthrus info, or python -m orthrus_fast info",
)
LENGTH, ANSWER = "--max-seq-len (prompt and answer)", "--max-new-tokens (the answer)"
SLOTS, CHECKPOINT = "--slots", "--checkpoint"
QUANTIZED = "--weights fp8 or int4 (of the drafter alone: --draft-weights)"
NEAR = {  # flags of other tools, and of earlier versions, to what comes near them here
    **dict.fromkeys(("interactive", "i", "chat", "conversation", "cnv"), CHAT),
    **dict.fromkeys(("info", "show"), INFO),
    **dict.fromkeys(("serve", "server"), "orthrus serve, or python -m orthrus_fast serve"),
    **dict.fromkeys(("bench", "benchmark"), "orthrus bench, or python -m orthrus_fast bench"),
    **dict.fromkeys(("max-length", "max-len"), f"{LENGTH} or {ANSWER}"),
    **dict.fromkeys(("ctx-size", "c", "ctx", "n-ctx", "num-ctx", "max-model-len"), LENGTH),
    **dict.fromkeys(("context-length", "max-context"), LENGTH),
    **dict.fromkeys(("n-predict", "num-predict", "predict", "max-gen-len"), ANSWER),
    **dict.fromkeys(("m", "model-path", "model-id", "model-name", "ckpt", "path"), CHECKPOINT),
    **dict.fromkeys(("batch-size", "b", "parallel", "np", "max-num-seqs"), SLOTS),
    **dict.fromkeys(("quantize", "quantization", "quant", "q"), QUANTIZED),
    **dict.fromkeys(("load-in-4bit", "load-in-8bit"), QUANTIZED),
    **dict.fromkeys(("threads", "num-threads"), "OMP_NUM_THREADS=N in the environment"),
    **dict.fromkeys(("gpu", "cuda"), "--device cuda"),
    **dict.fromkeys(("file", "f", "input-file", "prompt-file"), "--prompts-file, or a pipe"),
    **dict.fromkeys(("system-prompt", "sys"), "--system"),
    **dict.fromkeys(("enable-thinking", "think", "reasoning"), "--thinking"),
    **dict.fromkeys(("api-key", "api-keys"), "--api-key-file, or ORTHRUS_API_KEY"),
    **dict.fromkeys(("data-parallel-size", "dp", "num-replicas"), "--replicas"),
    "t": "--temperature T (threads: OMP_NUM_THREADS=N in the environment)",
    "do-sample": "--temperature T, which samples if above 0",
    "greedy": "nothing: it is the default",
    "stream": "nothing: text is written as it comes",
    "attn-implementation": "--attention",
    "torch-dtype": "--dtype",
    "precision": "--dtype",
    "cpu": "--device cpu",
    **dict.fromkeys(("tensor-parallel-size", "tp", "tp-size", "num-gpus"), "--tensor-parallel N"),
    "o": "--output",
    "s": "--seed",
}


class Parser(argparse.ArgumentParser):
    """Raises RequestError, so that its errors are printed as every other error of this program."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description, epilog=EXIT_CODES, allow_abbrev=False)
        version = f"orthrus-fast {__version__}"
        text = "print the version and exit"
        self.add_argument("--version", action="version", version=version, help=text)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Return the flags, whose names may have underscores; suggest one for an unknown name."""
        words = [self._hyphenated(word) for word in (sys.argv[1:] if args is None else args)]
        parsed, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.error(self._explain(unknown))
        return parsed

    def error(self, message: str) -> NoReturn:
        """Raise a RequestError that says where the flags are listed."""
        raise RequestError(f"{message} ({self.prog} --help lists the flags)")

    def _hyphenated(self, word: str) -> str:
        """Return a flag with its usual name. Raises RequestError for one with a hyphen too few."""
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            return name.replace("_", "-") + equals + value
        if len(name) > 2 and f"-{name}" in self._option_string_actions:
            self.error(f"{name}: no such flag; did you mean -{name}?")
        return word

    def _explain(self, unknown: list[str]) -> str:
        """Return what is wrong with the first of the words that no flag took."""
        word = unknown[0].partition("=")[0]
        if not word.startswith("-"):
            prompt = f"; did you mean --prompt {shlex.quote(' '.join(unknown))[:200]}?"
            known = "--prompt" in self._option_string_actions
            return f"{word[:200]!r} stands where a flag should{prompt if known else ''}"
        near = NEAR.get(word.lstrip("-").lower())
        if near is None:
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            near = next(iter(difflib.get_close_matches(word.lower(), flags, 1, 0.7)), None)
        if near is None and self.description != DESCRIPTION:
            others = build_generate_parser("")._option_string_actions
            return f"{word}: no such flag here" + ("; orthrus generate has it" * (word in others))
        return f"{word}: no such flag" + (f"; did you mean {near}?" if near else "")


def build_generate_parser(prog: str) -> Parser:
    """Return the parser of ``orthrus generate``, whose --help lists the flags by group."""
    parser = Parser(prog, DESCRIPTION)
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
    parser = Parser(prog, "Chat with a checkpoint.")
    parser.set_defaults(prompt=None, demo=None, raw=False, json=False, check=False)
    add_checkpoint_flags(parser.add_argument_group("checkpoint"))
    add_template_flags(parser.add_argument_group("chat template"))
    add_decoding_flags(parser.add_argument_group("decoding"))
    add_sampling_flags(parser.add_argument_group("sampling"))
    add_machine_flags(parser.add_argument_group("machine"))
    add_block_flag(parser.add_argument_group("output"))
    return parser


def build_serve_parser(prog: str) -> Parser:
    """Return the parser of ``orthrus serve``."""
    what = "Serve a checkpoint to OpenAI's clients, under /v1, and on a page to chat on."
    parser = Parser(prog, what)
    parser.set_defaults(check=False)
    add_checkpoint_flags(parser.add_argument_group("checkpoint"))
    add_server_flags(parser.add_argument_group("server"))
    group = parser.add_argument_group("decoding")
    add_slot_flags(group, slots=8)
    add_length_flag(group)
    add_mode_flag(group)
    add_machine_flags(parser.add_argument_group("machine"))
    return parser


def add_server_flags(group: Group) -> None:
    """Add the flags that say who may ask, and how many."""
    add = group.add_argument
    host = "address to listen on (default: 127.0.0.1); others than loopback's need a key"
    add("--host", default="127.0.0.1", metavar="H", help=host)
    add("--port", type=int, default=8000, metavar="P", help="port (default: 8000; 0: a free one)")
    keys = (
        "file of keys, a line each, of which a request brings one as its bearer; cached rows are "
        "shared among those of one key (default: the key in ORTHRUS_API_KEY, if it is set)"
    )
    add("--api-key-file", metavar="FILE", help=keys)
    names = "another name in the Host header that is answered; may be repeated"
    add("--allowed-host", action="append", default=[], metavar="NAME", help=names)
    name = "what clients call the model (default: the repository, or the directory's name)"
    add("--served-model-name", metavar="NAME", help=name)
    waiting = "texts that wait for a slot at most (default: 256)"
    add("--max-waiting", type=int, default=256, metavar="N", help=waiting)
    number = "decoders under Ray Serve, a GPU or a share of the cores each (default: no Ray)"
    add("--replicas", type=int, metavar="N", help=number)
    drain = "seconds for what runs when the server is told to end (default: 10)"
    add("--drain-seconds", type=int, default=10, metavar="S", help=drain)


def build_info_parser(prog: str) -> Parser:
    """Return the parser of ``orthrus info``."""
    description = "Print what a checkpoint is and needs, without loading its weights."
    parser = Parser(prog, description)
    add_checkpoint_flags(parser)
    add_length_flag(parser)
    add_weights_flags(parser)
    add_ranks_flag(parser)
    return parser


def build_tune_parser(prog: str) -> Parser:
    """Return the parser of ``orthrus tune``."""
    what = "Measure the fastest tiles of the products on this GPU and keep them for every later "
    parser = Parser(prog, what + "load. Tiles change how long a pass takes, never a bit of it.")
    models = parser.add_mutually_exclusive_group().add_argument
    shape = "a public model's products; may be repeated (default: all of these)"
    models("--shape", choices=PUBLIC_SHAPES, action="append", help=shape)
    where = "directory or Hub repository of a model to tune for instead"
    models("--checkpoint", "--model", metavar="DIR_OR_REPO", help=where)
    rows = f"numbers of rows (default: {','.join(map(str, TILED_ROWS))})"
    add = parser.add_argument
    add("--rows", type=row_counts, default=list(TILED_ROWS), metavar="N,…", help=rows)
    formats = f"formats of the weights (default: {','.join(DRAFT_WEIGHTS)})"
    add("--weights", type=formats_of, default=DRAFT_WEIGHTS, metavar="NAME,…", help=formats)
    add("--output", metavar="FILE", help="write the table here (default: in your cache directory)")
    add_ranks_flag(parser)
    return parser


def row_counts(text: str) -> list[int]:
    """Return the numbers of a list. Raises ArgumentTypeError for one that no table has."""
    known = {str(n_rows): n_rows for n_rows in TILED_ROWS}
    counts = [known.get(part, 0) for part in text.split(",")]
    if not all(counts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of {', '.join(known)}")
    return counts


def formats_of(text: str) -> list[str]:
    """Return the formats of a list. Raises ArgumentTypeError for one that there is not."""
    names = text.split(",")
    if not set(names) <= set(DRAFT_WEIGHTS):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of {', '.join(DRAFT_WEIGHTS)}")
    return names


def add_checkpoint_flags(group: Group) -> None:
    """Add the flags that say which weights decode."""
    add = group.add_argument
    where = "directory or Hub repository (default: the embedded checkpoint)"
    add("--checkpoint", "--model", metavar="DIR_OR_REPO", help=where)
    add("--revision", help="branch, tag or commit of a Hub repository")
    ignored = "let a field of config.json that is unknown here through; may be repeated"
    add("--ignore-config-field", action="append", default=[], metavar="NAME", help=ignored)


def add_prompt_flags(group: Group) -> None:
    """Add the flags that say what is decoded."""
    add = group.add_argument
    prompt = "text of the prompt; '-' reads standard input, as a pipe or file without --prompt is"
    add("--prompt", "-p", metavar="TEXT", help=prompt)
    demo = "a built-in prompt of the embedded checkpoint (default: records)"
    add("--demo", choices=DEMOS, help=demo)
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
    thinking = "let the model think, where its chat template knows of it (default: off)"
    add("--thinking", action=argparse.BooleanOptionalAction, default=None, help=thinking)


def add_decoding_flags(group: Group) -> None:
    """Add the flags that say how, and how much, is decoded."""
    add_slot_flags(group)
    limit = "new tokens at most (default: 256, or what fits; with --thinking all that fits)"
    group.add_argument("--max-new-tokens", "--max-tokens", "-n", type=int, metavar="N", help=limit)
    add_length_flag(group)
    add_mode_flag(group)


def add_slot_flags(group: Group, slots: int = 1) -> None:
    """Add the flags of the engine."""
    add = group.add_argument
    number = f"prompts decoded at the same time (default: {slots})"
    add("--slots", type=int, default=slots, metavar="B", help=number)
    width = "width of a block, from 2 to the checkpoint's block size (the default)"
    add("--block-size", type=int, metavar="K", help=width)
    drafting = "auto drafts when and as wide as it pays (default); N: always by blocks of N rows"
    add("--drafting", type=width_or_auto, default="auto", metavar="N", help=drafting)
    reuse = "start from cached rows of earlier prompts that begin alike (default: on)"
    add("--prefix-reuse", action=argparse.BooleanOptionalAction, default=True, help=reuse)


def add_mode_flag(group: Group) -> None:
    """Add the flag that says whether to draft."""
    mode = (
        "diffusion drafts and verifies blocks; ar decodes a token per pass (default: diffusion, "
        "where the checkpoint has a draft view)"
    )
    group.add_argument("--mode", choices=MODES, help=mode)


def width_or_auto(text: str) -> int | str:
    """Return the width of a block, or "auto". Raises ValueError for anything else."""
    return text if text == "auto" else int(text)


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
    add("--top-k", type=int, metavar="K", help="sample among the K most likely tokens (0: all)")
    top_p = "sample among the most likely tokens whose probabilities sum up to P"
    add("--top-p", type=float, metavar="P", help=top_p)
    min_p = "sample among the tokens at least P times as likely as the most likely one"
    add("--min-p", type=float, metavar="P", help=min_p)
    add("--seed", type=int, metavar="S", help="seed of the noise; the same gives the same text")
    schema = "write JSON that this JSON Schema allows; 'any': any JSON object"
    add("--json-schema", metavar="FILE", help=schema)
    add("--stop", action="append", metavar="TEXT", help="end the text before TEXT; may be repeated")


def add_machine_flags(group: Group) -> None:
    """Add the flags that say where and with what the passes run."""
    add = group.add_argument
    add("--device", metavar="D", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--dtype", metavar="T", help="float32, bfloat16, float16 or float64")
    runner = "how passes run (default: auto, which is graph on CUDA and eager on a CPU)"
    add("--runner", choices=("auto", *RUNNERS), default="auto", help=runner)
    compiler = "torch.compile's, with --runner compiled (default: default)"
    add("--compile-mode", choices=COMPILE_MODES, default="default", help=compiler)
    backend = "attention backend (default: auto)"
    add("--attention", choices=("auto", *ATTENTION_BACKENDS), default="auto", help=backend)
    add_weights_flags(group)
    add_ranks_flag(group)


def add_weights_flags(group: Group) -> None:
    """Add the flags that say in how many bits weights are kept."""
    add = group.add_argument
    drafter = (
        "the drafter's own, in fewer bits, which change no text (default: auto, the fastest that "
        "fits on a GPU, the checkpoint's on a CPU)"
    )
    names = ("auto", *DRAFT_WEIGHTS)
    add("--draft-weights", choices=names, default="auto", help=drafter)
    both = "both views' in fewer bits: another model, in less memory (default: the checkpoint's)"
    add("--weights", choices=WEIGHTS, default="checkpoint", help=both)


def add_ranks_flag(group: Group) -> None:
    """Add the flag that says how many GPUs share the model."""
    ranks = "GPUs that hold a share of the model each, with the same text (default: 1)"
    group.add_argument("--tensor-parallel", type=int, choices=RANKS, default=1, help=ranks)


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
    if str(args.device).lower().startswith("gpu"):
        raise RequestError(f"--device {args.device}: did you mean --device cuda{args.device[3:]}?")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
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
        for flag, off in FILTERS.items():
            if getattr(args, flag) not in (None, *off):
                needs = "--temperature above 0, or --sampling checkpoint"
                raise RequestError(f"{spelled(flag, args)} needs {needs}")


def spelled(name: str, args: argparse.Namespace) -> str:
    """Return a flag as the user wrote it."""
    negated = name == "thinking" and args.thinking is False
    return f"--{'no-' if negated else ''}{name.replace('_', '-')}"
