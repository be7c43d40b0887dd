"""Makes the checkpoint in `model/`: python -m scripts.train_embedded STAGE [options], with the
stages in this order.

    fetch        download the pinned packages of model/SOURCES.tsv
    tokenizer    train the tokenizer
    held-out     write the held-out prompts
    prepare      make the training windows
    train-ar     phase 1: train the AR view (repeat until it logs done)
    prepare-more make windows of further records
    tune-ar      phase 1, second run: from the rounded weights, on the further records
    answers      write greedy answers of the AR view, for phase 2
    train-draft  phase 2: train the draft view (repeat until it logs done)
    export       write the checkpoint
    evaluate     measure it on the held-out prompts; write figures.json and the card's tables
    speed        time a prompt of each kind on the CPU, with as many threads as torch uses
                 (OMP_NUM_THREADS=1 or 2); add the times to figures.json and the card

Training needs a GPU with 40 GB or more; the other stages do not. `--tiny` runs all stages at very
small sizes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

try:
    import numpy  # noqa: F401  (scripts.embedded.data's; torch warns where it is absent)
except ModuleNotFoundError:
    raise SystemExit("error: numpy is not installed; run: pip install -e '.[test]'") from None
import torch
from tokenizers import Tokenizer

import orthrus_fast
from scripts.embedded import (
    card,
    data,
    decode,
    evaluate,
    export,
    heldout,
    records,
    sources,
    speed,
    tokens,
    train,
)
from scripts.embedded.net import OrthrusLM, Shape

ROOT = Path(__file__).resolve().parent.parent
log = logging.getLogger("train_embedded")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the result. `length`: tokens of a window, one more than the rows that
    are trained on.
    """

    shape: Shape = Shape()
    seed: int = 1
    length: int = 2049
    tokenizer_records: int = 25_000
    record_samples: int = 700_000
    more_samples: int = 420_000
    code_documents: int = 1_000_000
    code_share: float = 0.4
    code_stride: int = 3  # the later stages train on every third window of code
    ar: train.Plan = train.Plan(steps=11_000, n_rows=32, learning_rate=3e-3)
    tune: train.Plan = train.Plan(steps=2_200, n_rows=32, learning_rate=1e-3, warmup=100)
    draft: train.Plan = train.Plan(steps=3_226, n_rows=32, learning_rate=2e-3, warmup=100)
    n_anchors: int = 128
    own_records: int = 4_096
    own_code: int = 16_384
    own_batch: int = 4_096
    own_record_tokens: int = 700
    own_code_tokens: int = 192


TINY = Recipe(
    shape=Shape(512, 500, 64, 96, 2, 2, 1, 32, 8),
    length=513,
    tokenizer_records=300,
    record_samples=200,
    more_samples=100,
    code_documents=40,
    ar=train.Plan(steps=30, n_rows=4, learning_rate=3e-3, warmup=5, log_every=10),
    tune=train.Plan(steps=10, n_rows=4, learning_rate=1e-3, warmup=5, log_every=10),
    draft=train.Plan(steps=20, n_rows=4, learning_rate=2e-3, warmup=5, log_every=10),
    n_anchors=8,
    own_records=8,
    own_code=8,
    own_batch=4,
    own_record_tokens=32,
    own_code_tokens=16,
)


@dataclasses.dataclass(frozen=True)
class Workplace:
    """The folders and options of a run: `work` for intermediate files, `model` for the result."""

    recipe: Recipe
    work: Path
    model: Path
    device: torch.device
    workers: int
    dense_masks: bool
    slots: int
    runner: str

    def tokenizer(self) -> Tokenizer:
        return tokens.load_tokenizer(self.model)

    def windows(self, name: str) -> data.Windows:
        return data.Windows.load(self.work / f"{name}.npz")

    def net(self, folder: str) -> OrthrusLM:
        """Return the network as a phase saved it."""
        net = OrthrusLM(self.recipe.shape)
        state = torch.load(self.work / folder / "state.pt", map_location="cpu", weights_only=True)
        net.load_state_dict(state["net"])
        return net.to(self.device)


def fetch(place: Workplace) -> None:
    listed = sources.read_sources(place.model / "SOURCES.tsv")
    sources.fetch(listed, place.work / "wheels")
    for role in ("train", "held-out"):
        texts = sources.documents(listed, place.work / "wheels", role)
        data.write_texts(texts, place.work / f"code-{role}.txt.xz")


def tokenizer(place: Workplace) -> None:
    texts = data.read_texts(place.work / "code-train.txt.xz")[: place.recipe.code_documents]

    def mixed() -> Iterator[str]:
        yield from texts[::8]
        for sample in records.stream("tokenizer", 0, place.recipe.tokenizer_records):
            yield tokens.render_chat(sample.messages) + sample.answer

    place.model.mkdir(parents=True, exist_ok=True)
    trained = tokens.train_tokenizer(mixed(), place.recipe.shape.n_entries)
    trained.save(str(place.model / "tokenizer.json"))


