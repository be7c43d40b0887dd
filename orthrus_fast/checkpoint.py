"""Checkpoints: found on disk or on the Hub, held against their config, then loaded.

Nobody vouches for a checkpoint. Only safetensors files are read, never a pickle; every file must be
a regular file within the checkpoint's own directory; and every tensor's name, shape and type must
be what config.json asks for before any memory is taken. Nothing is skipped: a tensor that the model
has no place for is refused, the ``rotary_emb.inv_freq`` of old exports too (Qwen3's never had it).
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from orthrus_fast.config import ModelConfig, read_config
from orthrus_fast.errors import (
    CheckpointError,
    ConfigError,
    RequestError,
    is_out_of_memory,
    list_some,
    one_line,
    shown,
)
from orthrus_fast.files import (
    INDEX,
    TEXT_FILES,
    WEIGHTS,
    check_file,
    local_directory,
    no_weights,
    other_format,
    read_json,
)
from orthrus_fast.hub import fetch_text_files, fetch_weights
from orthrus_fast.kernels.interface import Kernels
from orthrus_fast.kernels.plain import plain_kernels
from orthrus_fast.model import Transformer
from orthrus_fast.quantization import Formats, Quantizer

Progress = Callable[[int, int], None]  # bytes done, bytes in all

_LM_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_DRAFT = "_diff.weight"  # how the names of the draft view's tensors end
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # safetensors' names; no other type is read
_KINDS = {  # names of tensors -> what a checkpoint with such names is
    r".+\.(qweight|scales|weight_packed|weight_scale|weight_scale_inv|weight\.absmax)": (
        "quantized checkpoints are not supported; use the bf16 one"
    ),
    r"base_model\..+|.+\.lora_[AB]\..+": "an adapter; merge it with the model it belongs to first",
    r"embed_tokens\.weight": (
        "a Qwen3 without its output head ('model.' is missing from the names), as embedding models "
        "are; it generates no text"
    ),
    r"score\.weight": "a classifier or reranker; it generates no text",
}
_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)  # no separators: it stays in place


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been found and fit its config; no weights are in memory yet."""

    name: str  # as the user gave it
    directory: Path
    commit: str | None  # of a Hub snapshot
    config: ModelConfig
    tensor_files: Mapping[str, Path]  # tensor name -> safetensors file
    weight_bytes: int  # of all tensors, as they are stored
    draft_bytes: int  # of the draft view's among them


