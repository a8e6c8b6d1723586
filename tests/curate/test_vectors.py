"""Vectors of an embedding model are computed once per text and model, whoever needs them."""

import numpy as np
import pytest

from itune_ray.config.filters.base import ModelEmbedder
from itune_ray.config.shared import ServedModel
from itune_ray.curate import vectors
from itune_ray.curate.vectors import VectorStore
from itune_ray.data.storage import Folder
from itune_ray.engine.base import PoolDownError
from itune_ray.errors import GenerationError


def embedder(path: str = "m", **pool: int) -> ModelEmbedder:
    served = {"model": {"path": path}, "engine": {"type": "fake"}, "pool": pool}
    return ModelEmbedder(served=ServedModel.model_validate(served))


class Asked:
    """Embeds by length, and refuses some texts."""

    def __init__(self, refused: tuple[str, ...] = ()):
        self.texts: list[str] = []
        self._refused = refused

    def __call__(self, texts):
        self.texts += texts
        if set(texts) <= set(self._refused):
            raise GenerationError("the embedding model embeds no text")
        rows = [[np.nan] * 2 if t in self._refused else [np.cos(len(t)), np.sin(len(t))] for t in texts]
        return np.array(rows)


def test_a_second_filter_asks_only_what_is_new(tmp_path):
    folder, asked = Folder.at(tmp_path), Asked()
    first = VectorStore(folder, embedder()).vectors(["a", "bb", "a", "ccc"], asked)
    assert asked.texts == ["a", "bb", "ccc"], "equal texts once"
    again = VectorStore(folder, embedder(replicas=3)).vectors(["ccc", "dddd", "bb"], asked)
    assert asked.texts == ["a", "bb", "ccc", "dddd"], "pool sizes decide nothing"
    assert (again[[0, 2]] == first[[3, 1]]).all(), "to the last bit"
    assert first.shape == (4, 2)
    assert VectorStore(folder, embedder()).vectors([], asked).shape == (0, 0)


def test_another_model_has_vectors_of_its_own(tmp_path):
    asked = Asked()
    for path in ("m", "n"):
        VectorStore(Folder.at(tmp_path), embedder(path)).vectors(["a"], asked)
    assert asked.texts == ["a", "a"]


def test_what_is_refused_is_not_stored_and_spoils_nothing(tmp_path):
    store, asked = VectorStore(Folder.at(tmp_path), embedder()), Asked(refused=("bad",))
    for _ in range(2):
        found = store.vectors(["a", "bad"], asked)
        assert np.isfinite(found[0]).all()
        assert np.isnan(found[1]).all()
    assert asked.texts == ["a", "bad", "bad"]
    with pytest.raises(GenerationError, match="embeds no text"):
        VectorStore(Folder.at(tmp_path / "new"), embedder()).vectors(["bad"], asked)


def test_a_pool_that_is_down_refuses_no_text(tmp_path):
    store = VectorStore(Folder.at(tmp_path), embedder())
    store.vectors(["a"], Asked())

    def down(texts):
        raise PoolDownError("4 replicas died under the same request")

    with pytest.raises(PoolDownError):
        store.vectors(["a", "b"], down)


def test_what_was_embedded_before_a_kill_is_not_embedded_again(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "TEXTS_PER_PART", 2)
    asked = Asked()

    def killed(texts):
        if "ccc" in texts:
            raise KeyboardInterrupt
        return asked(texts)

    texts = ["a", "bb", "ccc"]
    with pytest.raises(KeyboardInterrupt):
        VectorStore(Folder.at(tmp_path), embedder()).vectors(texts, killed)
    VectorStore(Folder.at(tmp_path), embedder()).vectors(texts, asked)
    assert asked.texts == texts
