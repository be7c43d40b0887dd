"""The embedded checkpoint: its generator against the standard library's parsers, its held-out set,
its tokenizer, its card, and the arithmetic that trained it."""

from __future__ import annotations

import configparser
import csv
import io
import json
import re
import shlex
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import orthrus_fast
from orthrus_fast import Decoder
from scripts import train_embedded
from scripts.embedded import (
    card,
    data,
    decode,
    evaluate,
    export,
    heldout,
    net,
    records,
    speed,
    tokens,
)
from scripts.embedded import sources as package_sources
from scripts.embedded import train as training

pytestmark = pytest.mark.slow  # it changes with the recipe alone
MODEL = Path(__file__).resolve().parents[2] / "model"
N_SAMPLES = 6000


# The generator against other parsers ----------------------------------------------------------


def parse_csv(sample: records.Sample) -> list[dict[str, str]]:
    wanted = {*sample.request.columns, sample.request.key} - {None}
    for delimiter in ",;|":
        lines = csv.reader(io.StringIO(sample.source), delimiter=delimiter, skipinitialspace=True)
        header, *rows = lines
        if wanted <= set(header):
            return [dict(zip(header, row, strict=True)) for row in rows]
    raise AssertionError(f"no delimiter splits {sample.source!r}")


def parse_tsv(sample: records.Sample) -> list[dict[str, str]]:
    return list(
        csv.DictReader(io.StringIO(sample.source), dialect="excel-tab", quoting=csv.QUOTE_NONE)
    )


def parse_markdown(sample: records.Sample) -> list[dict[str, str]]:
    lines = [line[1:-1].split("|") for line in sample.source.split("\n")]
    header, _rule, *rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


def parse_lines(sample: records.Sample) -> list[dict[str, str]]:
    blocks = re.split(r"\n\n|\n---\n", sample.source)
    pairs = (
        [re.split(r"[:=]", line, maxsplit=1) for line in block.split("\n")] for block in blocks
    )
    return [{name.strip(): value.strip() for name, value in block} for block in pairs]


def parse_ini(sample: records.Sample) -> list[dict[str, str]]:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(sample.source)
    return [{"section": name, **parser[name]} for name in parser.sections()]


LOG_LINES = (
    r"(?P<date>\d{4}-\d\d-\d\d) (?P<time>[\d:]+) (?P<level>[A-Z]+) "
    r"(?P<source>\S+): (?P<message>.*)",
    r"\[(?P<time>[^]]+)\] (?P<level>[A-Z]+) (?P<message>.*)",
    r"(?P<ip>[\d.]+) (?P<method>[A-Z]+) (?P<path>\S+) (?P<status>\d+) (?P<bytes>\d+)",
)


def parse_log(sample: records.Sample) -> list[dict[str, str]]:
    def parse(line: str) -> dict[str, str]:
        for pattern in LOG_LINES:
            if match := re.fullmatch(pattern, line):
                return match.groupdict()
        return dict(pair.split("=", 1) for pair in shlex.split(line))

    return [parse(line) for line in sample.source.split("\n")]


PARSERS: dict[str, Callable[[records.Sample], list[dict[str, str]]]] = {
    "csv": parse_csv,
    "tsv": parse_tsv,
    "markdown": parse_markdown,
    "lines": parse_lines,
    "ini": parse_ini,
    "log": parse_log,
}


def typed(text: str) -> Any:
    """The typing rule, written with json's own parser."""
    if text == "":
        return None
    if text in ("True", "TRUE", "False", "FALSE"):
        text = text.lower()
    if text in ("true", "false") or (text[0] in "-0123456789" and "e" not in text.lower()):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def shaped(rows: list[dict[str, str]], request: records.Request) -> Any:
    convert: Callable[[str], Any] = typed if request.typed else str
    objects = [{n: convert(row[n]) for n in request.columns if n in row} for row in rows]
    if request.shape == "object":
        return objects[0]
    if request.shape == "keyed":
        return {row[request.key or ""]: value for row, value in zip(rows, objects, strict=True)}
    if request.shape == "values":
        return [value[request.columns[0]] for value in objects]
    if request.shape == "columns":
        return {name: [value[name] for value in objects] for name in request.columns}
    return objects


