"""What a text depends on beside the request, in a few characters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from orthrus_fast.checkpoint import Checkpoint
from orthrus_fast.decoder import Decoder
from orthrus_fast.files import TEXT_FILES
from orthrus_fast.options import ONE_ROW

SAMPLES, SAMPLE_BYTES = 1024, 4096  # of a file of weights that is too large to be read whole
WHOLE_BYTES = 2**26
# Where the files lie and which of several equal devices runs them changes no text; nor do tiles,
# who drafts, the width of a draft and cached rows.
NOT_SETTINGS = (
    *("checkpoint", "commit", "device", "tiles", "draft_weights", "weight_bytes"),
    *("drafting", "prefix_reuse"),
)
FREE = ("slots", "max_seq_len", "block_size")  # what no text depends on, with one row, one result


def fingerprint(decoder: Decoder) -> str:
    """Return a short hash of what a text depends on beside the request.

    That is the weights, their dtype, the kind of chip and the libraries' versions; where the
    decoder promises less than one row, one result, also the slots and sizes.
    """
    assert decoder.checkpoint is not None
    settings = settings_of(decoder.configuration)
    if settings["promise"] == ONE_ROW:
        settings = {name: value for name, value in settings.items() if name not in FREE}
    return f"fp_{digest_of([weights_digest(decoder.checkpoint), settings])[:12]}"


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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


def settings_of(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a decoder's configuration that a text may depend on."""
    return {name: value for name, value in configuration.items() if name not in NOT_SETTINGS}
