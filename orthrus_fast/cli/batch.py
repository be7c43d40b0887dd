"""orthrus generate --prompts-file: many prompts from a file, their results into another."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from orthrus_fast.cli.results_file import Results, make_header, sampling_settings
from orthrus_fast.cli.session import (
    NEW_TOKENS,
    check_template_flags,
    encode,
    load_decoder,
    resolved,
    sampling,
)
from orthrus_fast.cli.terminal import batch_bar
from orthrus_fast.decoder import Decoder
from orthrus_fast.errors import PromptError, RequestError, TemplateError
from orthrus_fast.prompts import PromptLine, read_prompts
from orthrus_fast.results import Generation
from orthrus_fast.sampling import SamplingParams


def run_batch(args: argparse.Namespace) -> int:
    """Decode --prompts-file into --output, except the prompts whose results are there already."""
    lines = read_prompts(args.prompts_file)
    asked = parameters(lines, lambda own: sampling(args, **{"seed": None, **own}))
    with Results(args.output) as results:
        decoder = load_decoder(args)
        check_template_flags(decoder, args)
        params = [resolved(decoder, one) for one in asked]
        assert decoder.checkpoint is not None  # loaded from one
        settings = batch_settings(args, resolved(decoder, sampling(args)))
        header = make_header(decoder, decoder.checkpoint, lines, settings, args.seed)
        drawing = any(one.temperature > 0 and one.seed is None for one in params)
        seed = results.begin(header, lines, draw_seed=drawing)
        params = seeded(params, seed)
        todo = [line for line in lines if line.index not in results.done]
        done = decode_lines(
            decoder,
            todo,
            [params[line.index] for line in todo],
            lambda line: encode_line(decoder, args, line),
            args.max_new_tokens or NEW_TOKENS,
            args.mode,
        )
        return write_results(results, done, len(lines), seed)


def batch_settings(args: argparse.Namespace, params: SamplingParams) -> dict[str, Any]:
    """Return what decides the texts, apart from the decoder's configuration and the prompts."""
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


def parameters(
    lines: Iterable[PromptLine], make: Callable[[Mapping[str, Any]], SamplingParams]
) -> list[SamplingParams]:
    """Of each line, by ``make`` from what the line itself asks for.

    Raises RequestError, naming the line, where ``make`` does.
    """
    made = []
    for line in lines:
        own = {name: value for name, value in line.settings.items() if name != "max_new_tokens"}
        try:
            made.append(make(own))
        except RequestError as error:
            raise RequestError(f"{line.where}: {error}") from None
    return made


def seeded(params: Sequence[SamplingParams], seed: int | None) -> list[SamplingParams]:
    """The run's ``seed`` plus its index for each prompt that brings no seed of its own."""
    if seed is None:
        return list(params)
    return [
        one if one.seed is not None else replace(one, seed=(seed + index) % 2**64)
        for index, one in enumerate(params)
    ]


def decode_lines(
    decoder: Decoder,
    lines: Sequence[PromptLine],
    params: Sequence[SamplingParams],
    encode: Callable[[PromptLine], list[int]],
    max_new_tokens: int,
    mode: str,
) -> Iterator[tuple[PromptLine, Generation]]:
    """Each line with its result, as it ends. A prompt that cannot be decoded fails alone.

    ``params`` are the lines' own, in their order; ``max_new_tokens`` is for lines without one.
    """
    kept: list[tuple[PromptLine, SamplingParams, list[int]]] = []
    for line, own in zip(lines, params, strict=True):
        try:
            ids = encode(line)
        except (PromptError, TemplateError) as error:
            yield line, Generation.failed(error, own.seed)
        else:
            kept.append((line, own, ids))
    prompts, settings = [ids for _, _, ids in kept], [own for _, own, _ in kept]
    budgets = [line.settings.get("max_new_tokens", max_new_tokens) for line, _, _ in kept]
    if kept:
        for index, generation in decoder.as_completed(prompts, budgets, settings, mode):
            yield kept[index][0], generation
