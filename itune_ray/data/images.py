"""Images of a row: `meta.images`, a list of {path} or {bytes} (base64), shown before the first user turn's words."""

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from itune_ray.data.storage import Folder
from itune_ray.errors import DataError, ITuneError

IMAGES = "images"
"""The entry of `meta`."""


class BadImageError(DataError):
    """An image that cannot be had; rows are quarantined under `bad_image`."""


def plain(value: object) -> Any:
    """A cell that JSON lacks, as JSON: bytes in base64, all else as text. Parquet files hold images as bytes, as
    {bytes, path} (the Hub's `Image` feature), or as paths."""
    return {"bytes": base64.b64encode(value).decode()} if isinstance(value, bytes) else str(value)


def images_of(meta: Mapping[str, Any]) -> list[bytes]:
    """The encoded images (PNG, JPEG, ...) of a row, in order; none where it names none.

    Raises:
        BadImageError: An entry is neither bytes nor a path that can be read.
    """
    listed = meta.get(IMAGES)
    if listed is None:
        return []
    return [_encoded(entry) for entry in (listed if isinstance(listed, list) else [listed])]


def _encoded(entry: Any) -> bytes:
    if isinstance(entry, str):
        entry = {"path": entry}
    given = entry if isinstance(entry, Mapping) else {}
    data, path = given.get("bytes"), given.get("path")
    if isinstance(data, Mapping):  # bytes within a struct
        data = data.get("bytes")
    try:
        if isinstance(data, str):
            return base64.b64decode(data, validate=True)
        if isinstance(path, str):
            parent, _, name = path.rpartition("/")
            folder = Folder.at(parent or ("/" if path.startswith("/") else "."))
            if not folder.exists(name):
                raise BadImageError("there is no such image", got=path)
            return folder.read_bytes(name)
    except BadImageError:
        raise
    except (OSError, ITuneError, binascii.Error) as error:
        raise BadImageError(f"an image cannot be read: {' '.join(str(error).split())[:120]}", got=path) from None
    raise BadImageError("an image is neither bytes nor a path", got=json.dumps(entry, default=str)[:80])


def digest_of(meta: Mapping[str, Any]) -> str | None:
    """Identity of a row's images as the row names them; None for a row without."""
    if meta.get(IMAGES) is None:
        return None
    return hashlib.sha256(json.dumps(meta[IMAGES], sort_keys=True).encode()).hexdigest()[:16]