def held_out(place: Workplace) -> None:
    texts, trained = (
        data.read_texts(place.work / f"code-{role}.txt.xz") for role in ("held-out", "train")
    )
    heldout.write_held_out(texts, trained, place.model / "heldout.jsonl")


def prepare(place: Workplace) -> None:
    recipe = place.recipe
    skip = heldout.held_out_digests()
    made = data.record_windows(
        place.model, 0, recipe.record_samples, recipe.length, skip, place.workers
    )
    made.save(place.work / "records.npz")
    texts = data.read_texts(place.work / "code-train.txt.xz")[: recipe.code_documents]
    code = data.code_windows(place.tokenizer(), texts, recipe.length)
    code.save(place.work / "code.npz")
    data.Windows(code.tokens[:: recipe.code_stride], code.roles[:: recipe.code_stride]).save(
        place.work / "some-code.npz"
    )
    log.info("windows of records: %d, of code: %d", len(made.tokens), len(code.tokens))


def prepare_more(place: Workplace) -> None:
    recipe, skip = place.recipe, heldout.held_out_digests()
    first, last = recipe.record_samples, recipe.record_samples + recipe.more_samples
    made = data.record_windows(place.model, first, last, recipe.length, skip, place.workers)
    made.save(place.work / "more-records.npz")


def tune_ar(place: Workplace) -> None:
    recipe, net = place.recipe, place.net("ar")
    net.round_weights()
    sets = [(place.windows("more-records"), 0.75), (place.windows("some-code"), 0.25)]
    feed = train.Feed(sets, recipe.tune.n_rows, recipe.seed + 2, place.device)
    done = train.train_ar(net, feed, recipe.tune, place.work / "tuned")
    log.info("phase 1, second run, %s", "done" if done else "not done yet")


def train_ar(place: Workplace) -> None:
    recipe = place.recipe
    net = OrthrusLM(recipe.shape)
    net.initialise(recipe.seed)
    sets = [
        (place.windows("records"), 1 - recipe.code_share),
        (place.windows("code"), recipe.code_share),
    ]
    feed = train.Feed(sets, recipe.ar.n_rows, recipe.seed, place.device)
    done = train.train_ar(net.to(place.device), feed, recipe.ar, place.work / "ar")
    log.info("phase 1 %s", "done" if done else "not done yet")


def answers(place: Workplace) -> None:
    """Let the AR view answer records past the training stream, and continue training code."""
    recipe, tokenizer = place.recipe, place.tokenizer()
    net = place.net("tuned")
    net.round_weights()
    first = recipe.record_samples + recipe.more_samples
    samples = list(
        records.stream("train", first, first + recipe.own_records, heldout.held_out_digests())
    )
    prompts = [tokenizer.encode(tokens.render_chat(s.messages)).ids for s in samples]
    written = _answer_all(place, net, prompts, recipe.own_record_tokens)
    exact = [
        evaluate.is_exact(tokenizer.decode(a), s.expected)
        for a, s in zip(written, samples, strict=True)
    ]
    log.info("greedy answers to records: %d of %d exact", sum(exact), len(exact))
    data.pack(zip(prompts, written, strict=True), recipe.length).save(
        place.work / "own-records.npz"
    )
    openings = _code_openings(place.windows("some-code").tokens, recipe)
    continued = _answer_all(place, net, openings, recipe.own_code_tokens)
    data.pack(zip(openings, continued, strict=True), recipe.length).save(
        place.work / "own-code.npz"
    )


def _code_openings(windows: data.Tokens, recipe: Recipe) -> list[list[int]]:
    """Return runs of 32 to 191 tokens of training code, from seeded positions."""
    generator = torch.Generator().manual_seed(recipe.seed)
    rows, starts, sizes = (
        torch.randint(low, high, (recipe.own_code,), generator=generator).tolist()
        for low, high in ((0, len(windows)), (0, recipe.length - 192), (32, 192))
    )
    return [
        windows[row, at : at + size].tolist()
        for row, at, size in zip(rows, starts, sizes, strict=True)
    ]


def _answer_all(
    place: Workplace, net: OrthrusLM, prompts: Sequence[list[int]], max_new: int
) -> list[list[int]]:
    """Return greedy answers in the order of the prompts; a batch has prompts of similar length."""
    ends = tokens.end_tokens(place.tokenizer())
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), place.recipe.own_batch):
        batch = order[start : start + place.recipe.own_batch]
        with torch.autocast(place.device.type, torch.bfloat16):
            written = decode.greedy_batch(net, [prompts[i] for i in batch], max_new, ends)
        for i, answer in zip(batch, written, strict=True):
            out[i] = answer
    return out


def train_draft(place: Workplace) -> None:
    recipe = place.recipe
    net = place.net("tuned")
    net.round_weights()
    net.start_draft_from_ar()
    shares = {"more-records": 0.45, "own-records": 0.1, "some-code": 0.15, "own-code": 0.3}
    sets = [(place.windows(name), share) for name, share in shares.items()]
    feed = train.Feed(sets, recipe.draft.n_rows, recipe.seed + 1, place.device)
    done = train.train_draft(
        net, feed, recipe.draft, recipe.n_anchors, place.work / "draft", place.dense_masks
    )
    log.info("phase 2 %s", "done" if done else "not done yet")


