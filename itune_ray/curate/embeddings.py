"""Texts as unit vectors: by a hashed bag of words that needs no model, or by a pool that serves an embedding model."""

import asyncio
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from itune_ray.config.curate import HashedEmbedder
from itune_ray.config.filters.base import ModelEmbedder
from itune_ray.engine.base import PoolDownError
from itune_ray.errors import DataError, GenerationError, ITuneError

Vectors = NDArray[np.float64]
_WORD = re.compile(r"\w+")


class Embedding(Protocol):
    """What gives vectors: an engine or the client of a pool."""

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One vector per text."""
        ...


def hashed_vectors(texts: Sequence[str], config: HashedEmbedder) -> Vectors:
    """Signed feature hashing of word n-grams (Weinberger et al. 2009), one unit vector per text.

    A feature that occurs c times adds ±(1 + ln c) at one of the dimensions; place and sign are its hash. Equal bags of
    words have equal vectors, and cosines estimate those of the unhashed bags. A text without words is the zero vector.
    """
    vectors = np.zeros((len(texts), config.dimensions))
    for row, text in enumerate(texts):
        for feature, count in Counter(_features(text, config.ngram)).items():
            value = int.from_bytes(hashlib.blake2b(feature.encode(), digest_size=8).digest(), "big")
            vectors[row, (value >> 1) % config.dimensions] += (1 if value & 1 else -1) * (1 + np.log(count))
    return unit(vectors)


def model_vectors(texts: Sequence[str], engine: Embedding, config: ModelEmbedder) -> Vectors:
    """One unit vector per text from a pool, equal texts embedded once; a text that the model refuses is all NaN.

    Raises:
        GenerationError: The pool embeds none of the texts.
        DataError: Vectors differ in length or hold numbers that are not finite.
    """
    if not texts:
        return np.empty((0, 0))
    distinct = list(dict.fromkeys(texts))
    found = asyncio.run(_in_batches(distinct, engine, config.batch))
    sizes = {len(vector) for vector in found if vector is not None}
    if len(sizes) > 1:
        raise DataError("the embedding model gives vectors of several lengths", got=sorted(sizes))
    width = sizes.pop() if sizes else 0
    vectors = unit(np.array([[np.nan] * width if vector is None else vector for vector in found]).reshape(-1, width))
    wrong = sum(vector is not None for vector in found) - int(np.isfinite(vectors).all(axis=1).sum()) if width else 0
    if wrong:
        raise DataError(f"{wrong} of {len(distinct)} embeddings are not finite numbers")
    place = {text: index for index, text in enumerate(distinct)}
    return vectors[[place[text] for text in texts]]


def unit(vectors: Vectors) -> Vectors:
    """Each row divided by its length; rows of zeros stay."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length == 0, 1.0, length)


async def _in_batches(texts: Sequence[str], engine: Embedding, size: int) -> list[list[float] | None]:
    parts = [texts[start : start + size] for start in range(0, len(texts), size)]
    errors: list[ITuneError] = []
    found = [vector for part in await asyncio.gather(*(_embed(p, engine, errors) for p in parts)) for vector in part]
    if all(vector is None for vector in found):
        raise GenerationError(f"the embedding model embeds no text: {errors[-1]}", knob="filters.N.embedder")
    return found


async def _embed(texts: Sequence[str], engine: Embedding, errors: list[ITuneError]) -> list[list[float] | None]:
    """A batch that is refused is halved until the text at fault is alone."""
    try:
        return [*await engine.embed(texts)]
    except PoolDownError:
        raise  # no text is at fault
    except ITuneError as error:
        errors.append(error)
        if len(texts) == 1:
            return [None]
    half = len(texts) // 2
    return [*await _embed(texts[:half], engine, errors), *await _embed(texts[half:], engine, errors)]


def _features(text: str, ngram: int) -> list[str]:
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return [" ".join(words[i : i + n]) for n in range(1, ngram + 1) for i in range(len(words) - n + 1)]
