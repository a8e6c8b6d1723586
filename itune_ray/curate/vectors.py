"""Vectors of an embedding model, computed once and kept in the run by (text, model) for the next filter."""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from itune_ray.config.base import digest
from itune_ray.config.filters.base import ModelEmbedder
from itune_ray.curate.embeddings import Vectors
from itune_ray.data.fingerprint import content_identity
from itune_ray.data.storage import Folder
from itune_ray.engine.base import PoolDownError
from itune_ray.errors import GenerationError

TEXTS_PER_PART = 4096
"""Texts that are embedded and then stored together: what a kill can cost."""
Embed = Callable[[Sequence[str]], Vectors]
"""Unit vectors of texts, by the model; all NaN for a text that it refuses."""
SCHEMA = pa.schema([("text", pa.string()), ("vector", pa.list_(pa.float64()))])
"""A text by its digest, and its unit vector."""


class VectorStore:
    """The vectors of one model in a run. What is stored reaches no engine again, in this attempt or the next.

    Args:
        runs: Folder of the run.
        embedder: Its model and engine, with what decides their answers, name the store.
    """

    def __init__(self, runs: Folder, embedder: ModelEmbedder):
        self._folder = runs / f"embeddings-{digest(content_identity(embedder.served.identity()), length=16)}"

    def vectors(self, texts: Sequence[str], embed: Embed) -> Vectors:
        """One unit vector per text; a text that the model refuses is all NaN, and asked again the next time.

        Raises:
            GenerationError: The model embeds none of the texts.
        """
        keys = [digest(text, length=32) for text in texts]
        known = self._read(set(keys))
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        refused: list[str] = []
        why: GenerationError | None = None
        todo = list(missing.items())
        for start in range(0, len(todo), TEXTS_PER_PART):
            asked = dict(todo[start : start + TEXTS_PER_PART])
            try:
                found = dict(zip(asked, embed(list(asked.values())), strict=True))
            except PoolDownError:
                raise
            except GenerationError as error:  # each of them is refused
                refused, why = [*refused, *asked], error
                continue
            self._write({key: vector for key, vector in found.items() if np.isfinite(vector).all()})
            known |= found
        if why is not None:
            if not known:
                raise why
            known |= dict.fromkeys(refused, np.full(len(next(iter(known.values()))), np.nan))
        return np.array([known[key] for key in keys]) if keys else np.empty((0, 0))

    def _read(self, wanted: set[str]) -> dict[str, Vectors]:
        parts = self._folder.names() if self._folder.exists() else []
        known: dict[str, Vectors] = {}
        for part in sorted(parts):
            table = self._folder.read_table(part)
            for key, vector in zip(table["text"].to_pylist(), table["vector"], strict=True):
                if key in wanted:
                    known[key] = np.array(vector.values)
        return known

    def _write(self, found: dict[str, Vectors]) -> None:
        if found:
            columns = {"text": list(found), "vector": list(found.values())}
            name = f"part-{digest(sorted(found), length=16)}.parquet"
            self._folder.write_table(name, pa.table(columns, schema=SCHEMA))
