"""Checkpoints: found on disk or on the Hub, held against their config, then loaded.

Nobody vouches for a checkpoint. Only safetensors files are read, never a pickle; every file must be
a regular file within the checkpoint's own directory; and every tensor's name, shape and type must
be what config.json asks for before any memory is taken. Nothing is skipped: a tensor that the model
has no place for is refused, the ``rotary_emb.inv_freq`` of old exports too (Qwen3's never had it).
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from orthrus_fast.config import ModelConfig, read_config, read_json
from orthrus_fast.errors import CheckpointError, ConfigError, RequestError, is_out_of_memory
from orthrus_fast.model import Attention, Kernels, Layer, Transformer, plain_kernels

Progress = Callable[[int, int], None]  # bytes done, bytes in all

_log = logging.getLogger("orthrus_fast")

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
TEXT_FILES = (  # all but the weights and their index
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_LM_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_DRAFT = "_diff.weight"  # how the names of the draft view's tensors end
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # safetensors' names; no other type is read
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)  # no separators: it stays in place
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_MAX_LISTED = 10


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


def open_checkpoint(path_or_repo: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint and check it against its config, reading headers only.

    A Path, and a string that begins with '.', '/' or '~' or exists, is a local directory and never
    reaches the Hub; any other string is a Hub repository 'org/name' at ``revision`` (a branch, tag
    or commit). Raises CheckpointError; RequestError for a revision of a local directory.
    """
    name = str(path_or_repo)
    local = isinstance(path_or_repo, Path) or name.startswith((".", "/", "~"))
    local = local or os.path.exists(name)
    if local and revision is not None:
        raise RequestError(f"revision {revision!r}: {name} is a local path, which has none")
    directory = _local_directory(name) if local else _fetch_text_files(name, revision)
    for file in (*TEXT_FILES, _INDEX):  # before anything opens them: a FIFO would wait for ever
        if os.path.lexists(directory / file):
            _check_file(directory, file)
    config = read_config(directory)
    weight_map = _read_index(directory)
    shards = sorted(set(weight_map.values())) if weight_map else [_WEIGHTS]
    if not local:
        _fetch_weights(name, directory, shards)
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
    *,
    device: torch.device,
    dtype: torch.dtype,
    draft_view: bool = True,
    progress: Progress | None = None,
) -> Transformer:
    """The model in memory, ready for inference: no gradients, every weight cast to ``dtype``.

    Tensors go to the device one at a time: the host needs room for one more than the model has.
    ``draft_view`` False leaves that view's tensors unread. ``progress`` is called after each
    tensor, with bytes as stored. torch's default dtype, flags and random state stay as they are.
    Raises CheckpointError: a file that changed since it was opened, a value that is not finite in
    ``dtype``, an ``lm_head`` that differs from the embedding it is tied to, a device without room.
    """
    done = 0
    try:
        model = allocate(checkpoint.config, kernels, device, dtype, draft_view)
        views = tensor_views(model)
        total = checkpoint.weight_bytes - (0 if draft_view else checkpoint.draft_bytes)
        for name, tensor in _read_tensors(checkpoint, device, draft_view):
            if name in views:
                _fill(views[name], tensor, name, checkpoint.tensor_files[name])
            elif not torch.equal(tensor.to(dtype), views[_EMBEDDING]):
                file = checkpoint.tensor_files[name]
                raise CheckpointError(
                    f"{file}: {name} differs from {_EMBEDDING}, but config.json ties the two; "
                    "set tie_word_embeddings to false, or remove the tensor"
                )
            done += tensor.nbytes
            if progress is not None:
                progress(done, total)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise  # a fault of ours
        size = f"{checkpoint.config.n_weights * dtype.itemsize / 1e9:.2f} GB"
        raise CheckpointError(
            f"{checkpoint.name}: {size} of weights do not fit into the memory of {device}; "
            "use a smaller dtype, a smaller checkpoint, or another device"
        ) from None
    return model


def tensor_views(model: Transformer) -> dict[str, Tensor]:
    """Checkpoint name -> the slice of the model's fused parameters that the tensor fills.

    Slices along the first dimension are views, so copying into one fills the parameter. A tied
    ``lm_head.weight`` is not among them.
    """
    views: dict[str, Tensor] = {
        _EMBEDDING: model.embed_tokens.weight,
        "model.norm.weight": model.norm.weight,
    }
    if not model.config.tie_word_embeddings:
        views[_LM_HEAD] = model.lm_head.weight
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        prefix = f"model.layers.{index}."
        views[prefix + "input_layernorm.weight"] = layer.attention_norm.weight
        views[prefix + "post_attention_layernorm.weight"] = layer.mlp_norm.weight
        gate, up = layer.gate_up.weight.chunk(2)
        views[prefix + "mlp.gate_proj.weight"] = gate
        views[prefix + "mlp.up_proj.weight"] = up
        views[prefix + "mlp.down_proj.weight"] = layer.down.weight
        views |= _attention_views(layer.attention, prefix + "self_attn.", "")
        if layer.draft_attention is not None:
            views |= _attention_views(layer.draft_attention, prefix + "self_attn.", "_diff")
    return {name: view.detach() for name, view in views.items()}


