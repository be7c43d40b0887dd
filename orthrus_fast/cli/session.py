"""From flags to a decoder, settings and ids: what generate, chat and the batch share."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from orthrus_fast.cli.flags import spelled
from orthrus_fast.cli.terminal import printable, progress_bar, render, write_output
from orthrus_fast.errors import RequestError, TemplateError
from orthrus_fast.launch import launched
from orthrus_fast.options import MAX_NEW_TOKENS

if TYPE_CHECKING:
    from orthrus_fast import Decoder, Generation, Grammar, SamplingParams

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed", "stop")


def begin_loading(args: argparse.Namespace) -> None:
    """Say on a terminal what is loaded, then refuse sampling settings that are out of range.

    In this order: what checks them imports torch, which takes seconds itself.
    """
    say_loading(args)
    sampling(args)


def say_loading(args: argparse.Namespace) -> None:
    """Say on a terminal what is loaded.

    Of several processes that torchrun has started only the first returns: the others load, too, and
    serve it to the end. Raises RequestError where they are not to share a model.
    """
    place = launched()
    if args.tensor_parallel == 1 < place.size:
        wanted = f"--tensor-parallel {place.size} has them share the model"
        raise RequestError(f"torchrun started {place.size} processes; {wanted}")
    if place.rank > 0:
        load_decoder(args)
    if sys.stderr.isatty():
        name = printable(args.checkpoint or "the embedded checkpoint", True)
        print(f"loading {name} …", file=sys.stderr, flush=True)


def load_decoder(args: argparse.Namespace) -> Decoder:
    """Load the checkpoint as the flags say; settle ``args.mode`` where none is given."""
    from orthrus_fast import load

    with progress_bar("loading") as progress:
        decoder = load(
            args.checkpoint,  # None: the embedded one
            slots=args.slots,
            progress=progress,
            **load_settings(args),
        )
    args.mode = args.mode or decoder.default_mode
    return decoder


def load_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the flags say to ``load``, beside the checkpoint and the slots."""
    as_they_are = (
        "device dtype max_seq_len runner attention compile_mode block_size weights draft_weights "
        "drafting prefix_reuse tensor_parallel revision"
    )
    settings = {name: getattr(args, name) for name in as_they_are.split()}
    settings["draft_view"] = args.mode != "ar" or args.check
    return settings | {"ignore_config_fields": tuple(args.ignore_config_field)}


def has_template(decoder: Decoder) -> bool:
    """Return whether the checkpoint has a chat template."""
    return decoder.tokenizer is not None and decoder.tokenizer.has_chat_template


def check_template_flags(decoder: Decoder, args: argparse.Namespace) -> None:
    """Refuse flags that the chat template does not support; warn of greedy thinking.

    Settles ``args.thinking``, which is off where a template would think by itself, and
    ``args.thinks``: whether the model thinks.
    """
    for flag in ("system", "thinking"):
        if getattr(args, flag) is not None and not has_template(decoder):
            raise RequestError(f"{spelled(flag, args)}: {decoder.name} has no chat template")
    args.thinks = False
    if not has_template(decoder) or args.raw or args.demo:
        return
    assert decoder.tokenizer is not None
    if not decoder.tokenizer.chat_template.mentions("enable_thinking"):
        if args.thinking is not None:
            flag = spelled("thinking", args)
            raise RequestError(f"{flag}: the template of {decoder.name} has no thinking mode")
        args.thinks = rendered(decoder).rstrip().endswith("<think>")
    elif args.thinking is None and decoder.tokenizer.thinks_by_default():
        args.thinking = False
        print("thinking is off; --thinking turns it on", file=sys.stderr)
    args.thinks = args.thinks or args.thinking is True
    if args.thinks and resolved(decoder, sampling(args)).temperature == 0:
        print(
            "warning: Qwen advises against greedy decoding in thinking mode; "
            "--sampling checkpoint takes the checkpoint's own settings",
            file=sys.stderr,
        )


def rendered(decoder: Decoder) -> str:
    """Return a chat of one message as the template writes it, "" where that has no place there."""
    assert decoder.tokenizer is not None
    try:
        return decoder.tokenizer.render_chat([message("user", "x")])
    except TemplateError:
        return ""


def message(role: str, content: str) -> dict[str, Any]:
    """Return a chat message."""
    return {"role": role, "content": content}


