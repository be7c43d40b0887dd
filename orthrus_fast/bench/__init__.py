"""The benchmark: what is timed, how, and the report.

    python -m orthrus_fast.bench --shape 8B --json result.json

The work is cut into parts, and the JSON file is rewritten after each, so that a run that was ended
early goes on where it stopped. Both sides of every ratio are measured in one part, and the ceiling
anew in each part that quotes a share of it. Replayed acceptance means: the draft pass runs at full
cost, then its proposals give way to the known continuation, a wanted share of it right; speeds at a
trained model's acceptance are so measured on random weights. Heavy imports wait until needed.
"""

from orthrus_fast.bench.clocks import measuring, summary
from orthrus_fast.bench.command import (
    COMPILE_MODES,
    NAMES,
    PARTS,
    Parser,
    build_parser,
    check_flags,
    integers,
    main,
    positive,
)
from orthrus_fast.bench.common import (
    EMBEDDED,
    PREFILL_LENGTHS,
    REPOSITORY,
    ROUNDS,
    Result,
    release_memory,
    tell,
)
from orthrus_fast.bench.decoding import Decoded, decode, endless, seeded, served_by
from orthrus_fast.bench.interruption import heeding_sigterm, status
from orthrus_fast.bench.passes import first_token_ms
from orthrus_fast.bench.published import PUBLISHED, add_accept
from orthrus_fast.bench.replay import (
    Replay,
    expected_tokens_per_cycle,
    replaced,
    share_of_right_drafts,
)
from orthrus_fast.bench.results import FORMAT, surroundings, version_of
from orthrus_fast.bench.shapes import random_model, shape_config
from orthrus_fast.bench.subject import Bench, build, random_prompts

__all__ = [
    "COMPILE_MODES",
    "EMBEDDED",
    "FORMAT",
    "NAMES",
    "PARTS",
    "PREFILL_LENGTHS",
    "PUBLISHED",
    "REPOSITORY",
    "ROUNDS",
    "Bench",
    "Decoded",
    "Parser",
    "Replay",
    "Result",
    "add_accept",
    "build",
    "build_parser",
    "check_flags",
    "decode",
    "endless",
    "expected_tokens_per_cycle",
    "first_token_ms",
    "heeding_sigterm",
    "integers",
    "main",
    "measuring",
    "positive",
    "random_model",
    "random_prompts",
    "release_memory",
    "replaced",
    "seeded",
    "served_by",
    "shape_config",
    "share_of_right_drafts",
    "status",
    "summary",
    "surroundings",
    "tell",
    "version_of",
]
