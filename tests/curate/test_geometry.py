"""Embeddings and what is computed on them: known answers, and bounds that hold for any vectors."""

import asyncio
import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itune_ray.config.base import validate
from itune_ray.config.curate import CurateJob, HashedEmbedder
from itune_ray.config.filters.base import ModelEmbedder
from itune_ray.config.shared import ServedModel
from itune_ray.curate.embeddings import hashed_vectors, model_vectors, unit
from itune_ray.curate.geometry import far_enough, k_center, losers, near_pairs, nearest, spherical_kmeans
from itune_ray.engine.fake import FakeEngine
from itune_ray.errors import ConfigError, DataError, GenerationError
from tests.curate.sets import circle


def random_vectors(count: int, seed: int, width: int = 3) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, width)))


# --- embedders -----------------------------------------------------------------------------------------------------


def test_hashed_vectors_are_bags_of_words():
    config = HashedEmbedder(dimensions=4096, ngram=1)
    one, same, other, empty = hashed_vectors(["The cat sat", "sat, CAT the!", "dogs bark loudly", "…"], config)
    assert np.linalg.norm(one) == pytest.approx(1)
    assert one @ same == pytest.approx(1)
    assert abs(one @ other) < 1e-9
    assert not empty.any()
    half = hashed_vectors(["the cat", "the dog"], config)
    assert half[0] @ half[1] == pytest.approx(0.5), "one of two words shared"


def test_hashed_vectors_see_word_order_by_their_pairs():
    alone, pairs = (hashed_vectors(["dog bites man", "man bites dog"], HashedEmbedder(ngram=n)) for n in (1, 2))
    assert alone[0] @ alone[1] == pytest.approx(1)
    assert pairs[0] @ pairs[1] < 0.9


def test_repeated_words_count_by_their_logarithm():
    (vector,) = hashed_vectors(["a a a b"], HashedEmbedder(dimensions=4096, ngram=1))
    large, small = sorted(abs(vector[vector != 0]), reverse=True)
    assert large / small == pytest.approx(1 + math.log(3))


MODEL = ModelEmbedder(served=ServedModel.model_validate({"model": {"path": "x"}, "engine": {"type": "fake"}}), batch=3)


class Counting:
    """A fake engine that refuses some texts, and batches that hold one."""

    def __init__(self, refused: tuple[str, ...] = (), wrong: str | None = None):
        self.texts: list[str] = []
        self._refused, self._wrong = refused, wrong

    async def embed(self, texts):
        if set(texts) & set(self._refused):
            raise GenerationError("prompt_too_long: 9")
        self.texts += texts
        found = await FakeEngine().embed(texts)
        return [[math.nan] * 8 if text == self._wrong else vector for text, vector in zip(texts, found, strict=True)]


def test_a_pool_embeds_each_text_once():
    texts = [f"t{i % 5}" for i in range(20)]
    engine = Counting()
    vectors = model_vectors(texts, engine, MODEL)
    assert sorted(engine.texts) == [f"t{i}" for i in range(5)]
    own = asyncio.run(FakeEngine().embed(["t3"]))[0]
    assert vectors[3] == pytest.approx(np.array(own) / np.linalg.norm(own))
    assert (vectors[3] == vectors[18]).all()


def test_a_text_that_the_model_refuses_spoils_no_other():
    engine = Counting(refused=("t2",))
    vectors = model_vectors([f"t{i}" for i in range(7)], engine, MODEL)
    assert [bool(np.isnan(v).all()) for v in vectors] == [i == 2 for i in range(7)]
    assert sorted(engine.texts) == ["t0", "t1", "t3", "t4", "t5", "t6"]


def test_a_pool_that_embeds_nothing_or_nonsense_is_one_clear_error():
    with pytest.raises(GenerationError, match="embeds no text: prompt_too_long"):
        model_vectors(["a", "b"], Counting(refused=("a", "b")), MODEL)
    with pytest.raises(DataError, match="1 of 2 embeddings are not finite"):
        model_vectors(["a", "b"], Counting(wrong="b"), MODEL)


def test_a_vllm_engine_must_be_started_for_embedding():
    def job(extra: dict[str, str]) -> CurateJob:
        served = {"model": {"path": "m"}, "engine": {"type": "vllm", "extra": extra}}
        filters = [{"type": "semantic_dedup", "embedder": {"type": "model", "served": served}}]
        inputs = [{"source": {"type": "file", "path": "x"}}]
        return validate(CurateJob, {"name": "x", "inputs": inputs, "filters": filters}, "x")

    job({"runner": "pooling", "convert": "embed"})
    with pytest.raises(ConfigError, match="runner: pooling"):
        job({})


# --- k-means -------------------------------------------------------------------------------------------------------


def test_kmeans_finds_planted_clusters():
    vectors = circle(*[centre + d for centre in (0, 90, 200) for d in (-6, -2, 0, 3, 5)])
    for seed in range(5):
        centroids = spherical_kmeans(vectors, 3, random.Random(seed))
        labels = nearest(vectors, centroids)[:, 0]
        assert [len(set(labels[i : i + 5])) for i in (0, 5, 10)] == [1, 1, 1]
        assert len(set(labels.tolist())) == 3
        assert np.linalg.norm(centroids, axis=1) == pytest.approx(np.ones(3))
        assert centroids[labels[0]] == pytest.approx(circle(0)[0], abs=0.01)


def test_kmeans_has_no_more_centroids_than_directions():
    assert len(spherical_kmeans(circle(0, 0, 0, 90), 4, random.Random(0))) == 2
    assert len(spherical_kmeans(circle(0), 3, random.Random(0))) == 1


