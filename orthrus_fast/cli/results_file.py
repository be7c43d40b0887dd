"""The results of a prompts file: JSON Lines, locked while written, resumable.

A result depends on its own line, the settings and the seed, not on its neighbours. So what a killed
run wrote is kept, and the run that finishes it writes what the first would have written. It repeats
the line's fields that are no settings; one named as a field of results stands in its "extra".
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from orthrus_fast.checkpoint import Checkpoint
from orthrus_fast.decoder import Decoder
from orthrus_fast.errors import RequestError
from orthrus_fast.fingerprint import digest_of, settings_of, weights_digest
from orthrus_fast.prompts import MAX_LINE_BYTES, PromptLine, as_shown
from orthrus_fast.results import Generation
from orthrus_fast.sampling import SamplingParams, is_integer

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
HEADER_START = b'{"orthrus_fast_results": '
SEED_BITS = 48  # of a drawn seed: with an index added it is exact in any reader's JSON numbers
SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "stop", "logprobs")


# The fingerprint: what results must share to stand in one file.


def make_header(
    decoder: Decoder,
    checkpoint: Checkpoint,
    lines: Sequence[PromptLine],
    settings: Mapping[str, Any],
    seed: int | None,
) -> dict[str, Any]:
    """The first line of a results file. ``settings`` go beside the decoder's configuration."""
    configuration = {**decoder.configuration, **settings}
    prompts = [[one.id, one.kind, one.prompt, {**one.settings, **one.extra}] for one in lines]
    header = {
        "orthrus_fast_results": FORMAT,
        "fingerprint": {
            "weights": weights_digest(checkpoint),
            "settings": digest_of(settings_of(configuration)),
            "prompts": digest_of(prompts),
        },
        "prompts": len(lines),
        "seed": seed,
        "configuration": configuration,
    }
    return dict(json.loads(json.dumps(header)))  # as it will be read back: lists for tuples


