"""Augmentation: what must not change does not, rewordings pass their gates or end with a reason, and no model is asked
for single words."""

import random
import re

import pytest
from scripted import answered, prompt, run

from itune_ray.config.recipes import AugmentConfig
from itune_ray.config.recipes.transforms import TokenAugment
from itune_ray.generate.augmenting import (
    NEGATIONS,
    OPERATORS,
    PROTECTED,
    broken_gate,
    budget,
    cut,
    delete,
    due,
    kept_words,
    mask,
    names,
    numbers,
    swap_once,
)
from itune_ray.generate.recipes.augment import Augment, parse_yes, token_variant
from itune_ray.generate.synonyms import SYNONYMS

TEXT = (
    'Write a short story about "the old house" near Paris, use `x = big + 1` and 3 examples, but do not '
    "mention {name}; "
    "explain the problem and see https://example.org/big/house for the whole task.\n"
    "```\nsmall code big\n```\nDescribe it."
)


def levenshtein(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


@pytest.mark.parametrize("op", OPERATORS)
def test_protected_spans_stay_byte_for_byte(op):
    spans = [match[0] for match in PROTECTED.finditer(TEXT)]
    assert len(spans) >= 6
    changed = 0
    for seed in range(60):
        text = OPERATORS[op](cut(TEXT), 0.3, random.Random(seed)).text()
        place = 0
        for span in spans:
            place = text.index(span, place) + len(span)
        assert "not mention" in text, "a negation and the word it negates"
        changed += text != TEXT
    assert changed > 40


@pytest.mark.parametrize("text", [TEXT, "", "one", "  a  b ", "Don't!", "é–ü, 中文 word"])
def test_cutting_loses_nothing_and_a_share_of_zero_changes_nothing(text):
    assert cut(text).text() == text
    for op, apply in OPERATORS.items():
        if cut(text).words:
            assert apply(cut(text), 0.0, random.Random(1)).text() == text, op


def test_words_in_quotes_code_and_slots_are_no_words():
    assert not {"house", "code", "name", "example", "x"} & set(cut(TEXT).words)
    assert not NEGATIONS & {word.lower() for word in cut(TEXT).words}
    assert "Paris" in cut(TEXT).words


def reference_deletion(words, p, rng):
    if len(words) == 1:
        return words
    kept = []
    for word in words:
        if rng.uniform(0, 1) > p:
            kept.append(word)
    if not kept:
        return [words[rng.randint(0, len(words) - 1)]]
    return kept


def reference_swap(words, rng):
    first = rng.randint(0, len(words) - 1)
    second, tries = first, 0
    while second == first:
        second = rng.randint(0, len(words) - 1)
        tries += 1
        if tries > 3:
            return words
    words[first], words[second] = words[second], words[first]
    return words


def test_deletion_and_swap_equal_the_reference_under_one_generator():
    for seed in range(300):
        words = [f"w{chr(97 + i)}" for i in range(1 + seed % 9)]
        for p in (0.1, 0.5, 0.999):
            kept = [words[i] for i in kept_words(len(words), p, random.Random(seed))]
            assert kept == reference_deletion(words, p, random.Random(seed))
            assert delete(cut(" ".join(words)), p, random.Random(seed)).text() == " ".join(kept)
        ours = list(words)
        swap_once(ours, random.Random(seed))
        assert ours == reference_swap(list(words), random.Random(seed))


def test_edits_stay_in_the_budget_and_something_stays():
    sentence = "please write a short story about the big house and explain the main idea in a clear way"
    words = sentence.split()
    n = budget(0.2, len(words))
    for seed in range(200):
        made = {op: OPERATORS[op](cut(sentence), 0.2, random.Random(seed)).text().split() for op in OPERATORS}
        assert levenshtein(words, made["synonym"]) <= n
        assert levenshtein(words, made["insert"]) == len(made["insert"]) - len(words) <= n
        assert sorted(made["swap"]) == sorted(words)
        assert levenshtein(words, made["swap"]) <= 2 * n
        assert made["delete"]
        assert all(word in words for word in made["delete"])
        everything = delete(cut(sentence), 1.0, random.Random(seed)).text()
        assert len(everything.split()) == 1
        assert mask(cut("big house"), 1.0, random.Random(seed)).text().count("___") == 1
    assert budget(0.1, 5) == 1
    assert budget(0.1, 35) == 3
    assert budget(0.0, 5) == 0


def test_masks_hide_or_drop_and_leave_stop_words():
    text = "Explain the story of the house."
    hidden = mask(cut(text), 0.6, random.Random(3)).text()
    assert re.fullmatch(r"(Explain|___) the (story|___) of the (house|___)\.", hidden)
    assert "___" in hidden
    dropped = mask(cut(text), 0.6, random.Random(3), None).text()
    assert "___" not in dropped
    assert "  " not in dropped
    assert len(dropped.split()) < 6


def test_synonyms_keep_the_case_and_are_no_negations():
    assert OPERATORS["synonym"](cut("Write it."), 1.0, random.Random(0)).text() in ("Compose it.", "Draft it.")
    for word, others in SYNONYMS.items():
        assert word not in others
        assert not NEGATIONS & {word, *others}
        assert len(set(others)) == len(others) > 0


@pytest.mark.parametrize("share", [0.2, 0.5, 0.6, 0.75, 0.8])
def test_variants_never_exceed_their_share_and_come_close(share):
    variants = 0
    for n in range(1, 400):
        variants += due(n - 1, share)
        assert variants <= share * (n + variants) + 1e-9
    assert variants / (399 + variants) == pytest.approx(share, abs=0.01)


# --- the recipe ------------------------------------------------------------------------------------------------------


def test_token_level_asks_nothing_and_keeps_the_answer():
    recipe = Augment(AugmentConfig(variants=3, max_share=0.75))
    assert recipe.prompts == {}
    row = answered("Write a short story about the big house on the hill.", "Once.", model="human@1")

    def script(turn, index):
        raise AssertionError("asked")

    outcomes = run(recipe, row, script)
    original, *variants = outcomes
    assert original.record.messages == row.messages
    assert original.record.key == row.key
    assert [o.record.response for o in outcomes] == ["Once."] * 4
    assert {o.record.parents for o in variants} == {(row.key,)}
    assert all(o.record.recipe.startswith("augment.") for o in variants)
    assert all(o.record.model == "human@1" for o in outcomes)
    accepted = [o.record.prompt[-1]["content"] for o in outcomes if o.status == "accepted"]
    assert len(set(accepted)) == len(accepted) >= 3
    assert outcomes[1].record == run(recipe, row, script)[1].record
    assert {o.reason for o in outcomes if o.status != "accepted"} <= {"unchanged"}


def test_what_cannot_change_is_told():
    how = TokenAugment(ops=("synonym",))
    row = answered("What is 3 + 4?", "7")
    assert [o.reason for o in run(Augment(AugmentConfig(how=how)), row, lambda *_: "")] == [None, "unchanged"]
    assert token_variant("42", "swap", how, random.Random(0)) == "42"


ORIGINAL = "Tell me in 3 sentences why Anna should not sell the house."
GOOD = "Give three sentences on the reasons against a sale; Anna must not part with her home."


@pytest.mark.parametrize(
    ("reworded", "reason"),
    [
        (GOOD, None),
        (ORIGINAL, "copy"),
        (ORIGINAL.lower().replace("tell", "tell,"), "copy"),
        (GOOD.replace("three", "four"), "numbers_changed"),
        (GOOD.replace("not part", "part"), "negation_changed"),
        (GOOD.replace("Anna", "Otto"), "names_changed"),
    ],
)
def test_only_a_rewording_of_the_same_passes_the_gates(reworded, reason):
    assert broken_gate(ORIGINAL, reworded, 0.9) == reason

    def script(turn, index):
        if "every right answer" in turn:
            return "Yes."
        assert ORIGINAL in turn
        return reworded

    config = AugmentConfig.model_validate({"type": "augment", "how": {"type": "paraphrase"}})
    _, outcome = run(Augment(config), answered(ORIGINAL, "Because."), script)
    assert outcome.reason == reason
    if reason is None:
        assert [m["content"] for m in outcome.record.messages] == [GOOD, "Because."]


def test_the_judge_has_the_last_word():
    config = AugmentConfig.model_validate({"type": "augment", "how": {"type": "paraphrase"}})
    for verdict, reason in (("no", "meaning_changed"), ("perhaps", "unparsable")):
        _, outcome = run(
            Augment(config), answered(ORIGINAL, "x"), lambda turn, _, v=verdict: v if "every right" in turn else GOOD
        )
        assert outcome.reason == reason
    assert [parse_yes(reply) for reply in ("Yes", "`no`.", "yes and no")] == [True, False, None]


def test_back_translation_goes_there_and_back():
    config = AugmentConfig.model_validate({"type": "augment", "how": {"type": "back_translation", "pivot": "French"}})

    def script(turn, index):
        if "every right answer" in turn:
            return "yes"
        if "into French" in turn:
            assert ORIGINAL in turn
            return "Dis-moi."
        assert "into English" in turn
        assert "Dis-moi." in turn
        return GOOD

    _, outcome = run(Augment(config), answered(ORIGINAL, "x"), script)
    assert outcome.record.prompt[-1]["content"] == GOOD
    assert outcome.record.recipe == "augment.back_translation"


def test_another_task_gets_an_answer_of_its_own():
    config = AugmentConfig.model_validate({"type": "augment", "how": {"type": "generative"}})
    sibling = "Say why Otto may keep his boat."
    _, outcome = run(
        Augment(config), answered(ORIGINAL, "old"), lambda turn, _: sibling if "same skill" in turn else "new"
    )
    assert [m["content"] for m in outcome.record.messages] == [sibling, "new"]
    _, copied = run(Augment(config), answered(ORIGINAL, "old"), lambda turn, _: ORIGINAL)
    assert copied.reason == "copy"


def test_variants_alone_and_rows_that_ask_nothing():
    config = AugmentConfig(keep_original=False, variants=2)
    outcomes = run(Augment(config), prompt("Write a short story about the big house."), lambda *_: "")
    assert len(outcomes) == 2
    (refused,) = run(Augment(config), prompt(" "), lambda *_: "")
    assert refused.reason == "no_prompt"


def test_numbers_and_names():
    assert numbers("1,000 of 3. Then four.") == {"1,000": 1, "3": 1, "4": 1}
    assert names("We saw Rome. It is old.", "We saw it.") == {"Rome"}
    assert names("Rome is old.", "It is old.") == set(), "the first word of a sentence may be any word"