def test_kmeans_is_a_fixed_point():
    vectors = random_vectors(200, 0)
    centroids = spherical_kmeans(vectors, 7, random.Random(0))
    labels = nearest(vectors, centroids)[:, 0]
    for cluster, centroid in enumerate(centroids):
        assert centroid == pytest.approx(unit(vectors[labels == cluster].sum(0, keepdims=True))[0])


# --- near pairs ----------------------------------------------------------------------------------------------------


def chain(mode, order=(0, 1, 2, 3, 4)) -> list[int]:
    near = near_pairs(circle(0, 20, 40, 60, 80), np.zeros((5, 1), np.int64), order, 0.9)
    gone = {order[place] for place in losers(near, mode)}
    return [i for i in range(5) if i not in gone]


def test_the_chain_of_the_specification():
    """Cosine 0.9397 between neighbours, ε = 0.1: SemDeDup keeps one of five, greedy every other."""
    assert chain("paper") == [0]
    assert chain("greedy") == [0, 2, 4]


def test_what_stays_depends_on_the_order_alone():
    assert chain("greedy", (1, 0, 2, 3, 4)) == [1, 3]
    assert chain("paper", (4, 3, 2, 1, 0)) == [4]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.floats(0.5, 0.99))
def test_greedy_leaves_no_near_pair_and_drops_nothing_unlike_all_that_stay(seed, count, floor):
    vectors, order = random_vectors(count, seed), random.Random(seed).sample(range(count), count)
    near = near_pairs(vectors, np.zeros((count, 1), np.int64), order, floor)
    gone = losers(near, "greedy")
    kept = [order[p] for p in range(count) if p not in gone]
    cosine = vectors[kept] @ vectors[kept].T - 2 * np.eye(len(kept))
    assert (cosine <= floor + 1e-12).all()
    for place, (of, similarity) in gone.items():
        assert order[of] in kept
        assert similarity == pytest.approx(float(vectors[order[place]] @ vectors[order[of]]))
        assert similarity > floor
    assert set(gone) <= set(losers(near, "paper"))


def test_a_second_assignment_finds_pairs_across_a_border():
    vectors = circle(0, 44, 46, 90)
    centroids = circle(0, 90)
    one, two = (near_pairs(vectors, nearest(vectors, centroids, n), range(4), 0.99).pairs.tolist() for n in (1, 2))
    assert one == []
    assert two == [[1, 2]]


def test_pairs_do_not_depend_on_the_chunk(monkeypatch):
    vectors = random_vectors(50, 1)
    clusters = nearest(vectors, random_vectors(4, 2), 2)
    whole = near_pairs(vectors, clusters, range(50), 0.8)
    monkeypatch.setattr("itune_ray.curate.geometry.CHUNK", 7)
    cut = near_pairs(vectors, clusters, range(50), 0.8)
    assert len(whole.pairs) > 10
    assert (whole.pairs == cut.pairs).all()


# --- k-center ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 10), st.integers(1, 4))
def test_k_center_is_within_twice_the_best_radius(seed, count, centres):
    vectors = random_vectors(count, seed)
    distance = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
    take = min(centres, count)
    best = min(distance[:, list(some)].min(1).max() for some in itertools.combinations(range(count), take))
    found = k_center(vectors, take, seed % count)
    assert len(set(found.chosen)) == take
    assert found.radius == pytest.approx(distance[:, found.chosen].min(1).max())
    assert found.radius <= 2 * best + 1e-9


def test_k_center_takes_no_duplicate_while_anything_is_uncovered():
    found = k_center(circle(0, 0, 0, 120, 120, 240), 3, 0)
    assert sorted(found.chosen) == [0, 3, 5]
    assert found.radius == pytest.approx(0)
    assert len(set(k_center(circle(0, 0, 0, 120), 4, 0).chosen)) == 4


# --- far enough ----------------------------------------------------------------------------------------------------

ANGLES = circle(0, 10, 20, 30, 90, 100, 180, 185, 270, 45)
SCORES = np.array([3, 2.5, 2.2, 2.9, 1, 1.5, 2, 2.1, 3, 1.0]) * np.array([4, 4, 4, 3, 5, 5, 2, 2, 1, 6.0])


@pytest.mark.parametrize("block", [1, 2, 3, 256])
def test_the_representation_filter_of_the_specification(block):
    """The reference gives [0, 5, 9, 7, 8] in batches of 3, where a dropped row drops another; ours never does."""
    order = sorted(range(10), key=lambda i: (-SCORES[i], i))
    taken, dropped = far_enough(ANGLES, order, 0.9, 10, block)
    assert taken == [0, 3, 5, 7, 8]
    assert dropped[1][0] == 0
    assert dropped[1][1] == pytest.approx(math.cos(math.radians(10)))
    assert taken[0] == int(SCORES.argmax())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.floats(-0.5, 0.99), st.integers(1, 9), st.integers(1, 70))
def test_far_enough_is_the_sequential_walk(seed, count, ceiling, block, limit):
    vectors, order = random_vectors(count, seed), random.Random(seed).sample(range(count), count)
    kept: list[int] = []
    for index in order:
        if len(kept) < limit and all(float(vectors[index] @ vectors[k]) <= ceiling for k in kept):
            kept.append(index)
    taken, dropped = far_enough(vectors, order, ceiling, limit, block)
    assert taken == kept
    assert len(taken) <= limit
    assert not set(taken) & set(dropped)