def is_chat(prompt: Any) -> bool:
    """Return whether a prompt is chat messages, neither text nor ids."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def prompt_of(decoder: Decoder, args: argparse.Namespace, prompt: Any) -> Any:
    """Return what the decoder encodes: ids or text as they are, or chat messages.

    Text is a user's message where there is a chat template, but for --raw and in a demo; --system's
    message comes first where the chat has none.
    """
    if isinstance(prompt, str) and has_template(decoder) and not args.raw and not args.demo:
        prompt = [message("user", prompt)]
    if args.system is None or not is_chat(prompt) or prompt[0].get("role") == "system":
        return prompt
    return [message("system", args.system), *prompt]


def encode(decoder: Decoder, args: argparse.Namespace, prompt: Any) -> list[int]:
    """Return the ids of text or chat messages, as ``prompt_of`` has them."""
    prompt = prompt_of(decoder, args, prompt)
    return decoder.encode(prompt, **template_arguments(args, prompt))


def template_arguments(args: argparse.Namespace, *prompts: Any) -> dict[str, Any]:
    """Return the arguments of the chat template, where any of the prompts is a chat."""
    return {"enable_thinking": args.thinking} if any(map(is_chat, prompts)) else {}


def sampling(args: argparse.Namespace, **instead: Any) -> SamplingParams:
    """Return the sampling settings of the flags, overridden by those of ``instead``."""
    from orthrus_fast import SamplingParams

    given = {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}
    if args.json_schema is not None:
        given["grammar"] = read_schema(args.json_schema)
    given |= instead
    if args.sampling == "checkpoint":
        return SamplingParams.from_checkpoint(**given)
    return SamplingParams(**given)


def read_schema(name: str) -> Grammar:
    """Return the grammar of a JSON Schema in a file, or of any JSON object for "any"."""
    from orthrus_fast.grammar import MAX_SCHEMA, Grammar

    if name == "any":
        return Grammar("json_object")
    try:
        with open(name, encoding="utf-8") as file:
            return Grammar("json_schema", file.read(MAX_SCHEMA + 1))
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--json-schema: {error}") from None


def resolved(decoder: Decoder, params: SamplingParams) -> SamplingParams:
    """Return the settings with the checkpoint's values filled in, for --sampling checkpoint."""
    return params.resolved(dict(decoder.config.sampling_defaults))


def budget(decoder: Decoder, args: argparse.Namespace, n_prompt: int) -> int | None:
    """Return the limit of new tokens; None is the decoder's own, which is too short for thoughts.

    A model that thinks gets all that fits.
    """
    if args.max_new_tokens is None and args.thinks:
        return max(1, decoder.max_seq_len - n_prompt)
    limit: int | None = args.max_new_tokens
    return limit


def decode(decoder: Decoder, args: argparse.Namespace, ids: list[int]) -> tuple[Generation, bool]:
    """Stream the answer to the terminal; Ctrl-C ends it and keeps what was written so far."""
    stream = decoder.stream(ids, budget(decoder, args, len(ids)), sampling(args), args.mode)
    interrupted = False
    try:
        for chunk in stream:
            if not args.json:
                write_output(render(chunk, args.show_blocks, sys.stdout.isatty()))
    except KeyboardInterrupt:
        interrupted = True
        stream.close()
    if not args.json:
        write_output("\n")
    return stream.result, interrupted


def report(
    decoder: Decoder, args: argparse.Namespace, result: Generation, interrupted: bool
) -> None:
    """Print a line on standard error, and another if Ctrl-C or a limit ended the text."""
    stats = result.stats
    if stats is None:
        if interrupted:
            print("interrupted before the first token", file=sys.stderr)
        return
    parts = [f"{len(result.tokens)} tokens"]
    if stats.tokens_per_cycle is not None:
        parts.append(f"{stats.tokens_per_cycle:.2f} tokens per cycle in {stats.cycles} cycles")
    if stats.tokens_per_second is not None:
        parts.append(f"{stats.tokens_per_second:.1f} tokens/s")
    first = f"first token after {stats.time_to_first_token:.3f} s"
    reused = f", {stats.reused_tokens} tokens of the prompt reused"
    parts.append(first + (reused if stats.reused_tokens else ""))
    settings = decoder.configuration
    parts.append(f"{args.mode} on {settings['device']} ({settings['dtype']}, {settings['runner']})")
    if result.seed is not None:
        parts.append(f"seed {result.seed}")
    print(" · ".join(parts), file=sys.stderr)
    if interrupted:
        print("interrupted: the text above is what was written so far", file=sys.stderr)
    elif result.finish_reason == "length":
        limit = which_limit(decoder, args, len(result.tokens))
        print(f"the text ended at {limit}", file=sys.stderr)


def which_limit(decoder: Decoder, args: argparse.Namespace, limit: int) -> str:
    """Return in words which limit of new tokens a text reached, and what raises it."""
    if args.max_new_tokens is not None:
        return f"its limit of {limit} new tokens; --max-new-tokens raises it"
    if limit == MAX_NEW_TOKENS and not args.thinks:
        return f"the default limit of {limit} new tokens; --max-new-tokens raises it"
    room = f"the {limit} new tokens that max_seq_len {decoder.max_seq_len} leaves room for"
    if decoder.max_seq_len < decoder.config.max_position_embeddings:
        return f"{room}; --max-seq-len raises it"
    return f"{room}, which is the model's own limit"