def test_expected_answers_agree_with_the_standard_parsers() -> None:
    formats = set()
    for sample in records.stream("test", 0, N_SAMPLES):
        rows = PARSERS[sample.format](sample)
        wanted = shaped(rows, sample.request)
        assert evaluate.is_exact(sample.answer, wanted), (sample.source, sample.request)
        assert json.loads(sample.answer) == sample.expected
        formats.add((sample.format, sample.request.shape))
    assert len(formats) >= 18


def test_the_message_holds_the_source_and_names_what_is_asked() -> None:
    for sample in records.stream("test", 0, 1000):
        text = sample.messages[-1]["content"]
        assert sample.source in text
        instruction = text.replace(sample.source, "")
        if sample.request.key not in (None, "section"):
            assert str(sample.request.key) in instruction


def test_a_sample_depends_on_its_split_and_index_alone() -> None:
    again = [records.make_sample("train", index) for index in (7, 3, 7)]
    assert again[0] == again[2] != again[1]
    assert records.make_sample("train", 7) != records.make_sample("held-out", 7)


@pytest.mark.parametrize(
    ("answer", "expected", "exact"),
    [
        ('{"a": 1.50}', {"a": 1.5}, True),
        ('{"b": 1, "a": 2}', {"a": 2, "b": 1}, True),
        ("[true]", [1], False),
        ('["1"]', [1], False),
        ("[1", [1], False),
    ],
)
def test_exactness_of_an_answer(answer: str, expected: Any, exact: bool) -> None:
    assert evaluate.is_exact(answer, expected) is exact


# The held-out set -----------------------------------------------------------------------------


def held_out_entries() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (MODEL / "heldout.jsonl").read_text("utf-8").splitlines()]


def test_held_out_records_are_those_of_their_split_and_meet_no_training_sample() -> None:
    kept = [entry for entry in held_out_entries() if entry["kind"] == "records"]
    assert kept == json.loads(json.dumps(heldout.record_prompts(len(kept))))
    digests = heldout.held_out_digests()
    assert {records.messages_digest(entry["messages"]) for entry in kept} <= digests
    assert not digests & {sample.digest for sample in records.stream("train", 0, N_SAMPLES)}
    first = records.make_sample("train", 0)
    assert list(records.stream("train", 0, 1, frozenset([first.digest]))) == []


def test_held_out_file_is_small_and_of_all_kinds() -> None:
    entries = held_out_entries()
    counts = {
        kind: sum(e["kind"] == kind for e in entries) for kind in ("records", "code", "prose")
    }
    assert counts["records"] >= 96 and counts["code"] >= 24
    assert counts["prose"] == heldout.N_PROSE == 128
    assert (MODEL / "heldout.jsonl").stat().st_size < 150_000


def test_held_out_prose_is_plain_and_told_apart() -> None:
    prose = heldout.read_held_out(MODEL / "heldout.jsonl", "prose")
    written = [entry["text"] for entry in prose if entry["source"] == "written"]
    assert written == list(heldout.WRITTEN)
    texts = [entry["text"] for entry in prose if entry["source"] == "docstrings"]
    assert len(written) + len(texts) == len({entry["text"] for entry in prose}) == 128
    assert all(8 <= len(text.split()) <= 16 and text[0].isupper() for text in texts)


