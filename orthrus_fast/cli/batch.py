"""Many prompts from a file, their results into another: JSON Lines both, and resumable.

A result depends on its own line, the settings and the seed, not on its neighbours. So what a killed
run wrote is kept, and the run that finishes it writes what the first would have written.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from orthrus_fast.checkpoint import Checkpoint
from orthrus_fast.decoder import Decoder
from orthrus_fast.errors import PromptError, RequestError, TemplateError, one_line
from orthrus_fast.files import TEXT_FILES
from orthrus_fast.results import Generation
from orthrus_fast.sampling import SamplingParams, is_integer

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

MAX_LINE_BYTES = 4 * 2**20  # of a prompt; some hundred times what fits into a context
FORMAT = 1
HEADER_START = b'{"orthrus_fast_results": '
KINDS = ("prompt", "messages", "ids")
SEED_BITS = 48  # of a drawn seed: with an index added it is exact in any reader's JSON numbers
SAMPLES, SAMPLE_BYTES = 1024, 4096  # of a file of weights that is too large to be read whole
WHOLE_BYTES = 2**26
SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "stop", "logprobs")
# Where the files lie and which of several equal devices runs them changes no text.
NOT_SETTINGS = ("checkpoint", "commit", "device")


@dataclass(frozen=True)
class PromptLine:
    """One prompt of a file."""

    where: str  # file and line, for errors
    index: int  # among the file's prompts, from 0
    id: str | int  # the user's own; else the line's number, from 1
    kind: str  # prompt, messages or ids
    prompt: Any  # str, list of dicts, or list of ints
    settings: Mapping[str, Any]  # the line's own: SamplingParams' names, and a budget


# The prompts.


def read_prompts(path: str | Path) -> list[PromptLine]:
    """The prompts of a JSON Lines file, one object a line; blank lines are ignored.

    A line has exactly one of "prompt" (text), "messages" (objects) and "ids" (integers), and may
    have "id" and settings of its own. Whether a prompt can be decoded shows later, in its result.
    Raises PromptError, naming file and line, for a file that cannot be read as that.
    """
    lines: list[PromptLine] = []
    seen: dict[str | int, str] = {}
    try:
        with open(path, "rb") as file:
            for number, content in _numbered_lines(file, path):
                line = _parse_line(content, f"{path}, line {number}", number, len(lines))
                if line.id in seen:
                    raise PromptError(f"{line.where}: id {_shown(line.id)}: also {seen[line.id]}")
                seen[line.id] = f"line {number}'s"
                lines.append(line)
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not lines:
        raise PromptError(f"{path}: has no prompts; each line is an object with a prompt")
    return lines


def _numbered_lines(file: BinaryIO, path: str | Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    while content := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(content) > MAX_LINE_BYTES:
            raise PromptError(f"{path}, line {number}: over {MAX_LINE_BYTES} bytes")
        if number == 1:
            content = content.removeprefix(b"\xef\xbb\xbf")  # some editors begin UTF-8 so
        if content.strip():
            yield number, content


def _parse_line(content: bytes, where: str, number: int, index: int) -> PromptLine:
    fields = _parse_object(content, where)
    kinds = [kind for kind in KINDS if kind in fields]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none"
        raise PromptError(f"{where}: {found}: it needs one of prompt, messages and ids")
    for name, value in fields.items():
        if name not in FIELDS:
            known = ", ".join(FIELDS)
            raise PromptError(f"{where}: {_shown(name)} is not a field; known are {known}")
        what, fits = FIELDS[name]
        if not fits(value):
            raise PromptError(f"{where}: {name}: {_shown(value)} is not {what}")
    settings = {k: v for k, v in fields.items() if k not in (*KINDS, "id")}
    if "stop" in settings:
        stop = settings["stop"]
        settings["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    return PromptLine(where, index, fields.get("id", number), kinds[0], fields[kinds[0]], settings)


def _parse_object(content: bytes, where: str) -> dict[str, Any]:
    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        fields = json.loads(content.decode("utf-8"), parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise PromptError(f"{where}: not valid UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise PromptError(f"{where}: JSON is nested too deeply") from None
    except ValueError as error:
        raise PromptError(f"{where}: not valid JSON ({one_line(str(error))})") from None
    if not isinstance(fields, dict):
        raise PromptError(f"{where}: not a JSON object")
    return fields


def _is_number(value: Any) -> bool:
    return (is_integer(value) or isinstance(value, float)) and -1e9 <= value <= 1e9


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(v, kind) for v in value)


FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "prompt": ("text", lambda value: isinstance(value, str)),
    "messages": ("a list of objects", _is_list_of(dict)),
    "ids": ("a list of integers", lambda v: isinstance(v, list) and all(map(is_integer, v))),
    "id": ("text or an integer", lambda value: isinstance(value, str) or is_integer(value)),
    "max_new_tokens": ("an integer above 0", lambda value: is_integer(value) and value > 0),
    "temperature": ("a number", _is_number),
    "top_k": ("an integer", is_integer),
    "top_p": ("a number", _is_number),
    "min_p": ("a number", _is_number),
    "seed": ("an integer", is_integer),
    "stop": ("text or a list of texts", lambda v: isinstance(v, str) or _is_list_of(str)(v)),
    "logprobs": ("true or false", lambda value: isinstance(value, bool)),
}


def _shown(value: object) -> str:
    """A value out of a file, on one harmless line of bounded length."""
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


# The settings of each prompt.


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


def decode(
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
    prompts = [[line.id, line.kind, line.prompt, line.settings] for line in lines]
    header = {
        "orthrus_fast_results": FORMAT,
        "fingerprint": {
            "weights": weights_digest(checkpoint),
            "settings": _digest(_settings_of(configuration)),
            "prompts": _digest(prompts),
        },
        "prompts": len(lines),
        "seed": seed,
        "configuration": configuration,
    }
    return dict(json.loads(json.dumps(header)))  # as it will be read back: lists for tuples


def sampling_settings(params: SamplingParams) -> dict[str, Any]:
    """Of the flags, as they stand in a header. The seed stands apart: a run may draw it."""
    return {name: getattr(params, name) for name in SAMPLING_FIELDS}


def weights_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over what a checkpoint makes of a prompt: its small files, and its weights in part.

    config.json, the tokenizer's files and the template count whole. Reading all weights again
    would take as long as loading them: of a file above 64 MiB its size, its header (names, types,
    shapes) and 1024 evenly spaced pieces of 4 KiB count. Other training changes nearly every
    weight and is noticed; a change of a few weights between the pieces is not.
    """
    digest = hashlib.sha256()
    small = [checkpoint.directory / name for name in TEXT_FILES]
    for path in [path for path in small if path.exists()]:
        digest.update(f"{path.name}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    for path in sorted(set(checkpoint.tensor_files.values())):
        digest.update(f"{path.name}\n{path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            for part in _samples(file, path.stat().st_size):
                digest.update(part)
    return digest.hexdigest()


def _samples(file: BinaryIO, size: int) -> Iterator[bytes]:
    """What of a safetensors file the digest covers."""
    if size <= WHOLE_BYTES:
        yield file.read()
        return
    length = file.read(8)  # a safetensors file begins with its header's length
    yield length + file.read(min(int.from_bytes(length, "little"), size))
    for i in range(SAMPLES):
        file.seek((size - SAMPLE_BYTES) * i // (SAMPLES - 1))
        yield file.read(SAMPLE_BYTES)


def _settings_of(configuration: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in configuration.items() if name not in NOT_SETTINGS}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What two headers disagree in, in words."""
    theirs, ours = found["fingerprint"], wanted["fingerprint"]
    differ = [part for part in ("weights", "settings", "prompts") if theirs.get(part) != ours[part]]
    old, new = _settings_of(found["configuration"]), _settings_of(wanted["configuration"])
    changed = [
        f"{name}: {_shown(old.get(name))} there, {_shown(new.get(name))} here"
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
        fields = asdict(generation)
        if generation.logprobs is None:
            del fields["logprobs"]
        self._write({"id": line.id, "index": line.index, **fields})
        self.done.add(line.index)

    def _write(self, record: Mapping[str, Any]) -> None:
        # ASCII: no reader takes a character of the text for the end of the line.
        self._file.write(json.dumps(record).replace("\x7f", "\\u007f").encode("ascii") + b"\n")
        self._file.flush()

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
            raise RequestError(f"{self.path}: of format {_shown(version)}; this reads {FORMAT}")
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
                what = _shown(result.get("id"))
                raise RequestError(
                    f"{self.path}, line {number}: id {what}: is there twice, or is no prompt's; "
                    "remove the line"
                )
            self.done.add(index)
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