class _Stored(NamedTuple):
    """What a safetensors header says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def open_checkpoint(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    ignore_config_fields: Collection[str] = (),
) -> Checkpoint:
    """Find a checkpoint and check it against its config, reading headers only.

    A Path, and a string that begins with '.', '/' or '~' or exists, is a local directory and never
    reaches the Hub; any other string is a Hub repository 'org/name' at ``revision`` (a branch, tag
    or commit). ``ignore_config_fields`` are let through in config.json though nothing is known of
    them. Raises CheckpointError; RequestError for a revision of a local directory.
    """
    name = str(path_or_repo)
    local = isinstance(path_or_repo, Path) or name.startswith((".", "/", "~"))
    local = local or os.path.exists(name)
    if local and revision is not None:
        raise RequestError(f"revision {revision!r}: {name} is a local path, which has none")
    directory = local_directory(name) if local else fetch_text_files(name, revision)
    for file in (*TEXT_FILES, INDEX):  # before anything opens them: a FIFO would wait for ever
        if os.path.lexists(directory / file):
            check_file(directory, file)
    names = os.listdir(directory) if directory.exists() else []
    if "config.json" not in names and (other := other_format(name, names)):
        raise other
    config = read_config(directory, ignore_config_fields)
    weight_map = _read_index(directory)
    shards = sorted(set(weight_map.values())) if weight_map else [WEIGHTS]
    if not local:
        fetch_weights(name, directory, shards)
    stored = _read_headers(directory, shards, weight_map)
    _check_tensors(directory, config, stored)
    files = {tensor: entry.file for tensor, entry in stored.items()}
    sizes = {tensor: math.prod(t.shape) * _ITEM_BYTES[t.dtype] for tensor, t in stored.items()}
    n_draft = sum(size for tensor, size in sizes.items() if tensor.endswith(_DRAFT))
    commit = None if local else directory.name
    return Checkpoint(name, directory, commit, config, files, sum(sizes.values()), n_draft)


def load_model(
    checkpoint: Checkpoint,
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    quantizer: Quantizer | None = None,
    *,
    draft_view: bool = True,
    progress: Progress | None = None,
) -> Transformer:
    """The model in memory, ready for inference: no gradients, every weight cast to ``dtype``.

    Of a model that ranks share, only this rank's slices are read (``config.share``).
    Tensors go to the device one at a time, a part of a layer after the other; the ``quantizer``
    gets each part as soon as it has come. So the device needs room for one such part more than
    the model has, the host for a tensor. ``draft_view`` False leaves that view's tensors unread.
    ``progress`` is called after each tensor, with bytes as stored. torch's default dtype, flags and
    random state stay as they are. Raises CheckpointError: a file that changed since it was opened,
    a value that is not finite in ``dtype``, an ``lm_head`` that differs from the embedding it is
    tied to. Where the device has no room, torch's error stays as it is.
    """
    done, config, files = 0, checkpoint.config, checkpoint.tensor_files
    total = checkpoint.weight_bytes - (0 if draft_view else checkpoint.draft_bytes)
    shapes = {n: tuple(t.shape) for n, t in build_on_meta(config, draft_view).tensors().items()}
    copies = {_LM_HEAD: shapes[_EMBEDDING]} if _LM_HEAD in files and _LM_HEAD not in shapes else {}
    tensors = _read_tensors(checkpoint, device, shapes | copies)

    def read() -> Tensor:
        nonlocal done
        tensor, n_bytes = next(tensors)
        done += n_bytes
        if progress is not None:
            progress(done, total)
        return tensor

    def fill(name: str, view: Tensor) -> None:
        _fill(view, read(), name, files[name])

    quantizer = quantizer or Quantizer()
    model = make_model(config, kernels, device, dtype, fill, quantizer, draft_view)
    if copies and not torch.equal(read().to(dtype), model.embed_tokens.weight):
        raise CheckpointError(
            f"{files[_LM_HEAD]}: {_LM_HEAD} differs from {_EMBEDDING}, but config.json ties the "
            "two; set tie_word_embeddings to false, or remove the tensor"
        )
    return model


def build_on_meta(config: ModelConfig, draft_view: bool = True) -> Transformer:
    """The model with shapes and no memory; the limits in config.py bound the time to 2 s or so."""

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("a model on the meta device has only shapes")

    return _build(config, plain_kernels(refuse), draft_view)


def count_weights(config: ModelConfig, draft_view: bool = True) -> int:
    """Weights in elements, of both views or one; a tied output head counts once."""
    return sum(tensor.numel() for tensor in build_on_meta(config, draft_view).tensors().values())


class WeightBytes(NamedTuple):
    """Bytes of weights and their scales."""

    verifier: int  # the embedding, too
    drafter: int  # of what it does not share


def weight_bytes(model: Transformer) -> WeightBytes:
    """The bytes that a model holds."""
    shared = {*model.verifier.parameters(), *model.embed_tokens.parameters()}
    own = set(model.parameters()) - shared
    head, config = model.verifier.lm_head, model.config
    if config.n_ranks > 1 and config.tie_word_embeddings and not head.format:
        shared.discard(head.weight)  # some of the embedding's rows
    return WeightBytes(*(sum(weight.nbytes for weight in of) for of in (shared, own)))


def count_bytes(
    config: ModelConfig, dtype: torch.dtype, formats: Formats, draft_view: bool = True
) -> WeightBytes:
    """The same of a model whose weights are as ``formats`` have them."""
    model = build_on_meta(config, draft_view).to(dtype)
    for part, _ in list(model.parts()):
        formats.swap(model, part)
    return weight_bytes(model)


def _build(config: ModelConfig, kernels: Kernels, draft_view: bool) -> Transformer:
    with torch.device("meta"):
        return Transformer(config, kernels, draft_view).requires_grad_(False).eval()


def make_model(
    config: ModelConfig,
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    fill: Callable[[str, Tensor], object],
    quantizer: Quantizer,
    draft_view: bool = True,
) -> Transformer:
    """A model on the device, whose tensors ``fill`` is given to fill, each by its name, in place.

    They are those of ``Transformer.tensors``, a part of a layer after the other, of which none is
    kept once the ``quantizer`` has put another in its place.
    """
    model = _build(config, kernels, draft_view)
    for part, named in model.parts():
        _materialize(model, part, device, dtype)
        for name, tensor in named().items():
            fill(name, tensor)
        quantizer.swap(model, part)
    return model


def _materialize(
    model: Transformer, part: nn.Module, device: torch.device, dtype: torch.dtype
) -> None:
    """Give a part memory, uninitialised, where it has none yet; a tied output head its embedding's.

    ``to_empty`` would do, but from the meta device it imports a part of the compiler.
    """
    for module in part.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.is_meta:
                empty = torch.empty(weight.shape, dtype=dtype, device=device)
                module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    if part is model.embed_tokens and model.config.tie_word_embeddings:
        model.tie_head()


def _fill(view: Tensor, tensor: Tensor, name: str, file: Path) -> None:
    if tensor.shape != view.shape:  # copy_ would broadcast
        raise CheckpointError(f"{file}: {name} changed its shape since the file was checked")
    view.copy_(tensor)
    if not bool(view.isfinite().all()):
        raise CheckpointError(f"{file}: {name} has values that are not finite in {view.dtype}")


def _read_index(directory: Path) -> dict[str, str] | None:
    """Tensor name -> shard of a sharded checkpoint; None where there is no index."""
    path = directory / INDEX
    if not os.path.lexists(path):
        return None
    if os.path.lexists(directory / WEIGHTS):
        raise CheckpointError(f"{directory}: has both {WEIGHTS} and {INDEX}; remove one of them")
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map: not an object of tensor names and file names")
    for name in weight_map.values():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise CheckpointError(
                f"{path}: weight_map: {shown(name)} is not a .safetensors file beside it"
            )
    return weight_map


def _read_headers(
    directory: Path, shards: list[str], weight_map: dict[str, str] | None
) -> dict[str, _Stored]:
    """Every tensor of the shards by name; none twice, and each where the index says."""
    if weight_map is None and not os.path.lexists(directory / WEIGHTS):
        raise no_weights(directory, (file.name for file in directory.iterdir()))
    stored: dict[str, _Stored] = {}
    for shard in shards:
        path = check_file(directory, shard)
        for name, entry in _read_header(path).items():
            if name in stored:
                raise CheckpointError(f"{path}: {shown(name)} is also in {stored[name].file.name}")
            stored[name] = entry
    if weight_map is not None:
        found = {name: entry.file.name for name, entry in stored.items()}
        wrong = [
            f"{shown(name)} ({weight_map.get(name, 'nowhere')}, but in {found.get(name, 'none')})"
            for name in sorted(weight_map.keys() | found.keys())
            if weight_map.get(name) != found.get(name)
        ]
        if wrong:
            raise CheckpointError(
                f"{directory / INDEX}: disagrees with the files: {list_some(wrong)}"
            )
    return stored


def _read_header(path: Path) -> dict[str, _Stored]:
    with _safetensors(path, "cpu") as file:  # checks the header's length, offsets and sizes
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: _Stored(path, tuple(part.get_shape()), str(part.get_dtype()))
            for name, part in slices.items()
        }


@contextmanager
def _safetensors(path: Path, device: str) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except (SafetensorError, OSError) as error:
        if is_out_of_memory(error):
            raise CheckpointError(f"{path}: there is no memory left to open it") from None
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({shown(one_line(str(error)))}); "
            "fetch or export it again"
        ) from None


def _read_tensors(
    checkpoint: Checkpoint, device: torch.device, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[Tensor, int]]:
    """The tensors on the device, in this order, each with the bytes of the whole in its file.

    Of one that is larger than its shape here the slice of the config's rank is read. A file is open
    while tensors come from it.
    """
    rank = checkpoint.config.rank
    for path, group in itertools.groupby(shapes, key=checkpoint.tensor_files.__getitem__):
        with _safetensors(path, str(device)) as file:
            for name in group:
                part = file.get_slice(name)
                whole = tuple(part.get_shape())
                n_bytes = math.prod(whole) * _ITEM_BYTES[part.get_dtype()]
                if checkpoint.config.n_ranks > 1 and whole != shapes[name]:
                    yield part[own_slices(shapes[name], whole, rank)], n_bytes
                else:
                    yield file.get_tensor(name), n_bytes


def own_slices(shape: tuple[int, ...], whole: tuple[int, ...], rank: int) -> tuple[slice, ...]:
    """Where a rank's share, of ``shape``, lies in the ``whole`` that ranks divide in order."""
    pairs = zip(shape, whole, strict=True)
    return tuple(slice(0, n) if n == of else slice(rank * n, (rank + 1) * n) for n, of in pairs)