def _attention_views(attention: Attention, prefix: str, suffix: str) -> dict[str, Tensor]:
    n_query = attention.n_heads * attention.head_dim
    n_key = attention.n_kv_heads * attention.head_dim
    q, k, v = torch.split(attention.qkv.weight, [n_query, n_key, n_key])
    parts = {
        "q_proj": q,
        "k_proj": k,
        "v_proj": v,
        "o_proj": attention.o.weight,
        "q_norm": attention.q_norm.weight,
        "k_norm": attention.k_norm.weight,
    }
    return {f"{prefix}{name}{suffix}.weight": part for name, part in parts.items()}


def _build_on_meta(config: ModelConfig, kernels: Kernels, draft_view: bool) -> Transformer:
    """The model with shapes and no memory; the limits in config.py bound the time, 2 s or so."""
    with torch.device("meta"):  # initialising there draws no random numbers either
        return Transformer(config, kernels, draft_view).requires_grad_(False).eval()


def allocate(
    config: ModelConfig,
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    draft_view: bool,
) -> Transformer:
    """A model on the device, its weights uninitialised, the output head tied where it is to be."""
    model = _build_on_meta(config, kernels, draft_view)
    if config.tie_word_embeddings:
        model.lm_head.register_parameter("weight", None)  # to_empty would give it its own memory
    model.to(dtype).to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def _fill(view: Tensor, tensor: Tensor, name: str, file: Path) -> None:
    if tensor.shape != view.shape:  # copy_ would broadcast
        raise CheckpointError(f"{file}: {name} changed its shape since the file was checked")
    view.copy_(tensor)
    if not bool(view.isfinite().all()):
        raise CheckpointError(f"{file}: {name} has values that are not finite in {view.dtype}")


# Reading files that nobody vouches for.


def _local_directory(name: str) -> Path:
    directory = Path(os.path.expanduser(name))
    if not os.path.lexists(directory):
        raise CheckpointError(f"{name}: no such directory")
    if not directory.is_dir():
        raise CheckpointError(f"{name}: not a directory; give the one that holds config.json")
    if not os.access(directory, os.R_OK | os.X_OK):
        raise CheckpointError(f"{name}: cannot be read (permission denied)")
    return directory


def _check_file(directory: Path, name: str) -> Path:
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


def _read_index(directory: Path) -> dict[str, str] | None:
    """Tensor name -> shard of a sharded checkpoint; None where there is no index."""
    path = directory / _INDEX
    if not os.path.lexists(path):
        return None
    if os.path.lexists(directory / _WEIGHTS):
        raise CheckpointError(f"{directory}: has both {_WEIGHTS} and {_INDEX}; remove one of them")
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map: not an object of tensor names and file names")
    for name in weight_map.values():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise CheckpointError(
                f"{path}: weight_map: {_shown(name)} is not a .safetensors file beside it"
            )
    return weight_map


def _read_headers(
    directory: Path, shards: list[str], weight_map: dict[str, str] | None
) -> dict[str, _Stored]:
    """Every tensor of the shards by name; none twice, and each where the index says."""
    if weight_map is None and not os.path.lexists(directory / _WEIGHTS):
        raise _no_weights(directory, (file.name for file in directory.iterdir()))
    stored: dict[str, _Stored] = {}
    for shard in shards:
        path = _check_file(directory, shard)
        for name, entry in _read_header(path).items():
            if name in stored:
                raise CheckpointError(f"{path}: {_shown(name)} is also in {stored[name].file.name}")
            stored[name] = entry
    if weight_map is not None:
        found = {name: entry.file.name for name, entry in stored.items()}
        wrong = [
            f"{_shown(name)} ({weight_map.get(name, 'nowhere')}, but in {found.get(name, 'none')})"
            for name in sorted(weight_map.keys() | found.keys())
            if weight_map.get(name) != found.get(name)
        ]
        if wrong:
            raise CheckpointError(f"{directory / _INDEX}: disagrees with the files: {_list(wrong)}")
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
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({_one_line(error)}); fetch or export it again"
        ) from None


def _read_tensors(
    checkpoint: Checkpoint, device: torch.device, draft_view: bool
) -> Iterator[tuple[str, Tensor]]:
    """All tensors on the device, file by file; the output head last, after what it is tied to."""
    files = checkpoint.tensor_files
    wanted = [name for name in files if draft_view or not name.endswith(_DRAFT)]
    names = sorted(wanted, key=lambda name: (name == _LM_HEAD, files[name], name))
    for path, group in itertools.groupby(names, key=files.__getitem__):
        with _safetensors(path, str(device)) as file:
            for name in group:
                yield name, file.get_tensor(name)


