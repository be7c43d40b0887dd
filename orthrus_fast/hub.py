"""The Hugging Face Hub: a checkpoint's files, fetched into the Hub's own cache.

huggingface_hub is imported where it is needed: a local checkpoint never pays for it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orthrus_fast.errors import CheckpointError, list_some, one_line, shown
from orthrus_fast.files import INDEX, TEXT_FILES, WEIGHTS, no_weights, other_format

_log = logging.getLogger("orthrus_fast")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def fetch_text_files(repo: str, revision: str | None) -> Path:
    """The snapshot directory, named after its commit, with everything but the weights in it."""
    if not _REPO_ID.fullmatch(repo):
        raise CheckpointError(
            f"{shown(repo)!r} is neither a directory nor a Hub repository of the form org/name"
        )
    with _hub_errors(repo, revision):
        import huggingface_hub
        from huggingface_hub import errors
        from huggingface_hub.utils.tqdm import tqdm

        class Silent(tqdm):  # no bar for a few small files, on every start
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        try:
            snapshot = huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=[*TEXT_FILES, INDEX], tqdm_class=Silent
            )
        except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError):
            raise
        except Exception:  # huggingface_hub 2.0 asks the Hub for a commit that its cache has
            config = huggingface_hub.try_to_load_from_cache(repo, "config.json", revision=revision)
            if not isinstance(config, str):
                raise
            return Path(config).parent
        directory = Path(snapshot)
        if not (directory / "config.json").exists():
            names = huggingface_hub.HfApi().list_repo_files(repo, revision=directory.name)
            if other := other_format(repo, names):
                raise other
        return directory


def fetch_weights(repo: str, snapshot: Path, shards: list[str]) -> None:
    """Put what is missing of the shards into the snapshot, from the snapshot's own commit."""
    missing = [shard for shard in shards if not (snapshot / shard).exists()]
    if not missing:
        return
    commit = snapshot.name
    with _hub_errors(repo, commit):
        import huggingface_hub

        info = huggingface_hub.HfApi().model_info(repo, revision=commit, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        if shards == [WEIGHTS] and WEIGHTS not in sizes:
            raise no_weights(repo, sizes)
        absent = [shard for shard in missing if shard not in sizes]
        if absent:
            raise CheckpointError(
                f"{repo}: {INDEX} names files that are absent: {list_some(absent)}"
            )
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
        return f"not a Hub repository of the form org/name ({shown(one_line(str(error)))})"
    if constants.HF_HUB_OFFLINE:
        return (
            f"not (wholly) in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids a "
            "download; unset it, or give a local directory"
        )
    cause = error.__cause__ or error
    return (
        f"cannot be fetched ({type(cause).__name__}: {shown(one_line(str(cause)))}) and is not "
        f"(wholly) in the cache {constants.HF_HUB_CACHE}; check the network, or give a local "
        "directory"
    )
