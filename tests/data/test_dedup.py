"""Deduplication: known answers, parity with datasketch, brute force, and independence of order and blocks."""

import hashlib
import itertools
import random
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itune_ray.data import dedup, minhash
from itune_ray.data.dedup import TEXT_SCHEMA, NearSettings, exact_duplicates, near_duplicates, normalise
from itune_ray.data.minhash import (
    collision_probability,
    jaccard,
    optimal_bands,
    recall_bands,
    signatures,
    similarities,
)
from itune_ray.data.records import Record
from itune_ray.data.shingles import CHUNK_TEXTS, ShingleSets, shingle_sets, shingles

EVEN = "write a function that takes a list of integers and returns the sum of the even numbers in the list"
ODD = EVEN.replace("even", "odd")


def texts_table(texts: list[str]) -> pa.Table:
    return pa.table({"id": range(len(texts)), "text": texts}, schema=TEXT_SCHEMA)


def grams(text: str, ngram: int = 3, min_tokens: int = 5) -> set[str]:
    """The shingles of a text as the definition has them."""
    words = re.findall(r"\w+", text.lower())
    n = min(len(words), ngram if len(words) >= 12 else min(ngram, 2))
    return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)} if len(words) >= min_tokens else set()


def sha1_shingles(text: str) -> np.ndarray:
    """Shingles under the hash that datasketch takes by default."""
    return np.array([int.from_bytes(hashlib.sha1(gram.encode()).digest()[:4], "little") for gram in grams(text)], "u8")


