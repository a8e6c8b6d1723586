"""N-gram overlap: what is indexed, what is found, and what counts for nothing (methods D37)."""

import subprocess
import sys

import pytest

from itune_ray.data.overlap import Item, OverlapIndex, hash_tokens, ngram_hashes, tokens

EVAL = "A farmer keeps 12 hens, 3 goats and one very old dog; how many legs are in the yard at noon?"


def index(*items: Item, n: int = 8, common: int = 10, **more) -> OverlapIndex:
    return OverlapIndex(items, n, common=common, **more)


def score(made: OverlapIndex, *texts: str) -> float:
    found = made.best(texts)
    return 0.0 if found is None else found.score


@pytest.mark.parametrize(
    ("query_ngrams", "indexed"),
    [
        (False, ["F G H I", "G H I J", "C D E F", "D E F G", "E F G H"]),
        (True, ["F G H I", "G H I J", "C D E F", "D E F G", "E F G H", "A B C D", "B C D E"]),
    ],
)
def test_datatroves_example(query_ngrams, indexed):
    made = index(Item("r", "A B C D E", "F G H I J"), n=4, query_ngrams=query_ngrams)
    assert made.ngrams == len(indexed)
    everything = [" ".join("ABCDEFGHIJ"[i : i + 4]) for i in range(7)]
    assert {gram for gram in everything if score(made, gram)} == set(indexed)


def test_a_comma_of_its_own_hides_nothing():
    made = index(Item("r", "alpha , beta gamma delta epsilon"), n=5)
    assert score(made, "x x alpha , beta gamma delta epsilon y y") == 1.0
    assert score(made, "x x alpha, Beta gamma DELTA; epsilon y y") == 1.0


@pytest.mark.parametrize(
    "change", [str, str.upper, lambda s: s.replace(" ", " , "), lambda s: s.replace("o", "\uff4f")]
)
def test_a_planted_text_is_found_at_every_offset(change):
    made = index(Item("r", EVAL), Item("other", "Which planet has the most moons according to the newest counts?"))
    filler = [f"w{i}" for i in range(30)]
    for offset in range(len(filler) + 1):
        text = " ".join([*filler[:offset], change(EVAL), *filler[offset:]])
        found = made.best([text])
        assert found is not None
        assert (found.row, found.score) == ("r", 1.0)


def test_a_clean_text_shares_nothing():
    assert index(Item("r", EVAL)).best([" ".join(reversed(EVAL.split())), "12 hens", ""]) is None


def test_the_score_is_the_covered_share_of_the_benchmarks_tokens():
    words = [f"t{i}" for i in range(20)]
    made = index(Item("r", " ".join(words)))
    assert score(made, "x " + " ".join(words[:8])) == pytest.approx(8 / 20)
    assert score(made, " ".join(words[:10])) == pytest.approx(10 / 20)
    assert score(made, " ".join([*words[:8], "x", *words[12:]])) == pytest.approx(16 / 20)
    assert score(made, " ".join(words[:7])) == 0.0
    assert score(made, " ".join(words[:8] * 5)) == pytest.approx(8 / 20), "said twice is covered once"


def test_texts_of_a_row_are_averaged_each_with_the_turn_that_holds_most_of_it():
    first, second = (" ".join(f"{name}{i}" for i in range(10)) for name in "ab")
    made = index(Item("r", first), Item("r", second))
    assert score(made, first) == pytest.approx(0.5)
    assert score(made, first, second) == pytest.approx(1.0)
    assert score(made, first, first) == pytest.approx(0.5)


def test_a_text_shorter_than_an_ngram_counts_whole_and_a_very_short_one_not_at_all():
    made = index(Item("r", "who wrote the old book"), Item("s", "who wrote the book"))
    assert (made.rows, made.too_short) == (["r"], 1)
    assert score(made, "Tell me: who wrote the old book?") == 1.0
    assert score(made, "who wrote the book") == 0.0
    assert score(made, "who wrote the old") == 0.0


def test_boilerplate_covers_nothing_and_is_no_part_of_the_share():
    stem = "answer the following question with exactly one of these letters please"
    tails = [" ".join(f"q{row}w{i}" for i in range(8)) for row in range(4)]
    items = [Item(str(row), f"{stem} {tail}") for row, tail in enumerate(tails)]
    strict, loose = index(*items, common=3), index(*items, common=4)
    assert score(loose, stem) == pytest.approx(11 / 19)
    assert strict.best([stem]) is None
    found = strict.best([f"{stem} {tails[2]}"])
    assert found is not None
    assert (found.row, found.score) == ("2", 1.0)
    assert index(*items, Item("5", stem), common=3).rows == ["0", "1", "2", "3", "5"]
    assert index(*(Item(str(i), stem) for i in range(5)), common=3).ngrams == 0


def test_of_equal_scores_the_smallest_key_wins():
    for order in (["b", "a"], ["a", "b"]):
        found = index(*(Item(key, EVAL) for key in order)).best([EVAL])
        assert found is not None
        assert found.row == "a"


def test_scripts_without_spaces_are_cut_into_characters():
    assert tokens("次の文を読む abc-def") == ["次", "の", "文", "を", "読", "む", "abc", "def"]
    made = index(Item("r", "日本で一番高い山は何という山ですか"))
    assert score(made, "質問:日本で一番高い山は何という山ですか。答えてください") == 1.0


def test_hashes_are_the_same_in_every_process():
    code = "from itune_ray.data.overlap import *; print(ngram_hashes(hash_tokens(['a', 'b', 'c']), 2).tolist())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == str(ngram_hashes(hash_tokens(["a", "b", "c"]), 2).tolist())
    assert len(ngram_hashes(hash_tokens(["a"]), 2)) == 0
