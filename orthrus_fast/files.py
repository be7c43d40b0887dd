"""Reading the files of a checkpoint, which nobody vouches for, and writing a file whole."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orthrus_fast.errors import CheckpointError, ConfigError, list_some

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TEMPLATE_FILES = (  # by name, a later one before an earlier; transformers knows more by request
    ("default", "chat_template.jinja"),
    ("default", "additional_chat_templates/default.jinja"),
    ("tool_use", "additional_chat_templates/tool_use.jinja"),
)
TEXT_FILES = (  # all but the weights and their index
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    *(file for _, file in TEMPLATE_FILES),
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_JSON_BYTES = 64 * 2**20  # a Qwen3 tokenizer.json has 11 MB; the largest honest file we know


def read_json(path: Path) -> Any:
    """Parse a JSON file of a checkpoint that nobody vouches for.

    Raises CheckpointError for a file that is missing, over 64 MiB, not UTF-8, nested so deeply that
    the parser gives up, or not JSON (NaN and Infinity are not).
    """

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        content = read_bytes(path, MAX_JSON_BYTES).decode("utf-8")
        return json.loads(content, parse_constant=refuse_constant)
    except RecursionError:
        raise CheckpointError(f"{path}: JSON is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None


def read_object(path: Path) -> dict[str, Any]:
    """``read_json`` of a file that must hold an object. Raises ConfigError where it does not."""
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return fields


def read_bytes(path: Path, limit: int) -> bytes:
    """A regular file's content. Raises CheckpointError where there is none, or too much of it."""
    try:
        if not path.is_file():  # reading a FIFO would wait for ever
            raise CheckpointError(f"{path}: {'not a file' if path.exists() else 'file not found'}")
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(f"{path}: {size} bytes, over the limit of {limit}")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None


def local_directory(name: str) -> Path:
    directory = Path(os.path.expanduser(name))
    if not os.path.lexists(directory):
        raise CheckpointError(f"{name}: no such directory")
    if not directory.is_dir():
        if other := other_format(name, [name]):
            raise other
        raise CheckpointError(f"{name}: not a directory; give the one that holds config.json")
    if not os.access(directory, os.R_OK | os.X_OK):
        raise CheckpointError(f"{name}: cannot be read (permission denied)")
    return directory


def check_file(directory: Path, name: str) -> Path:
    """``directory / name`` where that is a regular file within it. Raises CheckpointError.

    A Hub snapshot's links into the blobs of its own repository count as within, and so does the
    store that one cache's repositories share (huggingface_hub 2 puts files there).
    """
    path = directory / name
    try:
        real, home = path.resolve(strict=True), directory.resolve(strict=True)
        regular = stat.S_ISREG(real.stat().st_mode)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    roots = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        repository = home.parent.parent
        roots.append(repository / "blobs")
        if (repository.parent / "blobs" / ".huggingface-shared-blobs").is_file():
            roots.append(repository.parent / "blobs")
    if not any(real.is_relative_to(root) for root in roots):
        raise CheckpointError(f"{path}: leads outside the checkpoint, to {real}; copy the file in")
    if not regular:
        raise CheckpointError(f"{path}: not a regular file")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path}: cannot be read (permission denied)")
    return path


def embedded_checkpoint() -> Path:
    """The directory of the checkpoint that comes with the package. Raises CheckpointError."""
    package = Path(__file__).resolve().parent
    for directory in (package / "embedded", package.parent / "model"):
        if (directory / "config.json").is_file():
            return directory
    raise CheckpointError(f"{package}: came without its embedded checkpoint; name another one")


def other_format(place: Path | str, names: Iterable[str]) -> CheckpointError | None:
    """What the files ``names`` are where they are known to be no checkpoint of this format."""
    names = sorted(names)
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return CheckpointError(
            f"{place}: GGUF ({list_some(ggufs)}) is llama.cpp's format and not supported; use the "
            "checkpoint that it was made from, with safetensors files"
        )
    if "adapter_config.json" in names:
        return CheckpointError(
            f"{place}: an adapter (adapter_config.json) without the model that it belongs to; "
            "merge the two with peft's merge_and_unload, and save the result"
        )
    return None


def no_weights(place: Path | str, names: Iterable[str]) -> CheckpointError:
    names = list(names)
    if other := other_format(place, names):
        return other
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if not pickles:
        return CheckpointError(f"{place}: has neither {WEIGHTS} nor {INDEX}")
    return CheckpointError(
        f"{place}: has only pickled weights ({list_some(pickles)}); a pickle can run any code and "
        "is never loaded: if you trust it, convert it with transformers' "
        "from_pretrained(...).save_pretrained(...), which writes safetensors"
    )


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, also when writing is interrupted."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