def _check_tensors(directory: Path, config: ModelConfig, stored: dict[str, _Stored]) -> None:
    """Names, shapes and types against the config. Raises CheckpointError, listing what is wrong."""
    for pattern, kind in _KINDS.items():
        if of_kind := next(filter(re.compile(pattern).fullmatch, stored), None):
            raise CheckpointError(f"{directory}: {kind} (tensor {shown(of_kind)})")
    norm = stored.get("model.layers.0.self_attn.q_norm.weight")
    if norm is not None and len(norm.shape) == 1 and norm.shape != (config.head_dim,):
        raise ConfigError(
            f"{directory / 'config.json'}: head_dim: {config.head_dim} (where absent, hidden_size "
            f"/ num_attention_heads), but the weights say {norm.shape[0]}; set it to that"
        )
    has_draft_view = any(name.endswith(_DRAFT) for name in stored)
    if has_draft_view and not config.has_draft_view:
        raise ConfigError(
            f"{directory / 'config.json'}: block_size and mask_token_id: absent, but the weights "
            "have a draft view (*_diff tensors); add both fields"
        )
    if config.has_draft_view and not has_draft_view:
        raise CheckpointError(
            f"{directory}: config.json is an Orthrus's, but there are no *_diff tensors; to run it "
            "as a plain Qwen3, remove block_size and mask_token_id and name Qwen3ForCausalLM"
        )
    tensors = build_on_meta(config).tensors()
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [f"{name} is missing" for name in expected if name not in stored]
    if config.tie_word_embeddings and _LM_HEAD in stored:
        expected[_LM_HEAD] = expected[_EMBEDDING]  # load_model accepts a copy of the embedding
    for name, entry in sorted(stored.items()):
        where = f"{shown(name)} in {entry.file.name}"
        if name not in expected:
            wrong.append(f"{where} is not part of the model")
        elif entry.shape != expected[name]:
            wrong.append(f"{where} is {list(entry.shape)} instead of {list(expected[name])}")
        elif entry.dtype not in _ITEM_BYTES:
            wrong.append(f"{where} is {entry.dtype}; only {', '.join(_ITEM_BYTES)} are implemented")
    if wrong:
        raise CheckpointError(f"{directory}: tensors do not fit config.json: {list_some(wrong)}")
