"""Where a model is: a folder, the playground, a URI or the Hugging Face Hub, resolved to one local folder per node.

Weights reach a node once: downloads run under a lock file per model, and finished copies are found again. Nothing here
waits for a network that is not there: the Hub is asked once with a short deadline, then the local cache decides.
"""

import hashlib
import importlib.resources
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.fs as pafs
from filelock import FileLock

from itune_ray.config.base import digest
from itune_ray.config.shared import ModelRef
from itune_ray.data.storage import Folder
from itune_ray.errors import ModelError, did_you_mean

Kind = Literal["model", "tokenizer", "adapter"]
HUB_TIMEOUT_S = 10.0
WHOLE_FILE_BYTES = 64 * 2**20
"""Weight files up to this size are fingerprinted whole; of larger ones the header, the size and samples."""
_MARKER_FILES: dict[Kind, tuple[str, ...]] = {
    "model": ("config.json",),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"),
    "adapter": ("adapter_config.json",),
}
_WANTED_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja", ".tiktoken", ".py")
_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


@dataclass(frozen=True)
class ResolvedModel:
    """A model's local folder, the commit or listing it came from, and a hash of its content."""

    path: str
    revision: str | None
    """Hub commit; None for folders."""
    fingerprint: str
    """16 hex over names and contents of the files that decide what the model computes."""


def local_model_folder(ref: ModelRef) -> ResolvedModel:
    """Resolve a model reference on this node; raises `ModelError` with one clear line when it cannot be had."""
    return resolve(ref.path, revision=ref.revision, kind="model")


def resolve(path: str, *, revision: str | None = None, kind: Kind = "model") -> ResolvedModel:
    """Resolve the folder of a model, a tokenizer or an adapter.

    Args:
        path: A folder, `playground://NAME`, a URI (s3://, gs://) or a Hub id.
        revision: Hub branch, tag or commit.
        kind: Which files the folder must hold.
    """
    scheme, separator, rest = path.partition("://")
    if separator and scheme == "playground":
        folder, commit = _playground_folder(rest), None
    elif separator and scheme != "file":
        folder, commit = _copy_of_uri(path), None
    elif (local := Path(rest if separator else path).expanduser()).exists():
        folder, commit = local, None
    elif not separator and _HUB_ID.match(path):
        folder, commit = _hub_snapshot(path, revision)
    else:
        raise _not_found(path)
    _check_kind(folder, path, kind)
    return ResolvedModel(str(folder), commit, fingerprint(folder))


def fingerprint(folder: Path) -> str:
    """16 hex of SHA-256 over the names and contents of a model folder's files."""
    overall = hashlib.sha256()
    for file in sorted(f for f in folder.iterdir() if f.is_file() and f.suffix in (*_WANTED_SUFFIXES, ".bin")):
        overall.update(f"{file.name}\0{_file_hash(file)}\0".encode())
    return overall.hexdigest()[:16]


