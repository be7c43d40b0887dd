"""orthrus generate --prompts-file: many prompts from a file, their results into another."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from orthrus_fast.cli.results_file import Results, make_header, sampling_settings
from orthrus_fast.cli.session import (
    check_template_flags,
    load_decoder,
    prompt_of,
    resolved,
    sampling,
    template_arguments,
)
from orthrus_fast.decoder import Decoder
from orthrus_fast.errors import PromptError, RequestError
from orthrus_fast.grammar import Grammar
from orthrus_fast.prompts import PromptLine, read_prompts
from orthrus_fast.results import Generation
from orthrus_fast.sampling import SamplingParams


def run_batch(args: argparse.Namespace) -> int:
    """Decode --prompts-file into --output, except the prompts whose results are there already."""
    lines, asked = read_lines(args)
    with Results(args.output) as results:
        decoder = load_decoder(args)
        header, params = plan(decoder, args, lines, asked)
        todo, params, seed = begin(results, header, lines, params)
        done = decode_lines(decoder, args, todo, params)
        return write_results(results, done, len(lines), seed)


def read_lines(args: argparse.Namespace) -> tuple[list[PromptLine], list[SamplingParams]]:
    """Return the lines of --prompts-file and what each asks for."""
    lines = read_prompts(args.prompts_file)
    return lines, parameters(lines, lambda own: sampling(args, **{"seed": None, **own}))


def plan(
    decoder: Decoder,
    args: argparse.Namespace,
    lines: Sequence[PromptLine],
    asked: Sequence[SamplingParams],
) -> tuple[dict[str, Any], list[SamplingParams]]:
    """Return the header of the results and the settings of each line; settle the template's flags.

    Raises RequestError for flags that the checkpoint does not go with.
    """
    check_template_flags(decoder, args)
    unlimited = [line for line in lines if "max_new_tokens" not in line.settings]
    if args.thinks and args.max_new_tokens is None and unlimited:
        raise RequestError(
            f"{unlimited[0].where}: --thinking needs --max-new-tokens with --prompts-file"
        )
    assert decoder.checkpoint is not None  # loaded from one
    settings = batch_settings(args, resolved(decoder, sampling(args)))
    header = make_header(decoder, decoder.checkpoint, lines, settings, args.seed)
    return header, [resolved(decoder, one) for one in asked]


def begin(
    results: Results,
    header: dict[str, Any],
    lines: Sequence[PromptLine],
    params: Sequence[SamplingParams],
) -> tuple[list[PromptLine], list[SamplingParams], int | None]:
    """Return the lines that have no result yet, their settings, and the run's seed."""
    drawing = any(one.temperature > 0 and one.seed is None for one in params)
    seed = results.begin(header, lines, draw_seed=drawing)
    todo = [line for line in lines if line.index not in results.done]
    every = seeded(params, seed)
    return todo, [every[line.index] for line in todo], seed


def batch_settings(args: argparse.Namespace, params: SamplingParams) -> dict[str, Any]:
    """Return what decides the texts, apart from the decoder's configuration and the prompts."""
    names = ("mode", "max_new_tokens", "raw", "system", "thinking")
    return {name: getattr(args, name) for name in names} | {"sampling": sampling_settings(params)}


def write_results(
    results: Results,
    done: Iterator[tuple[PromptLine, Generation]],
    n_prompts: int,
    seed: int | None,
) -> int:
    """Write each result as it comes, print a summary, and return the exit code.

    The code is 3 where any of the file's prompts failed, in this run or in an earlier one.
    """
    before, n_tokens = len(results.done), 0
    begun = time.perf_counter()
    try:
        with batch_bar(n_prompts, before) as show:
            for line, generation in done:
                results.write(line, generation)
                n_tokens += len(generation.tokens)
                show(len(results.done), n_tokens / (time.perf_counter() - begun))
    except KeyboardInterrupt:
        more = "; the same command resumes" if results.resumable else ""
        there = f"{len(results.done)} of {n_prompts} prompts are done{more}"
        print(f"interrupted: {there}", file=sys.stderr)
        return 130
    rate = n_tokens / (time.perf_counter() - begun)
    parts = [f"{n_prompts - before} prompts", f"{n_tokens} tokens", f"{rate:.1f} tokens/s"]
    n_failed = results.n_failed
    parts.append(f"{n_failed} failed" + (" (see their results)" if n_failed else ""))
    parts += [f"{before} were done before"] if before else []
    parts += [f"seed {seed}"] if seed is not None else []
    print(" · ".join(parts), file=sys.stderr)
    return 3 if n_failed else 0


@contextmanager
def batch_bar(n_prompts: int, before: int) -> Iterator[Callable[[int, float], None]]:
    """Show the finished prompts, tokens/s and the time left on a terminal's standard error."""
    if not sys.stderr.isatty():
        yield lambda done, rate: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    rate, left = TextColumn("{task.fields[rate]:.1f} tokens/s"), TextColumn("left")
    columns = ("prompts", BarColumn(), MofNCompleteColumn(), rate, TimeLeft(), left)
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=n_prompts, completed=before, rate=0.0)
        yield lambda done, rate: bar.update(task, completed=done, rate=rate)


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
            if (schema := own.pop("json_schema", None)) is not None:
                kind = ("json_object",) if schema == '"any"' else ("json_schema", schema)
                own["grammar"] = Grammar(*kind)
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
    args: argparse.Namespace,
    lines: Sequence[PromptLine],
    params: Sequence[SamplingParams],
) -> Iterator[tuple[PromptLine, Generation]]:
    """Yield each line with its result, as it ends; ``params`` are the lines' own, in their order.

    A prompt that cannot be decoded fails alone. The decoder encodes one once a slot is free for it.
    """
    kept: list[tuple[PromptLine, SamplingParams]] = []
    for line, own in zip(lines, params, strict=True):
        if line.prompt:
            kept.append((line, own))
        else:
            error = PromptError(f"{line.kind}: empty; it needs at least one token")
            yield line, Generation.failed(error, own.seed)
    if not kept:
        return
    prompts = [prompt_of(decoder, args, line.prompt) for line, _ in kept]
    budgets = [line.settings.get("max_new_tokens", args.max_new_tokens) for line, _ in kept]
    settings, more = [own for _, own in kept], template_arguments(args, *prompts)
    for index, generation in decoder.as_completed(prompts, budgets, settings, args.mode, **more):
        yield kept[index][0], generation