def planted(num: int, seed: int = 0) -> list[str]:
    """Random sentences; every third is a light edit of an earlier one."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(400)]
    texts: list[str] = []
    for index in range(num):
        if index % 3 == 2:
            tokens = rng.choice(texts).split()
            for _ in range(rng.randint(0, 3)):
                tokens[rng.randrange(len(tokens))] = rng.choice(words)
        else:
            tokens = rng.choices(words, k=rng.randint(14, 40))
        texts.append(" ".join(tokens))
    return texts


# --- numbers of the literature -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "num_perm", "expected"),
    [
        (0.5, 128, (25, 5)),
        (0.7, 128, (14, 9)),
        (0.8, 128, (9, 13)),
        (0.85, 128, (8, 16)),
        (0.9, 128, (5, 25)),
        (0.7, 256, (25, 10)),
        (0.8, 256, (17, 15)),
        (0.45, 256, (47, 5)),
        (0.5, 200, (33, 6)),
    ],
)
def test_optimal_bands_are_datasketchs(threshold, num_perm, expected):
    assert optimal_bands(threshold, num_perm) == expected


@pytest.mark.parametrize(
    ("similarity", "probability"),
    [(0.5, 0.0533), (0.6, 0.2111), (0.7, 0.5645), (0.75, 0.7716), (0.8, 0.9235), (0.85, 0.9884), (0.9, 0.9996)],
)
def test_collision_probability_of_fineweb(similarity, probability):
    assert collision_probability(similarity, 14, 8) == pytest.approx(probability, abs=6e-5)


def test_the_even_and_odd_sentences():
    a, b = shingles(EVEN), shingles(ODD)
    assert np.intersect1d(a, b).size == 15
    assert np.union1d(a, b).size == 21
    assert jaccard(a, b) == pytest.approx(15 / 21)
    first, second = signatures(ShingleSets.of([sha1_shingles(EVEN), sha1_shingles(ODD)]))
    assert np.mean(first == second) == 0.734375
    assert jaccard(a, shingles("nothing of this is in the other sentence at all today my friend")) == 0


@pytest.mark.parametrize("num_perm", [1, 64, 128])
def test_signatures_are_datasketchs_bit_for_bit(num_perm):
    datasketch = pytest.importorskip("datasketch")
    for text in [EVEN, ODD, *planted(10)]:
        words = text.split()
        theirs = datasketch.MinHash(num_perm=num_perm, seed=1, scheme="legacy")
        theirs.update_batch([" ".join(words[i : i + 3]).encode() for i in range(len(words) - 2)])
        (ours,) = signatures(ShingleSets.of([sha1_shingles(text)]), num_perm)
        assert ours.tolist() == theirs.hashvalues.tolist()


def test_a_signature_is_an_unbiased_estimate():
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(300):
        pool = rng.integers(0, 2**63, 120, dtype=np.uint64)
        shared = int(rng.integers(1, 60))
        a, b = np.sort(pool[:60]), np.sort(np.concatenate([pool[:shared], pool[60 : 120 - shared]]))
        first, second = signatures(ShingleSets.of([a, b]), 128)
        errors.append(float(np.mean(first == second)) - jaccard(a, b))
    assert max(map(abs, errors)) <= 4 / np.sqrt(128)
    assert abs(np.mean(errors)) < 0.01


@pytest.mark.parametrize(
    ("threshold", "num_perm", "expected"), [(0.7, 128, (32, 4)), (0.9, 128, (12, 10)), (0.5, 128, (42, 3))]
)
def test_recall_bands_find_what_is_at_the_threshold(threshold, num_perm, expected):
    bands, rows = recall_bands(threshold, num_perm)
    assert (bands, rows) == expected
    assert collision_probability(threshold, bands, rows) >= 0.99
    assert collision_probability(threshold, num_perm // (rows + 1), rows + 1) < 0.99


letters = "aAbZ09_ -'\n.éßİſΣσς\u0301ñ\u0660中文\U0001d400\ud800²\u00a0"


@settings(deadline=None, max_examples=200)
@given(st.lists(st.text(letters, max_size=60), max_size=8), st.integers(1, 4), st.integers(1, 6))
def test_shingles_are_those_of_the_definition(texts, ngram, min_tokens):
    """Two n-grams have one hash exactly when they are equal, whatever text and chunk they are in."""
    sets = shingle_sets(texts, ngram, min_tokens)
    for i, text in enumerate(texts):
        assert len(sets[i]) == len(grams(text, ngram, min_tokens))
        assert sets[i].tolist() == sorted(sets[i].tolist())
    for i, j in itertools.product(range(len(texts)), repeat=2):
        shared = grams(texts[i], ngram, min_tokens) & grams(texts[j], ngram, min_tokens)
        assert len(np.intersect1d(sets[i], sets[j])) == len(shared)


def test_chunks_decide_nothing(monkeypatch):
    texts = [*planted(30), "", "é " * 40, *planted(5, 1)]
    whole = shingle_sets(texts)
    for name, size in {"CHUNK_TEXTS": 3, "CHUNK_CHARACTERS": 50}.items():
        monkeypatch.setattr(f"itune_ray.data.shingles.{name}", size)
        cut = shingle_sets(texts)
        assert cut.values.tolist() == whole.values.tolist()
        assert cut.offsets.tolist() == whole.offsets.tolist()
    assert [shingles(text).tolist() for text in texts] == [whole[i].tolist() for i in range(len(texts))]


@pytest.mark.parametrize("count", [CHUNK_TEXTS, CHUNK_TEXTS + 1])
def test_a_full_chunk_of_short_texts(count):
    texts = [f"a b c d e {i}" for i in range(count)]
    sets = shingle_sets(texts)
    assert all(sets[i].tolist() == shingles(texts[i]).tolist() for i in (0, count // 2, count - 1))
    assert sets.offsets[-1] == len(sets.values)


def test_similarities_are_those_of_sets(monkeypatch):
    texts = [*planted(40), "", "too short"]
    sets = shingle_sets(texts)
    pairs = np.array(list(itertools.product(range(len(texts)), repeat=2)))
    monkeypatch.setattr(minhash, "PAIRS_AT_ONCE", 100)
    of = [grams(text) for text in texts]
    expected = [len(of[i] & of[j]) / max(1, len(of[i] | of[j])) for i, j in pairs]
    assert similarities(pairs, sets) == pytest.approx(expected)
    assert [jaccard(sets[i], sets[j]) for i, j in pairs] == pytest.approx(expected)


def test_short_texts_use_pairs_of_words_and_shorter_ones_none():
    assert len(shingles("a b c d", min_tokens=5)) == 0
    assert len(shingles("a b c d e")) == 4
    assert len(shingles(" ".join("abcdefghijkl"))) == 10
    assert shingles("A, b! C d (e)").tolist() == shingles("a b c d e").tolist()


# --- exact ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "level"),
    [
        ("ﬁne", "fine", 0),
        ("A  b\n", "a b", 1),
        ("Straße", "STRASSE", 1),
        ("a, b - c!", "a b c", 2),
        ("row 12", "row 34", 3),
    ],
)
def test_each_level_ignores_one_thing_more(a, b, level):
    assert normalise(a, level) == normalise(b, level)
    if level:
        assert normalise(a, level - 1) != normalise(b, level - 1)


def test_a_level_never_empties_a_text():
    assert normalise("!!!", 2) != normalise("???", 2)
    assert normalise("42", 3) != normalise("43", 3)


messy = st.lists(st.text("aA bé!1 2.", max_size=5), min_size=1, max_size=30)


@settings(deadline=None)
@given(messy, st.integers(0, 3))
def test_exact_keeps_the_first_id_of_each_text(texts, level):
    lost = exact_duplicates(texts_table(texts), level)
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        first.setdefault(normalise(text, level), index)
    assert {i: d.of for i, d in lost.items()} == {
        i: first[normalise(t, level)] for i, t in enumerate(texts) if first[normalise(t, level)] != i
    }
    kept = [text for index, text in enumerate(texts) if index not in lost]
    assert exact_duplicates(texts_table(kept), level) == {}


@settings(deadline=None)
@given(messy)
def test_a_higher_level_never_keeps_more(texts):
    lost = [len(exact_duplicates(texts_table(texts), level)) for level in range(4)]
    assert lost == sorted(lost)


def test_exact_text_tells_turns_apart():
    def record(*turns: tuple[str, str]) -> Record:
        return Record(source="s", position=0, messages=tuple({"role": r, "content": c} for r, c in turns))

    one = record(("user", "go on"), ("assistant", "a"))
    other = record(("user", "x"), ("assistant", "y"), ("user", "go on"), ("assistant", "a"))
    assert dedup.exact_text(one, "response") == dedup.exact_text(other, "response") == "a"
    assert dedup.exact_text(one, "prompt") != dedup.exact_text(other, "prompt")
    assert dedup.exact_text(record(("user", "q")), "response") is None
    assert dedup.exact_text(Record(source="s", position=0, text="t"), "response") is None
    assert dedup.near_text(record(("system", "s"), ("user", "q"), ("assistant", "a")), "full") == "q\na"


# --- near ----------------------------------------------------------------------------------------------------------

EAGER = NearSettings(threshold=0.6, bands=32, rows=4)
"""Finds a pair of similarity 0.6 in 98.8 of 100 cases, one of 0.8 in all but 1e-7."""


def brute_force(texts: list[str], threshold: float) -> dict[int, int]:
    """The same rule over all pairs: in the order of the ids, dropped when a kept one is similar."""
    sets = [shingles(text) for text in texts]
    dropped: dict[int, int] = {}
    for index, better in itertools.product(range(len(texts)), repeat=2):
        undecided = better < index and index not in dropped and better not in dropped
        if undecided and jaccard(sets[index], sets[better]) >= threshold:
            dropped[index] = better
    return dropped


def test_near_duplicates_are_those_of_brute_force_up_to_missed_candidates():
    texts = planted(400)
    expected = brute_force(texts, 0.6)
    found = {i: d.of for i, d in near_duplicates(texts_table(texts), EAGER).items()}
    assert len(expected) > 80
    assert len(set(expected) ^ set(found)) <= 2
    everything = NearSettings(threshold=0.6, bands=128, rows=1)
    assert {i: d.of for i, d in near_duplicates(texts_table(texts), everything).items()} == expected


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6))
def test_near_duplicates_hold_what_they_promise(seed):
    texts = planted(60, seed) + planted(10, seed)
    found = near_duplicates(texts_table(texts), EAGER)
    sets = [shingles(text) for text in texts]
    for loser, duplicate in found.items():
        assert duplicate.of < loser
        assert duplicate.of not in found
        assert duplicate.similarity >= EAGER.threshold
        if duplicate.similarity < 1:
            assert duplicate.similarity == pytest.approx(jaccard(sets[loser], sets[duplicate.of]))
    kept = [text for index, text in enumerate(texts) if index not in found]
    assert near_duplicates(texts_table(kept), EAGER) == {}, "applying it twice changes nothing"


def test_the_order_of_the_rows_decides_nothing():
    table = texts_table(planted(150))
    shuffled = table.take(pa.array(random.Random(1).sample(range(150), 150)))
    assert near_duplicates(shuffled, EAGER) == near_duplicates(table, EAGER)
    assert exact_duplicates(shuffled, 1) == exact_duplicates(table, 1)


def test_a_chain_does_not_drop_what_is_unlike_the_one_that_stays():
    words = [f"w{i}" for i in range(24)]
    a, b, c = " ".join(words[:18]), " ".join(words[3:21]), " ".join(words[6:24])
    ab, ac = jaccard(shingles(a), shingles(b)), jaccard(shingles(a), shingles(c))
    threshold = (ab + ac) / 2
    found = near_duplicates(texts_table([a, b, c]), NearSettings(threshold=threshold, bands=128, rows=1))
    assert set(found) == {1}


def test_a_twin_of_a_dropped_text_follows_it():
    found = near_duplicates(texts_table([EVEN, ODD, ODD]), NearSettings(threshold=0.7, bands=128, rows=1))
    assert {i: d.of for i, d in found.items()} == {1: 0, 2: 0}


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 20)), max_size=60))
def test_candidates_are_all_pairs_of_a_bucket(entries):
    keys, ids = (np.array([entry[side] for entry in entries], np.int64) for side in (0, 1))
    pairs = {(i, j) for (k, i), (other, j) in itertools.product(entries, repeat=2) if k == other and i < j}
    assert list(map(tuple, minhash.candidate_pairs(keys.astype(np.uint64), ids).tolist())) == sorted(pairs)


def test_crowded_buckets_stay_linear_and_keep_their_best():
    size = minhash.CROWD * 3
    keys, ids = np.zeros(size, np.uint64), np.arange(size, dtype=np.int64)
    pairs = minhash.candidate_pairs(keys, ids)
    assert len(pairs) < minhash.CROWD * size
    assert set(pairs[:, 1].tolist()) == set(range(1, size))
    assert (0, size - 1) in set(map(tuple, pairs.tolist()))


def test_thousands_of_equal_texts_cost_no_pairs():
    found = near_duplicates(texts_table([EVEN] * 3000 + [ODD]), EAGER)
    assert len(found) == 3000
    assert {d.of for d in found.values()} == {0}


@pytest.mark.parametrize("texts", [[], ["one"], ["too short", "too short"]])
def test_nothing_to_compare_is_no_duplicate(texts):
    assert near_duplicates(texts_table(texts), EAGER) == {}


# --- over Ray Data -------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.timeout(600)
@pytest.mark.parametrize("blocks", [1, 8])
def test_ray_data_gives_what_one_process_gives(ray_session, blocks, monkeypatch):
    monkeypatch.setattr(dedup, "VERIFY_IN_PROCESS", 0)
    texts = [*planted(250), *["Same Text"] * 9, *["same  text"] * 4]
    table = texts_table(texts).take(pa.array(random.Random(blocks).sample(range(263), 263)))
    exact, near = exact_duplicates(table, 1), near_duplicates(table, EAGER)
    assert len(exact) >= 12
    assert len(near) > 30
    assert exact_duplicates(table, 1, blocks) == exact
    assert near_duplicates(table, EAGER, blocks) == near


@pytest.fixture(scope="module")
def ray_session():
    import ray

    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