def sampling_settings(params: SamplingParams) -> dict[str, Any]:
    """Of the flags, as they stand in a header. The seed stands apart: a run may draw it."""
    settings = {name: getattr(params, name) for name in SAMPLING_FIELDS}
    return settings | ({"grammar": asdict(params.grammar)} if params.grammar else {})


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What two headers disagree in, in words."""
    theirs, ours = found["fingerprint"], wanted["fingerprint"]
    differ = [part for part in ("weights", "settings", "prompts") if theirs.get(part) != ours[part]]
    old, new = settings_of(found["configuration"]), settings_of(wanted["configuration"])
    changed = [
        f"{name}: {as_shown(old.get(name))} there, {as_shown(new.get(name))} here"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if wanted["seed"] is not None and found["seed"] != wanted["seed"]:
        changed.append(f"seed: {found['seed']} there, {wanted['seed']} here")
        differ = [*differ, "settings"] if "settings" not in differ else differ
    details = f" ({'; '.join(changed)})" if changed else ""
    return [part + details if part == "settings" else part for part in differ]


# The results.


class Results:
    """The results file, locked while it is open; ``-`` is standard output, without resuming.

    Each line is written whole and flushed; a crash of the machine may still lose the last ones.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises RequestError for a file of anything else, or that another process writes to."""
        self.path = str(path)
        self.done: set[int] = set()  # indices of the prompts whose results are there
        self.n_failed = 0  # of these
        self.resumable = self.path != "-"
        self._created = self.resumable and not os.path.lexists(path)
        self._file = _open_locked(self.path) if self.resumable else sys.stdout.buffer
        self._found: dict[str, Any] | None = None
        if self.resumable:
            try:
                self._found = self._read_header()  # before a model is loaded in vain
            except RequestError:
                self._file.close()
                raise

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.resumable:
            return
        if self._created and not self.done:
            os.unlink(self.path)  # no results: leave nothing behind
        with contextlib.suppress(OSError):  # what a full disk did not take was told of before
            self._file.close()

    def begin(
        self, header: dict[str, Any], lines: Sequence[PromptLine], *, draw_seed: bool
    ) -> int | None:
        """Write the header, or take up the results that are there; the run's seed.

        That is the header's, or the file's; a new one where ``draw_seed`` and there is none.
        Raises RequestError, and changes nothing, where the file's results are another run's.
        """
        found = self._found
        if found is None:
            if header["seed"] is None and draw_seed:
                header = {**header, "seed": secrets.randbits(SEED_BITS)}
            self._write(header)
            return header["seed"]  # type: ignore[no-any-return]
        differences = _differences(found, header)
        if differences:
            raise RequestError(
                f"{self.path}: has the results of another run, which differs in "
                f"{', '.join(differences)}; nothing was changed: name another output"
            )
        self._take_up(lines)
        return found["seed"]  # type: ignore[no-any-return]

    def write(self, line: PromptLine, generation: Generation) -> None:
        """One result, as a line."""
        fields = {"id": line.id, "index": line.index, **asdict(generation)}
        taken = {k: v for k, v in line.extra.items() if k in (*fields, "extra")}
        others = {k: v for k, v in line.extra.items() if k not in taken}
        if generation.logprobs is None:
            del fields["logprobs"]
        self._write({**fields, **others, **({"extra": taken} if taken else {})})
        self._count(line.index, generation.finish_reason)

    def _write(self, record: Mapping[str, Any]) -> None:
        # ASCII: no reader takes a character of the text for the end of the line.
        content = json.dumps(record).replace("\x7f", "\\u007f").encode("ascii") + b"\n"
        try:
            self._file.write(content)
            self._file.flush()
        except OSError as error:
            if not self.resumable:
                raise  # standard output's, which may have lost its reader
            raise RequestError(
                f"{self.path}: cannot be written ({error.strerror or error}); what is done stays: "
                "the same command resumes"
            ) from None

    def _count(self, index: int, finish_reason: Any) -> None:
        self.done.add(index)
        self.n_failed += finish_reason == "error"

    def _read_header(self) -> dict[str, Any] | None:
        """The header of the file; None for an empty file, or one with a torn header only."""
        self._file.seek(0)
        first = self._file.readline(MAX_LINE_BYTES)
        torn = not first.endswith(b"\n") and len(first) < MAX_LINE_BYTES
        if torn and (first.startswith(HEADER_START) or HEADER_START.startswith(first)):
            self._file.truncate(0)
            return None
        header = _parse_result(first) or {}
        version = header.get("orthrus_fast_results")
        if version is not None and version != FORMAT:
            raise RequestError(f"{self.path}: of format {as_shown(version)}; this reads {FORMAT}")
        objects = (header.get("fingerprint"), header.get("configuration"))
        whole = all(isinstance(one, dict) for one in objects) and not torn
        whole = whole and isinstance(header.get("seed", ""), (int, type(None)))
        if version is None or not whole:
            raise RequestError(
                f"{self.path}: is no results file of orthrus-fast; nothing was changed: "
                "name another output"
            )
        return header

    def _take_up(self, lines: Sequence[PromptLine]) -> None:
        """Note what is done, from the file's place on; cut off a last line that is not whole."""
        ids = {line.index: line.id for line in lines}
        end, number = self._file.tell(), 1
        while content := self._file.readline():
            number += 1
            result = _parse_result(content)
            if result is None or not content.endswith(b"\n"):
                if self._file.read(1):
                    raise RequestError(f"{self.path}, line {number}: not a result; remove the line")
                break
            index = result.get("index")
            if not is_integer(index) or index in self.done or ids.get(index) != result.get("id"):
                what = as_shown(result.get("id"))
                raise RequestError(
                    f"{self.path}, line {number}: id {what}: is there twice, or is no prompt's; "
                    "remove the line"
                )
            self._count(index, result.get("finish_reason"))
            end += len(content)
        self._file.truncate(end)
        self._file.seek(end)


def _parse_result(content: bytes) -> dict[str, Any] | None:
    """The object on a line; None where it is none."""
    try:
        result = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return result if isinstance(result, dict) else None


def _open_locked(path: str) -> BinaryIO:
    if os.path.exists(path) and not os.path.isfile(path):
        raise RequestError(f"{path}: not a regular file; '-' is standard output")
    try:
        file = open(path, "a+b")  # noqa: SIM115 (Results closes it)
    except OSError as error:
        raise RequestError(f"{path}: cannot be written ({error.strerror or error})") from None
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise RequestError(f"{path}: another process is writing to it") from None
        except OSError:
            pass  # a file system without locks
    return file