def test_prose_shares_no_run_of_words_with_training_text() -> None:
    first, second = (
        f"The {word} of this function is described by a long sentence that says {word} what it "
        "takes and then what it gives back to whoever calls it again."
        for word in ("purpose", "meaning")
    )
    held_out = [f'def f():\n    """{first}\n\n    {second}\n    """\n', "not python ("]
    count = len(heldout.WRITTEN) + 2

    def quoted(trained: list[str]) -> list[str]:
        prompts = heldout.prose_prompts(held_out, trained, count)
        return [entry["text"] for entry in prompts if entry["source"] == "docstrings"]

    assert len(quoted([])) == 2
    copied = "# The  purpose OF this\nfunction is - described by\n"
    (left,) = quoted([copied])
    assert second.startswith(left)
    assert quoted([copied, "is described by a long sentence that says"]) == []


def test_sources_are_pinned_permissive_and_apart() -> None:
    listed = package_sources.read_sources(MODEL / "SOURCES.tsv")
    assert len({source.name for source in listed}) == len(listed)
    for source in listed:
        assert re.fullmatch("[0-9a-f]{64}", source.sha256), source
        assert set(re.split(" OR ", source.licence)) <= {"MIT", "Apache-2.0", *BSD}, source
    assert {source.role for source in listed} == {"train", "held-out"}


BSD = ("BSD-2-Clause", "BSD-3-Clause")


def test_demo_records_expect_what_csv_says() -> None:
    demo = json.loads((MODEL / "demos.json").read_text("utf-8"))["records"]
    source = demo["messages"][0]["content"].split("\n\n", 1)[1]
    rows = list(csv.DictReader(io.StringIO(source)))
    assert len(rows) == 6
    assert [{name: typed(value) for name, value in row.items()} for row in rows] == demo["expected"]


# Tokenizer, configuration, card ---------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.text() | st.binary().map(lambda raw: raw.decode("latin-1")))
def test_any_text_round_trips(text: str) -> None:
    tokenizer = tokens.load_tokenizer(MODEL)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_a_value_has_the_same_tokens_wherever_it_stands() -> None:
    tokenizer = tokens.load_tokenizer(MODEL)
    value = tokenizer.encode("Copper kettle").tokens
    for before, after in ((",", ","), ("| ", " |"), (": ", "\n"), ('": "', '", "'), (" = ", "\n")):
        found = tokenizer.encode(before + "Copper kettle" + after).tokens
        assert " ".join(value) in " ".join(found)


def test_configuration_is_that_of_the_recipe_and_the_weights() -> None:
    shape = net.Shape()
    config = json.loads((MODEL / "config.json").read_text("utf-8"))
    tokenizer = tokens.load_tokenizer(MODEL)
    assert config == export.config_fields(shape, tokens.end_tokens(tokenizer)[0])
    assert tokenizer.get_vocab_size() == shape.n_entries == shape.mask_token_id < shape.vocab_size
    with torch.device("meta"):
        wanted = {name: list(w.shape) for name, w in net.OrthrusLM(shape).state_dict().items()}
    path = MODEL / "model.safetensors"
    with safe_open(path, "pt") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        assert {file.get_slice(name).get_dtype() for name in found} == {"BF16"}
    assert found == wanted
    assert path.stat().st_size <= 30_000_000


def test_chat_template_renders_as_training_did() -> None:
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Environment().from_string((MODEL / "chat_template.jinja").read_text("utf-8"))
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "a\n\n b "}]
    rendered = template.render(messages=messages, add_generation_prompt=True)
    assert rendered == tokens.render_chat(messages)


def test_card_says_what_was_measured() -> None:
    figures = json.loads((MODEL / "figures.json").read_text("utf-8"))
    assert card.figures_section(figures) in (MODEL / "README.md").read_text("utf-8")
    kinds = figures["kinds"]
    assert kinds["records"]["exact_share"] >= 0.95
    assert kinds["records"]["tokens_per_cycle"] >= 5
    for kind in kinds.values():
        assert kind["same_tokens_in_both_modes"] == kind["prompts"]
        assert kind["cycles_accepted_as_agreeing"] >= 0.999 * kind["cycles"]
    assert [kind["prompts"] for kind in kinds.values()] == [256, 128, 128]


