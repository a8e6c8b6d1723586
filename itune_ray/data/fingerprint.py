"""What an input *is*, whatever its place: the part of an artifact's identity that a path cannot tell.

A path inside an artifact stands for that artifact's id; any other file or folder for the hash of its bytes; a
`module:function` for the hash of its source; a playground split for the hash of the world's source. Names that are
none of these (Hub ids) stand for themselves, with their revision beside them.
"""

import functools
import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from itune_ray.data.storage import Folder
from itune_ray.errors import ConfigError

PATH_KEYS = frozenset(
    {"path", "adapter", "tokenizer", "chat_template", "template", "principles", "import_path", "inputs"}
)
"""Config keys whose values name an input."""

WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
SAMPLED_ABOVE = 64 * 2**20
"""Bytes of a weight file above which it is sampled."""

PLAYGROUND = Path(__file__).parents[1] / "playground"


def content_identity(tree: Any, key: str = "") -> Any:
    """The identity tree of a config with every input path replaced by what it holds."""
    if isinstance(tree, Mapping):
        replaced = {name: content_identity(value, name) for name, value in tree.items()}
        if tree.get("type") == "playground":
            replaced["world"] = _files_digest(str(PLAYGROUND), "*.py")
        return replaced
    if isinstance(tree, list):
        return [content_identity(item, key) for item in tree]
    if key not in PATH_KEYS or not isinstance(tree, str):
        return tree
    return source_identity(tree) if key == "import_path" else fingerprint(tree)


def fingerprint(path: str) -> str:
    """What a path or a name stands for; see the module docstring. An inline template is itself."""
    if "{" in path or "\n" in path:
        return path
    if path.startswith("playground://"):
        return "sha256:" + _files_digest(str(PLAYGROUND / "models" / path.removeprefix("playground://")), "*")
    folder = Folder.at(path)
    if "://" not in path and not folder.exists():
        return path
    inside = artifact_of(folder)
    if inside is not None:
        return f"artifact:{inside}"
    return "sha256:" + (_files_digest(folder.path, "*") if folder.is_local else _remote_digest(folder))


def named(path: str) -> str:
    """How rows name a model or an adapter: by artifact id and payload where it lies in an artifact, so that equal runs
    in two places make equal tables; else as it was given."""
    if path.startswith("playground://"):
        return path
    folder = Folder.at(path)
    inside = artifact_of(folder) if "://" in path or folder.exists() else None
    return path if inside is None else f"artifact:{inside}"


def source_identity(import_path: str) -> str:
    """What `module:name` stands for: the source of its module."""
    return "source:" + _source_digest(import_path)


def artifact_of(folder: Folder) -> str | None:
    """`<id>/<payload>` when the path lies in an artifact, else None."""
    parts = folder.path.split("/")
    for depth in range(len(parts), 0, -1):
        parent = Folder(folder.fs, "/".join(parts[:depth]), "")
        if "-" in parts[depth - 1] and parent.exists("manifest.json"):
            manifest = parent.read_json("manifest.json")
            if isinstance(manifest, dict) and {"id", "stage", "status"} <= manifest.keys():
                return "/".join([manifest["id"], *parts[depth:]])
    return None


def _files_digest(path: str, pattern: str) -> str:
    """Hash of the names and bytes of a file, or of all matching files below a folder."""
    root = Path(path)
    files = [root] if root.is_file() else sorted(p for p in root.rglob(pattern) if p.is_file())
    total = hashlib.sha256()
    for file in files:
        if "__pycache__" in file.parts:
            continue
        state = file.stat()
        total.update(str(file.relative_to(root)).encode())
        total.update(_file_digest(file, state.st_size, state.st_mtime_ns, state.st_ino))
    return total.hexdigest()[:16]


@functools.lru_cache(maxsize=4096)
def _file_digest(file: Path, size: int, mtime_ns: int, inode: int) -> bytes:
    """Hash of a file's bytes. The arguments after the first make a changed file another entry of the cache.

    Of large weight files the size and samples stand for the whole, as in `data.hub`: reading 140 GB to name a model
    would take minutes. Rows are always read whole.
    """
    if file.suffix in WEIGHTS and size > SAMPLED_ABOVE:
        return _sampled_digest(file, size)
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _sampled_digest(file: Path, size: int) -> bytes:
    content = hashlib.sha256(str(size).encode())
    with open(file, "rb") as stream:
        for offset in range(0, size, size // 64):  # the first sample holds a safetensors header
            stream.seek(offset)
            content.update(stream.read(2**20 if offset == 0 else 2**14))
    return content.digest()


def _remote_digest(folder: Folder) -> str:
    """Hash of names, sizes and modification times: reading a bucket whole to name it would cost too much."""
    info = folder.fs.get_file_info(folder.path)
    selector = pafs.FileSelector(folder.path, recursive=True, allow_not_found=True)
    found = [info] if info.type == pafs.FileType.File else folder.fs.get_file_info(selector)
    listing = sorted(f"{i.path} {i.size} {i.mtime_ns}" for i in found if i.type == pafs.FileType.File)
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()[:16]


def _source_digest(import_path: str) -> str:
    module, _, attribute = import_path.partition(":")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not attribute:
        raise ConfigError(
            "no such module", got=import_path, allowed="package.module:name, importable from here", knob="import_path"
        )
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:16] + ":" + attribute
