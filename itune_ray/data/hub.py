"""Where a model is: a folder, the playground, a URI or the Hugging Face Hub, resolved to one local folder per node."""

import hashlib
import importlib.resources
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from itune_ray.config.shared import ModelRef
from itune_ray.data.download import WANTED_SUFFIXES, AbsentError, from_hub, from_mirror, from_uri
from itune_ray.errors import ModelError, did_you_mean

Kind = Literal["model", "tokenizer", "adapter"]
WHOLE_FILE_BYTES = 64 * 2**20
"""Weight files up to this size are fingerprinted whole; of larger ones the header, the size and samples."""
_MARKER_FILES: dict[Kind, tuple[str, ...]] = {
    "model": ("config.json",),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"),
    "adapter": ("adapter_config.json",),
}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


@dataclass(frozen=True)
class ResolvedModel:
    """A model's local folder, the commit or listing it came from, and a hash of its content."""

    path: str
    revision: str | None
    """Hub commit, or `mirror-` and the fingerprint; None for folders."""
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
        folder, commit = from_uri(path), None
    elif (local := Path(rest if separator else path).expanduser()).exists():
        folder, commit = local, None
    elif not separator and _HUB_ID.match(path):
        folder, commit = _of_the_hub(path, revision)
    else:
        raise _not_found(path)
    _check_kind(folder, path, kind)
    return ResolvedModel(str(folder), commit, fingerprint(folder))


def _of_the_hub(repo: str, revision: str | None) -> tuple[Path, str]:
    """A Hub id's folder, and its commit or, where the mirror has it, the content that stands for one."""
    if (mirrored := from_mirror(repo, revision)) is not None:
        return mirrored, f"mirror-{fingerprint(mirrored)}"
    try:
        return from_hub(repo, revision)
    except AbsentError:
        raise _not_found(repo) from None


def fingerprint(folder: Path) -> str:
    """16 hex of SHA-256 over the names and contents of a model folder's files."""
    return _hash(f for f in folder.iterdir() if f.is_file() and f.suffix in (*WANTED_SUFFIXES, ".bin"))


def weights_fingerprint(folder: Path) -> str:
    """The same of what a model computes with alone: its config and its weights, or those of an adapter. A card, a
    license or a second copy of the weights beside them changes nothing."""
    return _hash([*folder.glob("*.safetensors"), *folder.glob("config.json"), *folder.glob("adapter_config.json")])


def _hash(files: Iterable[Path]) -> str:
    overall = hashlib.sha256()
    for file in sorted(files):
        overall.update(f"{file.name}\0{_file_hash(file)}\0".encode())
    return overall.hexdigest()[:16]


def _file_hash(file: Path) -> str:
    size = file.stat().st_size
    if size <= WHOLE_FILE_BYTES:
        with file.open("rb") as stream:  # not read into memory at once: ranks do it beside their weights
            return hashlib.file_digest(stream, "sha256").hexdigest()
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


def read_config(folder: str | Path) -> dict[str, Any]:
    """The parsed `config.json` of a model folder."""
    return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))


def weight_files(folder: str | Path) -> Iterator[Path]:
    """The safetensors files of a model folder, in name order."""
    yield from sorted(Path(folder).glob("*.safetensors"))
