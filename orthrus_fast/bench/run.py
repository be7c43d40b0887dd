"""Runs the parts one after another, shows each and writes it to the JSON file."""

import argparse
import logging
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial

from rich.console import Console

from orthrus_fast.bench.acceptance import acceptance
from orthrus_fast.bench.clocks import measuring
from orthrus_fast.bench.common import Result, log
from orthrus_fast.bench.cycles import cycles, slots
from orthrus_fast.bench.flags import PROGRAM, build_parser
from orthrus_fast.bench.identity import identity
from orthrus_fast.bench.passes import passes, prefill, sampling, startup
from orthrus_fast.bench.results import Report
from orthrus_fast.bench.serving import engine, settle
from orthrus_fast.bench.session import Session, build_session
from orthrus_fast.bench.streaming import ceiling
from orthrus_fast.bench.tables import show
from orthrus_fast.errors import OrthrusError, RankError, one_line
from orthrus_fast.launch import leave_talking_to_the_first

PARTS = (startup, ceiling, passes, cycles, sampling, identity, prefill, engine, slots, acceptance)
MEASURES: dict[str, Callable[[Session], Result]] = {part.__name__: part for part in PARTS}


def run(args: argparse.Namespace) -> int:
    """Return 0, or 1 where a part failed; the other parts are measured all the same.

    Each rank of a model runs this, of which the first alone speaks; an error of one ends all.
    """
    if leave_talking_to_the_first():
        args.json = None
    if sys.stderr.isatty():
        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        logging.getLogger("orthrus_fast").setLevel(logging.INFO)
    session = build_session(args, partial(run, args))
    if (ranks := session.ranks) is None:
        return run_parts(session)
    with ranks.ending_together():
        code = run_parts(session)
    if ranks.rank > 0:
        ranks.serve(session.decoder.engine.step)
    ranks.close()
    return code


def run_parts(session: Session) -> int:
    """Measure, show and write the parts; return the exit code. Raises OrthrusError."""
    console = Console() if sys.stdout.isatty() else Console(width=100)
    report = Report(PROGRAM, build_parser(), session.args)
    report.describe(session.decoder.configuration)
    if session.ranks is not None:
        console.print(f"{report.content['environment']['hardware']}: a share of the model on each")
    for name in session.args.parts:
        log(name)
        begin = time.perf_counter()
        try:
            with measuring(session.device):
                part = MEASURES[name](session)
                if session.ranks is not None:  # one of which may have failed
                    session.ranks.share(None)
        except OrthrusError:
            raise
        except Exception as error:
            if session.ranks is not None:  # the others are in the midst of it
                raise RankError(f"{type(error).__name__}: {one_line(str(error))}") from error
            traceback.print_exc()
            report.add("failed", name, f"{type(error).__name__}: {error}")
            continue
        settle(session.decoder.engine)  # of cycles that were launched in vain
        report.add("parts", name, {"part_seconds": time.perf_counter() - begin, **part})
        show(console, name, part)
    return 1 if report.content["failed"] else 0
