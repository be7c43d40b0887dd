"""The command line: what it takes, what it refuses, and the command that repeats a run."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from orthrus_fast.bench.__main__ import main
from orthrus_fast.bench.common import REPOSITORY
from orthrus_fast.bench.flags import PARTS, PUBLISHED, build_parser, flags_of, number_and_source
from tests.bench.runs import TINY

CPU_TINY = ("--shape", "tiny", "--device", "cpu")


def refused(flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--shape", "3B"), "invalid choice"),
        (("--shape", "tiny", "--checkpoint", "model"), "does not go with --checkpoint"),
        (("--shape", "tiny", "--prompts-file", "x"), "does not go with --prompts-file"),
        (("--accept", "-0.5"), "--accept: invalid"),
        (("--accept", "inf"), "--accept: invalid"),
        (("--accept", "nan"), "--accept: invalid"),
        (("--accept", "8B/GSM8K"), "'8B/GSM8K' is not one of 1.7B/GSM8K, 4B/GSM8K"),
        ((*CPU_TINY, "--accept", "8"), "accept: 8 tokens per cycle is not above 1 and below 8"),
        (("--block-size", "0"), "--block-size: invalid"),
        ((*CPU_TINY, "--block-size", "1"), "from 2 to 8"),
        ((*CPU_TINY, "--block-size", "9"), "from 2 to 8"),
        (("--device", "cpu", "--block-size", "17"), "from 2 to 16"),
        (("--slots", "0"), "--slots: invalid"),
        (("--slots-list", "1,x"), "--slots-list: invalid"),
        (("--contexts", "12,-1"), "--contexts: invalid"),
        (("--parts", "passes,lunch"), "--parts: not of startup, ceiling"),
        (("--widths", "0"), "--widths: invalid"),
        ((*CPU_TINY, "--widths", "8,9"), "widths: [8, 9] are not all within 2 … 8"),
        ((*CPU_TINY, "--widths", "1"), "widths: [1] are not all within 2 … 8"),
        (("--new-tokens", "1"), "below 2"),
        (("--device", "tpu"), "device"),
        (("--dtype", "int3"), "invalid choice"),
        (("--draft-weights", "int3"), "invalid choice"),
        ((*CPU_TINY, "--weights", "int4", "--draft-weights", "fp8"), "leave draft_weights out"),
        (("--compile-mode", "fast"), "invalid choice"),
        ((*CPU_TINY, "--compile-mode", "max-autotune"), "use runner 'compiled'"),
        ((*CPU_TINY, "--runner", "graph"), "needs a CUDA device"),
        ((*CPU_TINY, "--contexts", "5000"), "not below max_seq_len"),
        ((*CPU_TINY, "--new-tokens", "5000"), "no room for a prompt"),
        ((*CPU_TINY, "--max-seq-len", "9999999"), "max_seq_len"),
        (("--checkpoint", "/nowhere"), "no such directory"),
        (("--shape", "tiny", "--json", "/nowhere/r.json"), "no such directory"),
        (("--json", str(Path(__file__))), "exists; name another file, or remove it"),
        (("--speed",), "--speed"),
        (("--prompts-file", "-"), "--prompts-file: several parts read it; name a file"),
        ((*TINY, "--temperature", "-1"), "temperature=-1.0 is not"),
        ((*TINY, "--temperature", "hot"), "--temperature: invalid"),
        ((*TINY, "--temperature", "1", "--top-k", "0"), "--top-k: invalid"),
        ((*TINY, "--temperature", "1", "--top-p", "1.5"), "top_p=1.5 is not"),
        ((*TINY, "--top-k", "20"), "need a --temperature above 0"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    flags: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert problem in refused(flags, capsys)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_acceptance_by_name(name: str) -> None:
    for spelled in (name, name.upper(), name.lower()):
        accept = build_parser().parse_args(["--accept", spelled]).accept
        number, source = PUBLISHED[name]
        full = {"name": name, "tokens_per_cycle": number, "source": source}
        assert accept == name and number_and_source(accept) == (number, full)
    assert number_and_source(0.5) == (0.5, None)
    help_text = " ".join(build_parser().format_help().split())
    assert name in help_text.replace("- ", "-").replace("/ ", "/")


def test_parts_come_in_their_own_order() -> None:
    assert build_parser().parse_args([]).parts == PARTS
    assert build_parser().parse_args(["--parts", "slots,startup"]).parts == ["startup", "slots"]


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--shape", "8B", "--accept", "8B/MATH-500", "--contexts", "128,1024", "--seed", "5"),
        ("--parts", "startup,slots", "--widths", "2,4", "--temperature", "0.7"),
        ("--checkpoint", "a directory/model", "--dtype", "float64", "--slots-list", "1,3"),
    ],
)
def test_the_flags_that_repeat_a_run_parse_to_its_arguments(flags: tuple[str, ...]) -> None:
    parser = build_parser()
    args = parser.parse_args([*flags, "--json", "r.json"])
    words = flags_of(parser, args)
    again = parser.parse_args(shlex.split(shlex.join(words)))
    assert vars(again) == {**vars(args), "json": None}
    assert len(words) == len(flags)  # nothing that is at its default


@pytest.mark.slow
def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from orthrus_fast.bench import __main__ as command; command.build_parser(); "
    )
    code += "sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