def _file_hash(file: Path) -> str:
    size = file.stat().st_size
    if size <= WHOLE_FILE_BYTES:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    content = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for offset in range(0, size, max(1, size // 64)):  # 64 samples; the first holds the safetensors header
            stream.seek(offset)
            content.update(stream.read(2**20 if offset == 0 else 2**14))
    return content.hexdigest()


def _check_kind(folder: Path, path: str, kind: Kind) -> None:
    markers = _MARKER_FILES[kind]
    if not folder.is_dir():
        raise ModelError(f"the {kind} path is a file, not a folder", got=path, knob="model.path")
    if not any((folder / marker).is_file() for marker in markers):
        present = ", ".join(sorted(f.name for f in folder.iterdir())[:6]) or "nothing"
        raise ModelError(
            f"the folder is no {kind}: it holds no {' or '.join(markers)} (it holds {present})",
            got=path,
            allowed=f"a Hugging Face {kind} folder",
            knob="model.path",
        )
    if kind != "tokenizer":
        _check_weights(folder, path)


def _check_weights(folder: Path, path: str) -> None:
    """Pickled weights run code when they are opened: only safetensors are read, by whatever stage."""
    names = [file.name for file in folder.iterdir() if file.is_file()]
    pickled = sorted(name for name in names if name.endswith(_PICKLED))
    if pickled and not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"the weights are pickled ({pickled[0]}), and opening them would run whatever code they hold",
            got=path,
            allowed="weights in .safetensors; convert them where you trust them",
            knob="model.path",
        )


def _not_found(path: str) -> ModelError:
    parent = Path(path).expanduser().parent
    near = [f.name for f in parent.iterdir() if f.is_dir()] if parent.is_dir() else []
    hint = did_you_mean(Path(path).name, near)
    return ModelError(
        f"the model is neither a folder nor reachable on the Hub{hint}",
        got=path,
        allowed="a folder, a Hub id (network or cache needed), s3://, gs:// or playground://NAME",
        knob="model.path",
    )


# --- playground ----------------------------------------------------------------------------------------------------


def _playground_folder(name: str) -> Path:
    """By path, not by import: the playground package knows nothing of who reads its files."""
    models = Path(str(importlib.resources.files("itune_ray"))) / "playground" / "models"
    folder = models / name
    if not name or not folder.is_dir():
        shipped = sorted(f.name for f in models.iterdir() if f.is_dir()) if models.is_dir() else []
        raise ModelError(
            f"the playground ships no such model{did_you_mean(name, shipped)}",
            got=f"playground://{name}",
            allowed=", ".join(shipped) or "none is built yet",
            knob="model.path",
        )
    return folder


# --- Hub -----------------------------------------------------------------------------------------------------------


def _hub_snapshot(repo: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    commit = _hub_commit(repo, revision)
    try:
        with _node_lock(f"hub-{repo}"):
            folder = Path(
                snapshot_download(
                    repo,
                    revision=commit or revision,
                    allow_patterns=[f"*{s}" for s in _WANTED_SUFFIXES],
                    ignore_patterns=["original/*", "onnx/*"],
                    local_files_only=commit is None,
                )
            )
            if commit is not None and not _has_weights(folder):
                snapshot_download(repo, revision=commit, allow_patterns=["*.bin"])
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        raise _not_found(repo) from None
    return folder, folder.name


def _hub_commit(repo: str, revision: str | None) -> str | None:
    """The commit a revision means now, or None when the Hub cannot be asked (offline mode, no network)."""
    import httpx2
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return HfApi().model_info(repo, revision=revision, timeout=HUB_TIMEOUT_S).sha
    except GatedRepoError:
        raise ModelError(
            "the model is gated: accept its licence on the Hub and give your token", got=repo, knob="HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ModelError("the Hub model has no such revision", got=revision, knob="model.revision") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise _not_found(repo) from None
    except (OfflineModeIsEnabled, HfHubHTTPError, httpx2.HTTPError, OSError):
        return None


def _has_weights(folder: Path) -> bool:
    return any(file.suffix in _WEIGHT_SUFFIXES for file in folder.iterdir())


# --- URIs ----------------------------------------------------------------------------------------------------------


def _copy_of_uri(uri: str) -> Path:
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
            partial = target.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            pafs.copy_files(source.path, str(partial), source_filesystem=source.fs)
            partial.rename(target)
    return target


def _node_lock(name: str) -> FileLock:
    folder = _cache_root() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{re.sub(r'[^A-Za-z0-9.-]', '_', name)}.lock")


def _cache_root() -> Path:
    """Node-local: $XDG_CACHE_HOME/itune-ray, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "itune-ray"


def read_config(folder: str | Path) -> dict[str, Any]:
    """The parsed `config.json` of a model folder."""
    return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))


def weight_files(folder: str | Path) -> Iterator[Path]:
    """The safetensors files of a model folder, in name order."""
    yield from sorted(Path(folder).glob("*.safetensors"))