def write_checkpoint(place: Workplace) -> None:
    export.write_checkpoint(place.net("draft"), place.tokenizer(), place.model)


def measure(place: Workplace) -> None:
    torch.set_num_threads(1)  # more do not speed up a model this small, and wait for a busy core
    decoder = orthrus_fast.load(
        place.model,
        place.device,
        dtype="float32",
        slots=place.slots,
        runner=place.runner,
        drafting=place.recipe.shape.block_size,
    )
    tokenizer = place.tokenizer()
    net = export.read_checkpoint(place.model, place.recipe.shape).to(place.device)
    texts = data.read_texts(place.work / "code-held-out.txt.xz")
    prose = heldout.read_held_out(place.model / "heldout.jsonl", "prose")
    sets = (heldout.record_prompts(), heldout.code_prompts(texts), prose)
    figures: dict[str, Any] = {
        "command": "python -m scripts.train_embedded evaluate",
        "machine": speed.machine(place.device),
        "configuration": {
            name: decoder.configuration[name]
            for name in ("orthrus_fast", "dtype", "runner", "attention", "slots", "max_seq_len")
        },
    }
    figures["kinds"] = {s[0]["kind"]: evaluate.measure_kind(decoder, net, s) for s in sets}
    pairs = [
        data.record_example(tokenizer, s)
        for s in records.stream(heldout.SPLIT, 0, heldout.N_RECORDS)
    ]
    figures["ar_loss"] = {"records": evaluate.answer_loss(net, pairs)}
    code: list[tuple[list[int], list[int]]] = [([], tokenizer.encode(text).ids) for text in texts]
    figures["ar_loss"]["code"] = evaluate.answer_loss(net, code)
    write_figures(place, figures)


def measure_speed(place: Workplace) -> None:
    for figures in speed.measure(place.model, read_figures(place).get("speed")):
        write_figures(place, {"speed": figures})


def read_figures(place: Workplace) -> dict[str, Any]:
    path = place.model / "figures.json"
    figures: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return figures


def write_figures(place: Workplace, measured: dict[str, Any]) -> None:
    """Add what was measured to figures.json, keep the rest of it, and update the card."""
    figures = read_figures(place) | measured
    path = place.model / "figures.json"
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if (place.model / "README.md").exists():
        card.update_card(place.model)


STAGES = {
    "fetch": fetch,
    "tokenizer": tokenizer,
    "held-out": held_out,
    "prepare": prepare,
    "train-ar": train_ar,
    "prepare-more": prepare_more,
    "tune-ar": tune_ar,
    "answers": answers,
    "train-draft": train_draft,
    "export": write_checkpoint,
    "evaluate": measure,
    "speed": measure_speed,
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="+", choices=list(STAGES), metavar="STAGE")
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / ".data",
        help="folder of intermediate files (default .data)",
    )
    parser.add_argument(
        "--model", type=Path, default=ROOT / "model", help="the checkpoint directory"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--ar-steps", type=int, help="steps of phase 1")
    parser.add_argument("--draft-steps", type=int, help="steps of phase 2")
    parser.add_argument(
        "--draft-seconds", type=float, help="end phase 2 after this time, not after steps"
    )
    parser.add_argument(
        "--dense-masks", action="store_true", help="phase 2 without FlexAttention (slower steps)"
    )
    parser.add_argument(
        "--part-seconds", type=float, default=480.0, help="a training stage stops after this time"
    )
    parser.add_argument(
        "--slots", type=int, default=1, help="sequences that evaluate decodes at once"
    )
    parser.add_argument("--runner", default="eager", help="the runner that evaluate decodes with")
    parser.add_argument("--tiny", action="store_true", help="very small sizes, to try the stages")
    return parser.parse_args(arguments)


def make_recipe(options: argparse.Namespace) -> Recipe:
    recipe = TINY if options.tiny else Recipe()
    asked = {"ar": options.ar_steps, "tune": None, "draft": options.draft_steps}
    plans = {}
    for name, steps in asked.items():
        plan = dataclasses.replace(getattr(recipe, name), part_seconds=options.part_seconds)
        plans[name] = dataclasses.replace(plan, steps=steps) if steps else plan
    plans["draft"] = dataclasses.replace(plans["draft"], total_seconds=options.draft_seconds)
    return dataclasses.replace(recipe, **plans)


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options = parse(arguments)
    torch.set_float32_matmul_precision("highest")
    device = torch.device(options.device)
    place = Workplace(
        make_recipe(options),
        options.work,
        options.model,
        device,
        options.workers,
        options.dense_masks,
        options.slots,
        options.runner,
    )
    for stage in options.stages:
        started = time.monotonic()
        STAGES[stage](place)
        log.info("%s took %.0f s", stage, time.monotonic() - started)


if __name__ == "__main__":
    main()