def _check_tensors(directory: Path, config: ModelConfig, stored: dict[str, _Stored]) -> None:
    """Names, shapes and types against the config. Raises CheckpointError, listing what is wrong."""
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
    views = tensor_views(_build_on_meta(config, plain_kernels(_never_run), draft_view=True))
    expected = {name: tuple(view.shape) for name, view in views.items()}
    wrong = [f"{name} is missing" for name in expected if name not in stored]
    if config.tie_word_embeddings and _LM_HEAD in stored:
        expected[_LM_HEAD] = expected[_EMBEDDING]  # load_model accepts a copy of the embedding
    for name, entry in sorted(stored.items()):
        where = f"{_shown(name)} in {entry.file.name}"
        if name not in expected:
            wrong.append(f"{where} is not part of the model")
        elif entry.shape != expected[name]:
            wrong.append(f"{where} is {list(entry.shape)} instead of {list(expected[name])}")
        elif entry.dtype not in _ITEM_BYTES:
            wrong.append(f"{where} is {entry.dtype}; only {', '.join(_ITEM_BYTES)} are implemented")
    if wrong:
        raise CheckpointError(f"{directory}: tensors do not fit config.json: {_list(wrong)}")


def _never_run(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("a model on the meta device has only shapes")


def _no_weights(place: Path | str, names: Iterable[str]) -> CheckpointError:
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if not pickles:
        return CheckpointError(f"{place}: has neither {_WEIGHTS} nor {_INDEX}")
    return CheckpointError(
        f"{place}: has only pickled weights ({_list(pickles)}); a pickle can run any code and is "
        "never loaded: if you trust it, convert it with transformers' "
        "from_pretrained(...).save_pretrained(...), which writes safetensors"
    )


def _list(parts: list[str]) -> str:
    rest = len(parts) - _MAX_LISTED
    return "; ".join(parts[:_MAX_LISTED]) + (f"; and {rest} more" if rest > 0 else "")


def _shown(name: object) -> str:
    """A name out of a file, safe on a terminal and of bounded length."""
    text = name if isinstance(name, str) and name.isprintable() else ascii(name)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _one_line(error: object) -> str:
    return _shown(" ".join(str(error).split()))


# The Hub. huggingface_hub is imported where it is needed: a local checkpoint never pays for it.


def _fetch_text_files(repo: str, revision: str | None) -> Path:
    """The snapshot directory, named after its commit, with everything but the weights in it."""
    if not _REPO_ID.fullmatch(repo):
        raise CheckpointError(
            f"{_shown(repo)!r} is neither a directory nor a Hub repository of the form org/name"
        )
    with _hub_errors(repo, revision):
        import huggingface_hub
        from huggingface_hub.utils.tqdm import tqdm

        class Silent(tqdm):  # no bar for a few small files, on every start
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=[*TEXT_FILES, _INDEX], tqdm_class=Silent
            )
        )


def _fetch_weights(repo: str, snapshot: Path, shards: list[str]) -> None:
    """Put what is missing of the shards into the snapshot, from the snapshot's own commit."""
    missing = [shard for shard in shards if not (snapshot / shard).exists()]
    if not missing:
        return
    commit = snapshot.name
    with _hub_errors(repo, commit):
        import huggingface_hub

        info = huggingface_hub.HfApi().model_info(repo, revision=commit, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        if shards == [_WEIGHTS] and _WEIGHTS not in sizes:
            raise _no_weights(repo, sizes)
        absent = [shard for shard in missing if shard not in sizes]
        if absent:
            raise CheckpointError(f"{repo}: {_INDEX} names files that are absent: {_list(absent)}")
        size = sum(sizes[shard] for shard in missing) / 1e6
        _log.info("downloading %s at commit %s: %.1f MB of weights", repo, commit, size)
        huggingface_hub.snapshot_download(repo, revision=commit, allow_patterns=missing)


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # the HTTP library below is an implementation detail, errors and all
        raise CheckpointError(f"{repo}: {_hub_advice(error, repo, revision)}") from None


def _hub_advice(error: Exception, repo: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return (
            f"access is restricted; accept the terms at {constants.ENDPOINT}/{repo}, then log in "
            "with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or a private one; check the name, or log in (`hf auth login`)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no revision {revision!r}; give a branch, a tag or a commit of the repository"
    if isinstance(error, errors.HFValidationError):
        return f"not a Hub repository of the form org/name ({_one_line(error)})"
    if constants.HF_HUB_OFFLINE:
        return (
            f"not (wholly) in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids a "
            "download; unset it, or give a local directory"
        )
    cause = error.__cause__ or error
    return (
        f"cannot be fetched ({type(cause).__name__}: {_one_line(cause)}) and is not (wholly) in "
        f"the cache {constants.HF_HUB_CACHE}; check the network, or give a local directory"
    )
