"""Models brought to this node: from the Hugging Face Hub, a bucket that mirrors it, or any URI, once per node.

Downloads run under a lock file per model, finished copies are found again, and what the disk cannot hold is refused
before the first byte. Nothing here waits for a network that is not there: the Hub is asked once with a short deadline,
then the local cache decides.
"""

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow.fs as pafs
from filelock import FileLock

from itune_ray.config.base import digest
from itune_ray.data.storage import Folder
from itune_ray.errors import DataError, ITuneError, ModelError

HUB_TIMEOUT_S = 10.0
MIRROR = "ITUNE_MODEL_MIRROR"
"""Variable with a URI below which models of the Hub are looked for first, as `<URI>/<org>/<name>[@<revision>]`."""
WANTED_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja", ".tiktoken", ".py")
WEIGHT_SUFFIXES = (".safetensors", ".bin")
IGNORED = ("original/*", "onnx/*")
SPARE = 1.05
"""Of what a download takes, this much must be free."""
RepoKind = Literal["model", "dataset"]
ERRORS: Mapping[RepoKind, type[ITuneError]] = {"model": ModelError, "dataset": DataError}
REVISIONS: Mapping[RepoKind, str] = {"model": "model.revision", "dataset": "revision"}
"""The knob that names a revision."""
PAGES: Mapping[RepoKind, str] = {"model": "", "dataset": "datasets/"}
"""What the Hub puts before a name in the address of its page."""


class AbsentError(Exception):
    """Neither the Hub nor the cache of this node has it."""


def from_hub(repo: str, revision: str | None) -> tuple[Path, str]:
    """The folder of a Hub model on this node and its commit.

    Raises:
        AbsentError: No such model, or no network and nothing in the cache.
        ModelError: It is gated, the token is refused, there is no such revision, or the disk is too small.
    """
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    info = hub_info("model", repo, revision)
    try:
        with _node_lock(f"hub-{repo}"):
            if info is not None:
                _check_space(repo, _missing(repo, info))
            wanted = {"allow_patterns": [f"*{s}" for s in WANTED_SUFFIXES], "ignore_patterns": list(IGNORED)}
            # By the branch's name and not its commit: the cache then knows the branch when there is no network.
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=info is None, **wanted))
            if info is not None and not any(file.suffix in WEIGHT_SUFFIXES for file in folder.iterdir()):
                snapshot_download(repo, revision=folder.name, allow_patterns=["*.bin"])
    except HfHubHTTPError as error:
        raise _refused("model", repo, error) or AbsentError(repo) from None
    except (LocalEntryNotFoundError, httpx2.HTTPError, OSError, ValueError):
        raise AbsentError(repo) from None
    return folder, folder.name


def hub_info(kind: RepoKind, repo: str, revision: str | None) -> Any:
    """What the Hub says of a model or dataset, or None when it cannot be asked (offline mode, no network).

    Raises:
        AbsentError: There is none of this name.
        ModelError, DataError: It is gated, the token is refused, or there is no such revision.
    """
    import httpx2
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return HfApi().repo_info(
            repo, revision=revision, repo_type=kind, timeout=HUB_TIMEOUT_S, files_metadata=kind == "model"
        )
    except RevisionNotFoundError:
        raise ERRORS[kind](f"the Hub {kind} has no such revision", got=revision, knob=REVISIONS[kind]) from None
    except HfHubHTTPError as error:
        if (refused := _refused(kind, repo, error)) is not None:
            raise refused from None
        if isinstance(error, RepositoryNotFoundError):
            raise AbsentError(repo) from None
        return None
    except HFValidationError:
        raise AbsentError(repo) from None
    except (OfflineModeIsEnabled, httpx2.HTTPError, OSError):
        return None


def _refused(kind: RepoKind, repo: str, error: Any) -> ITuneError | None:
    """What the user must do, where the Hub knows a repository and does not give it: of a `HfHubHTTPError`."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError

    status, url = error.response.status_code, f"{constants.ENDPOINT}/{PAGES[kind]}{repo}"
    if isinstance(error, GatedRepoError) and get_token():
        reason = f"it is gated: its licence must be accepted at {url} with the account of the token"
    elif isinstance(error, GatedRepoError):
        reason = f"it is gated: accept its licence at {url} and give your token"
    elif status == 401 and get_token():
        reason = f"the Hub refuses the token, or does not show {url} to its account"
    elif status == 403:
        reason = f"the token may not read {url}"
    else:
        return None
    return ERRORS[kind](f"the {kind} cannot be had: {reason}", got=repo, knob="HF_TOKEN")


def _missing(repo: str, info: Any) -> int:
    """Bytes that are not in the cache yet."""
    from huggingface_hub import try_to_load_from_cache

    siblings = [file for file in info.siblings or [] if file.rfilename.count("/") == 0]
    names = [file for file in siblings if file.rfilename.endswith(WANTED_SUFFIXES)]
    if not any(file.rfilename.endswith(".safetensors") for file in names):
        names += [file for file in siblings if file.rfilename.endswith(".bin")]
    absent = (f for f in names if not isinstance(try_to_load_from_cache(repo, f.rfilename, revision=info.sha), str))
    return sum(file.size or 0 for file in absent)


def _check_space(model: str, needed: int, folder: str | None = None, knob: str = "HF_HOME") -> None:
    if folder is None:
        from huggingface_hub import constants

        folder = constants.HF_HUB_CACHE
    existing = Path(folder)
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed * SPARE > free:
        has = f"the disk of {folder} has {free / 1e9:.2f} GB"
        raise ModelError(
            f"the model needs {needed / 1e9:.2f} GB more on this node, and {has}",
            got=model,
            knob=knob,
        )


# --- URIs ----------------------------------------------------------------------------------------------------------


def from_mirror(repo: str, revision: str | None, environment: Mapping[str, str] = os.environ) -> Path | None:
    """A Hub model's folder out of the bucket that mirrors the Hub; None where there is no mirror, or not this model."""
    prefix = environment.get(MIRROR)
    if not prefix:
        return None
    uri = f"{prefix.rstrip('/')}/{repo}" + (f"@{revision}" if revision else "")
    source = Folder.at(uri)
    return from_uri(uri) if any(name.endswith(".json") for name in source.names()) else None


def from_uri(uri: str) -> Path:
    """A local copy keyed by the URI and its listing, so that a changed model is copied anew."""
    source = Folder.at(uri)
    try:
        listing = source.fs.get_file_info(pafs.FileSelector(source.path, recursive=True))
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"the model's URI cannot be read: {reason}", got=uri, knob="model.path") from None
    files = sorted((info for info in listing if info.is_file), key=lambda info: info.path)
    state = [[info.path, info.size, info.mtime_ns] for info in files]
    target = _cache_root() / "models" / digest([uri, state], length=16)
    with _node_lock(target.name):
        if not target.is_dir():
            _check_space(uri, _sizes(files), str(target.parent), "XDG_CACHE_HOME")
            partial = target.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            pafs.copy_files(source.path, str(partial), source_filesystem=source.fs)
            partial.rename(target)
    return target


def _sizes(files: Iterable[Any]) -> int:
    return sum(info.size or 0 for info in files)


def _node_lock(name: str) -> FileLock:
    folder = _cache_root() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{re.sub(r'[^A-Za-z0-9.-]', '_', name)}.lock")


def _cache_root() -> Path:
    """Node-local: $XDG_CACHE_HOME/itune-ray, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "itune-ray"