def test_readme_says_the_speed_that_was_measured() -> None:
    rows = json.loads((MODEL / "figures.json").read_text("utf-8"))["speed"]["rows"]
    assert {(row["threads"], row["runner"]) for row in rows} == set(product((1, 2), speed.RUNNERS))
    readme = (MODEL.parent / "README.md").read_text("utf-8")
    held_out = json.loads((MODEL / "figures.json").read_text("utf-8"))["kinds"]
    for row in (r for r in rows if (r["runner"], r["prompt"]) == ("eager", "records")):
        pays = row["tokens_per_cycle"] / row["gain"]
        for text in ("records", "code", "prose"):
            gain = held_out[text]["tokens_per_cycle"] / pays
            where = rf"embedded, CPU \({row['threads']}\) \| {text}"
            line = rf"^\| {where} \| [^|]* \| {pays:.2f} \| {gain:.2f} "
            assert re.search(line, readme, re.MULTILINE)


# The arithmetic of training -------------------------------------------------------------------


@pytest.fixture
def tiny() -> net.OrthrusLM:
    shape = net.Shape(64, 60, 32, 48, 2, 4, 2, 16, block_size=8, max_positions=128)
    model = net.OrthrusLM(shape)
    model.initialise(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # sharp enough that no two logits tie
    return model


def test_masks_of_training_let_a_block_see_its_context_and_itself() -> None:
    from torch.nn.attention.flex_attention import create_mask

    anchors, length, block = torch.tensor([[3, 17, 40, 41], [0, 5, 6, 90]]), 128, 16
    dense = training.dense_mask(anchors, length, block)
    sparse = training.sparse_mask(anchors, length, block)
    same = create_mask(sparse.mask_mod, 2, 1, 4 * block, length + 4 * block, device="cpu")
    assert torch.equal(dense, same)
    row = dense[0, 0, block + 2]  # the third row of the second block
    assert row.nonzero().flatten().tolist() == [*range(17), *range(length + 16, length + 32)]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[net.OrthrusLM, Decoder]:
    """A small network, and the package's decoder of the checkpoint that it was saved as."""
    tokenizer = tokens.train_tokenizer(iter(()), 259)  # the special tokens and the bytes
    shape = net.Shape(272, 259, 32, 48, 2, 4, 2, 16, block_size=8, max_positions=128)
    model = net.OrthrusLM(shape)
    model.initialise(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    model.round_weights()
    model.start_draft_from_ar()  # drafts that are right sometimes
    export.write_checkpoint(model, tokenizer, tmp_path)
    return model, orthrus_fast.load(tmp_path, device="cpu", drafting=8)


def test_batched_and_package_decoding_agree(saved: tuple[net.OrthrusLM, Decoder]) -> None:
    model, decoder = saved
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
    batched = decode.greedy_batch(model, prompts, 24, ends=decoder.config.eos_token_ids)
    for mode in ("ar", "diffusion"):
        assert [r.tokens for r in decoder.generate(prompts, 24, mode=mode)] == batched


def test_agreement_is_with_what_the_package_drafted(saved: tuple[net.OrthrusLM, Decoder]) -> None:
    model, decoder = saved
    prompts = [[20 + i, 5, 7 * i % 90] for i in range(12)]
    results = decoder.generate(prompts, 40)
    figures = evaluate.agreement(model, prompts, results)
    cycles = [n for r in results if r.stats for n in r.stats.accepted]
    assert figures["cycles_accepted_as_agreeing"] == len(cycles)
    assert 0 < sum(cycles) < 7 * len(cycles)
    shares = figures["agreement_by_position"]
    assert len(shares) == 7 and max(shares) > 0
    n_first = sum(n > 0 for n in cycles)
    assert abs(shares[0] - n_first / len(cycles)) < 0.05  # but for cycles with room for one token


def test_figures_of_a_kind_are_the_packages(saved: tuple[net.OrthrusLM, Decoder]) -> None:
    model, decoder = saved
    entries = [{"kind": "prose", "source": s, "text": f"{s} text"} for s in ("a", "b", "b")]
    figures = evaluate.measure_kind(decoder, model, entries)
    longest = max(len(decoder.encode(entry["text"])) for entry in entries)
    results = [decoder.generate(entry["text"], 128 - longest) for entry in entries]
    assert figures["same_tokens_in_both_modes"] == figures["prompts"] == 3
    assert figures["tokens"] == sum(len(r.tokens) for r in results)
    assert figures["cycles"] == sum(r.stats.cycles for r in results if r.stats)
    assert [part["prompts"] for part in figures["by_source"].values()] == [1, 2]


def test_the_gain_is_over_the_faster_ar(
    saved: tuple[net.OrthrusLM, Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "MAX_NEW", 20)
    figures = speed.time_modes(saved[1], [1, 2, 3])
    rates = figures["tokens_per_second"]
    ranges = figures["tokens_per_second_range"]
    for name, (low, high) in ranges.items():
        assert low <= rates[name] <= high
    low, high = figures["gain_range"]
    assert low <= figures["gain"] <= high
    stats = saved[1].generate([1, 2, 3], 20).stats
    assert stats is not None and stats.tokens_per_cycle is not None
    assert figures["tokens_per_cycle"] == round(stats.tokens_per_cycle, 4)
    fastest = max(ranges["ar"][1], ranges["ar_baseline"][1])
    slowest = max(ranges["ar"][0], ranges["ar_baseline"][0])
    assert ranges["diffusion"][0] / fastest * 0.99 <= low
    assert high <= ranges["diffusion"][1] / slowest * 1.01


def test_a_stage_keeps_what_another_measured(tmp_path: Path) -> None:
    place = train_embedded.Workplace(
        train_embedded.TINY, tmp_path, tmp_path, torch.device("cpu"), 1, False, 1, "eager"
    )
    train_embedded.write_figures(place, {"speed": {"rows": [1]}, "kinds": {}})
    train_embedded.write_figures(place, {"kinds": {"code": 2}})
    assert train_embedded.read_figures(place) == {"speed": {"rows": [1]}, "kinds": {"code": 2}}


def test_draft_weights_end_with_the_answer() -> None:
    roles = torch.tensor([[1, 1, 2, 2, 2, 2, 1, 1, 2, 2]])
    anchors = training.choose_anchors(roles, 2, 4, torch.Generator().manual_seed(0))
    assert set(anchors[0].tolist()) <= {2, 3, 4}
    positions = torch.tensor([[2, 3, 4, 5, 4, 5, 6, 7]])
    weights = training.draft_weights(roles, positions, 4, decay=1e9)
    assert weights[0].round().tolist() == [[1, 1, 1], [1, 0, 0]]


def test_packing_keeps_examples_whole() -> None:
    examples = [([1] * 3, [2] * 4), ([3] * 5, [4] * 5), ([5], [6]), ([7] * 9, [8] * 9)]
    windows = data.pack(examples, 12)
    assert windows.tokens.tolist() == [
        [1] * 3 + [2] * 4 + [5, 6] + [0] * 3,
        [3] * 5 + [4] * 5 + [0] * 2,
    ]
    assert windows.roles[1].tolist() == [data.PROMPT] * 5 + [data.ANSWER] * 5 + [data.PAD] * 2


def test_phases_touch_only_their_view(tiny: net.OrthrusLM) -> None:
    tiny.round_weights()
    tiny.start_draft_from_ar()
    weights = tiny.state_dict()
    assert torch.equal(
        weights["model.layers.1.self_attn.q_proj_diff.weight"],
        weights["model.layers.1.self_attn.q_proj.weight"],
    )
    drafting = {name for name, _ in tiny.named_view_parameters(True)}
    assert len(drafting) == 2 * 6 and all("_diff." in name for name in drafting)
    assert drafting.isdisjoint(name for name, _ in tiny.named_view_parameters(False))
