"""Similarities against hand-computed figures and sacreBLEU itself, and the traps of languages."""

import math
import random

import numpy as np
import pytest
import sacrebleu

from itune_ray.benchmarks import similarity

RESPONSE, REFERENCE = "the cat sat on the mat", "the cat is on the mat"


def test_bleu_by_hand():
    # 5/6 words, 3/5 pairs, 1/4 triples, 0/3 fours smoothed to 1/2 of one: (5/6 * 3/5 * 1/4 * 1/6) ** (1/4).
    by_hand = 100 * (5 / 6 * 3 / 5 * 1 / 4 * (0.5 / 3)) ** 0.25
    assert by_hand == pytest.approx(37.9918, abs=1e-4)
    assert similarity.sentence_bleu(RESPONSE, REFERENCE, "en") == pytest.approx(by_hand)
    sums = np.array(similarity.bleu_sums(RESPONSE, REFERENCE, "en"))
    assert float(similarity.corpus_bleu(sums)) == pytest.approx(by_hand)


def test_rouge_by_hand():
    found = similarity.rouge(RESPONSE, REFERENCE, "en")
    assert found == pytest.approx({"rouge1": 5 / 6, "rouge2": 3 / 5, "rougeL": 5 / 6})


def test_corpus_bleu_of_sums_is_sacrebleus():
    rng = random.Random(3)
    words = ["the", "a", "cat", "dog", "sat", "on", "mat", "is", "was", "quick", "brown"]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 14))) for _ in range(80)]
    pairs = [(text, " ".join(w if rng.random() < 0.7 else "the" for w in text.split())) for text in texts]
    for size in (1, 2, 5, 40):
        part = pairs[:size]
        sums = np.sum([similarity.bleu_sums(a, b, "en") for a, b in part], axis=0)
        expected = sacrebleu.corpus_bleu([a for a, _ in part], [[b for _, b in part]]).score
        assert float(similarity.corpus_bleu(sums)) == pytest.approx(expected, abs=1e-9)


def test_corpus_bleu_takes_many_sums_at_once_and_knows_empty_replies():
    one = np.array(similarity.bleu_sums(RESPONSE, REFERENCE, "en"))
    empty = np.array(similarity.bleu_sums("", REFERENCE, "en"))
    nothing = np.zeros(10)
    values = similarity.corpus_bleu(np.stack([one, empty, nothing, one + empty]))
    assert values[0] == pytest.approx(37.9918, abs=1e-4)
    assert values[1] == 0.0
    assert math.isnan(values[2])
    assert 0 < values[3] < values[0]  # the empty reply lengthens the reference


def test_japanese_and_chinese_are_not_one_word():
    japanese = "猫がマットの上に座った", "猫はマットの上に座った"
    chinese = "我今天很高兴见到你", "我今天非常高兴见到你"
    for (response, reference), language in ((japanese, "ja"), (chinese, "zh")):
        assert similarity.language_of(reference) == language
        assert similarity.sentence_bleu(response, reference, language) > 30
        assert sacrebleu.sentence_bleu(response, [reference]).score < 10  # the trap
        rouge = similarity.rouge(response, reference, language)
        assert 0.7 < rouge["rouge1"] < 1.0
    assert similarity.rouge(*japanese, "en")["rouge1"] == 0.0  # the trap


def test_accents_do_not_split_words():
    found = similarity.rouge("l'été dernier", "l'étage dernier", "fr")
    assert found["rouge1"] == pytest.approx(2 / 3)  # l, dernier; not the pieces "l t" of the English tokenizer


def test_the_language_told_wins_and_scripts_are_guessed():
    assert similarity.language_of("anything", "FR-ca") == "fr"
    found = {text: similarity.language_of(text) for text in ("plain ‘quoted’ 20°", "été", "한국어", "สวัสดี", "漢字かな")}
    assert found == {"plain ‘quoted’ 20°": "en", "été": "und", "한국어": "ko", "สวัสดี": "th", "漢字かな": "ja"}


def test_the_signature_names_every_tokenizer_in_use():
    signature = similarity.bleu_signature(["en", "fr", "zh"])
    assert "tok:13a" in signature
    assert "tok:zh" in signature
    assert f"version:{sacrebleu.__version__}" in signature


def test_chrf_is_sacrebleus():
    expected = sacrebleu.sentence_chrf(RESPONSE, [REFERENCE]).score
    assert similarity.chrf(RESPONSE, REFERENCE) == pytest.approx(expected)
    assert similarity.chrf(REFERENCE, REFERENCE) == pytest.approx(100)


@pytest.mark.parametrize(
    ("response", "reference", "equal"),
    [
        ("The Eiffel Tower!", "eiffel tower", True),
        ("  a   b  ", "b", True),
        ("«Été»", "été", True),
        ("Paris", "London", False),
        ("theatre", "atre", False),
    ],
)
def test_exact_match_after_squads_normalisation(response, reference, equal):
    assert similarity.exact_match(response, reference) is equal
