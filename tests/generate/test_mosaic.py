"""Mosaic-IT: every rule by its known answer, what is printed read back, and each row used once per epoch."""

import json
import random
import re
from collections import Counter

import pytest
from scripted import answered, prompt
from scripted import run as run_one
from testdata import public_data

from itune_ray.config.curate import HygieneConfig
from itune_ray.config.recipes import MosaicConfig
from itune_ray.curate.filters.hygiene import Hygiene
from itune_ray.data.records import Record
from itune_ray.generate.mosaic import (
    MARKER_SHAPES,
    MARKER_WORDINGS,
    MARKER_WORDS,
    MASK_RULES,
    MASK_WORDINGS,
    ORDER_RULES,
    ORDER_WORDINGS,
    PLAIN_WORDINGS,
    Pair,
    compose,
    group_size,
    mask_count,
    masked,
    ordered,
)
from itune_ray.generate.recipes.mosaic import Mosaic

INSTRUCTIONS = ["Task delta", "Task alpha", "Task charlie and more words", "Task bravo"]
RESPONSES = ["r1", "r2", "r3", "r4"]
ORDERS = {
    "fix": "r3 r1 r4 r2",
    "reverse": "r4 r3 r2 r1",
    "alpha": "r2 r4 r3 r1",
    "reverse_alpha": "r1 r3 r4 r2",
    "length_word": "r1 r2 r4 r3",
    "reverse_length_word": "r3 r1 r2 r4",
    "length_char": "r1 r2 r4 r3",
    "reverse_length_char": "r3 r1 r2 r4",
    "odd_even": "r1 r3 r2 r4",
    "even_odd": "r2 r4 r1 r3",
}
MASKS = {"fix": "r2 r4", "word_long": "r2 r4", "word_short": "r3 r4", "odd": "r2 r4", "even": "r1 r3"}


@pytest.mark.parametrize("rule", ORDER_RULES)
def test_order_rules_by_known_answers(rule):
    assert [RESPONSES[i] for i in ordered(rule, INSTRUCTIONS, [3, 1, 4, 2])] == ORDERS[rule].split()


@pytest.mark.parametrize("rule", MASK_RULES)
def test_mask_rules_by_known_answers(rule):
    left_out = masked(rule, INSTRUCTIONS, mask_count(4, 0.5), [3, 1])
    assert [r for i, r in enumerate(RESPONSES) if i not in left_out] == MASKS[rule].split()


def test_mask_counts():
    assert [mask_count(k, u) for k, u in [(2, 0.1), (4, 0.5), (10, 0.49), (3, 0.5)]] == [1, 2, 4, 1]


def test_alphabetical_order_is_of_the_whole_text_with_capitals_first():
    assert ordered("alpha", ["b", "a z", "a b", "B"]) == (3, 2, 1, 0)


def test_wordings_are_as_many_as_specified_and_all_different():
    assert (len(set(MARKER_WORDINGS)), len(set(PLAIN_WORDINGS))) == (30, 7)
    assert (len(set(MARKER_WORDS)), len(set(MARKER_SHAPES))) == (17, 27)
    assert 5 <= len(set(ORDER_WORDINGS)) <= 9
    assert 5 <= len(set(MASK_WORDINGS)) <= 9


def test_no_mark_looks_like_a_slot_or_a_token():
    """Composed rows pass the hygiene filter (invariant I6), whatever marks were drawn."""
    hygiene = Hygiene(
        HygieneConfig(slots=tuple(word.lower().replace(" ", "_") for pair in MARKER_WORDS for word in pair))
    )
    for shape in MARKER_SHAPES:
        for word in (word for pair in MARKER_WORDS for word in pair):
            for text in (shape.format(word), shape.format(word.lower()), shape.format(word.lower().replace(" ", "_"))):
                turns = ({"role": "user", "content": f"Open with {text}."}, {"role": "assistant", "content": text})
                assert hygiene.keep(Record(source="s", position=0, messages=turns)).keep, text


# --- what is printed, read back by a reader who knows nothing of the composer ----------------------------------------

TAG = re.compile(r"^(?:[(\[<{#]|No\. |Item |Task |Part )?(\d+)[)\]>}]?(?:\.|:| -)[ \n]", re.MULTILINE)
MARKS = (
    r"Open each answer with (.+?) and close it with (.+?)\.(?=[ \n]|$)",
    r"Put (.+?) before each answer and (.+?) after it\.",
    r"Every answer stands between (.+?) and (.+?)\.(?=[ \n]|$)",
    r"Each answer begins with the mark (.+?) and ends with the mark (.+?)\.(?=[ \n]|$)",
    r"Enclose every answer: (.+?) in front, (.+?) at its end\.",
    r"Use (.+?) where an answer starts and (.+?) where it stops\.",
)
SAID = {
    "order": [
        (r"in reverse, from", lambda texts, found: list(range(len(texts)))[::-1]),
        (r"sorted alphabetically by", lambda texts, found: sorted(range(len(texts)), key=texts.__getitem__)),
        (r"alphabetically backwards", lambda texts, found: sorted(range(len(texts)), key=texts.__getitem__)[::-1]),
        (r"fewest words to the most", lambda texts, found: by(texts, lambda t: t.count(" "))),
        (r"most words to the fewest", lambda texts, found: by(texts, lambda t: -t.count(" "))),
        (r"fewest characters to the most", lambda texts, found: by(texts, len)),
        (r"most characters to the fewest", lambda texts, found: by(texts, lambda t: -len(t))),
        (r"odd numbers first", lambda texts, found: by(texts, key=None, index=lambda i: i % 2)),
        (r"even numbers first", lambda texts, found: by(texts, key=None, index=lambda i: (i + 1) % 2)),
        (r"order of their numbers: ([^a-zA-Z]+)", lambda texts, found: [n - 1 for n in numbers(found[1])]),
    ],
    "mask": [
        (r"with these numbers: ([^a-zA-Z]+)", lambda texts, found: [n - 1 for n in numbers(found[1])]),
        (
            r"the (\d+) with the most words",
            lambda texts, found: by(texts, lambda t: -t.count(" "))[: int(found[1])],
        ),
        (r"the (\d+) with the fewest words", lambda texts, found: by(texts, lambda t: t.count(" "))[: int(found[1])]),
        (r"those with odd numbers", lambda texts, found: list(range(0, len(texts), 2))),
        (r"those with even numbers", lambda texts, found: list(range(1, len(texts), 2))),
    ],
}


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text.split("\n")[0])]


def by(texts, key, index=None):
    """Bubble sort: stable by nature, and no code of the composer's."""
    items = list(range(len(texts)))
    value = index or (lambda i: key(texts[i]))
    for _ in items:
        for j in range(len(items) - 1):
            if value(items[j]) > value(items[j + 1]):
                items[j], items[j + 1] = items[j + 1], items[j]
    return items


def tagged(text):
    """[(number, what follows it up to the next tag)]."""
    found = list(TAG.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    return [(int(match[1]), text[match.end() : end].strip("\n")) for match, end in zip(found, ends, strict=True)]


def read_back(instruction, response, vocabulary):
    """(expected, given) numbered answers, by what the instruction says."""
    texts = [next(word for word in vocabulary if text.startswith(word)) for _, text in tagged(instruction)]
    expected = list(range(len(texts)))
    for kind, rules in SAID.items():
        for pattern, follow in rules:
            if found := re.search(pattern, instruction):
                picked = follow(texts, found)
                expected = picked if kind == "order" else [i for i in expected if i not in picked]
    marks = next((found for pattern in MARKS if (found := re.search(pattern, instruction))), None)
    answers = []
    for number, text in tagged(response):
        if marks is not None:
            assert text.startswith(marks[1])
            assert text.endswith(marks[2])
            text = text[len(marks[1]) : len(text) - len(marks[2])]
        answers.append((number, text))
    return [(i + 1, f"answer of {texts[i]}") for i in expected], answers


def test_a_reader_who_follows_what_is_printed_gets_the_answers():
    rng, seen = random.Random(7), Counter()
    lengths = [f"{'abcdefghijk'[i]}{'z' * (i % 4)}{' w' * ((i * 7) % 3)}." for i in range(11)]
    for _ in range(4000):
        texts = rng.sample(lengths, rng.randint(1, 10))
        mosaic = compose([Pair(t, f"answer of {t}") for t in texts], rng, ("format", "order", "mask"))
        expected, given = read_back(mosaic.instruction, mosaic.response, lengths)
        assert given == expected, mosaic
        seen[mosaic.rule] += 1
    assert set(seen) == {"format", *(f"order.{r}" for r in ORDER_RULES), *(f"mask.{r}" for r in MASK_RULES)}


def test_an_order_answers_all_and_a_mask_all_but_m():
    rng = random.Random(1)
    for _ in range(500):
        k = rng.randint(2, 10)
        pairs = [Pair(f"task {i}", f"r{i}") for i in range(k)]
        order, mask = compose(pairs, rng, ["order"]), compose(pairs, rng, ["mask"])
        assert sorted(order.kept) == list(range(k))
        assert list(mask.kept) == sorted(mask.kept)
        assert 0 < len(mask.kept) < k
        assert compose(pairs[:1], rng, ["order"]).rule == "format"


def test_strategies_are_drawn_evenly():
    rng = random.Random(2)
    pairs = [Pair("a", "b"), Pair("c", "d")]
    drawn = Counter(compose(pairs, rng, ("format", "order", "mask")).rule.split(".")[0] for _ in range(3000))
    assert sum((n - 1000) ** 2 / 1000 for n in drawn.values()) < 13.8  # chi-squared of 2 degrees at p = 0.001


# --- grouping --------------------------------------------------------------------------------------------------------


def rows(count, words=3):
    return [answered(f"question {i} " + "w " * words, f"answer {i}", i) for i in range(count)]


def words_of(text):
    return len(text.split())


def test_every_row_is_used_once_per_epoch_whatever_the_order_of_the_input():
    config = MosaicConfig(epochs=3, block_rows=40, max_tokens=90)
    table = rows(150)
    outcomes = Mosaic(config).across(table, 5, words_of)
    for epoch in (1, 2, 3):
        used = [p for o in outcomes if o.record.meta["mosaic"]["epoch"] == epoch for p in o.record.parents]
        assert sorted(used) == sorted(row.key for row in table)
    assert len({o.record.key for o in outcomes}) == len(outcomes)
    for outcome in outcomes:
        assert outcome.status == "accepted"
        instruction, response = (m["content"] for m in outcome.record.messages)
        assert words_of(f"{instruction}\n{response}") < 90
    shuffled = list(table)
    random.Random(0).shuffle(shuffled)
    assert [o.to_row() | {"score": 0} for o in Mosaic(config).across(shuffled, 5, words_of)] == [
        o.to_row() | {"score": 0} for o in outcomes
    ]


def test_each_epoch_and_each_seed_shuffles_anew():
    def order(seed):
        outcomes = Mosaic(MosaicConfig(epochs=2, grouping="fixed")).across(rows(50), seed, words_of)
        used = [parent for outcome in outcomes for parent in outcome.record.parents]
        return used[:50], used[50:]

    orders = [*order(5), *order(6), [row.key for row in rows(50)]]
    assert len({tuple(used) for used in orders}) == 5
    assert order(5) == order(5)


def test_groups_do_not_cross_blocks():
    whole = MosaicConfig(epochs=1, block_rows=7, grouping="fixed", max_rows=5)
    outcomes = Mosaic(whole).across(rows(21), 0, words_of)
    assert [o.record.meta["mosaic"]["count"] for o in outcomes] == [5, 2] * 3


def test_a_row_that_does_not_fit_is_rejected_and_the_limit_is_strict():
    table = [*rows(4), answered("long " * 60, "no", 4), prompt("no answer", 5)]
    outcomes = Mosaic(MosaicConfig(epochs=2, max_tokens=60)).across(table, 0, words_of)
    ended = Counter((o.status, o.reason) for o in outcomes if o.status == "rejected")
    assert ended == {("rejected", "too_long"): 2, ("rejected", "not_single_turn"): 1}
    made = Mosaic(MosaicConfig(epochs=1)).across(rows(1), 0, words_of)[0].record.messages
    size = words_of(" ".join(m["content"] for m in made))
    for limit, status in ((size, "rejected"), (size + 1, "accepted")):
        assert Mosaic(MosaicConfig(epochs=1, max_tokens=limit)).across(rows(1), 0, words_of)[0].status == status


def test_sizes_are_uniform_and_other_groupings_stay_in_bounds():
    rng = random.Random(3)
    drawn = Counter(group_size("uniform", 10, rng) for _ in range(5000))
    assert set(drawn) == set(range(1, 11))
    assert sum((n - 500) ** 2 / 500 for n in drawn.values()) < 27.9  # chi-squared of 9 degrees at p = 0.001
    for grouping in ("exponential", "pareto", "log_normal", "logistic"):
        sizes = [group_size(grouping, 10, rng) for _ in range(2000)]
        assert min(sizes) >= 1
        assert max(sizes) == 10
        assert len(set(sizes)) > 3
    assert (group_size("fixed", 4, rng), group_size("fill", 4, rng)) == (4, None)


def test_fill_takes_as_many_as_fit():
    config = MosaicConfig(epochs=1, grouping="fill", max_tokens=200, strategies=("format",))
    counts = [o.record.meta["mosaic"]["count"] for o in Mosaic(config).across(rows(100), 0, words_of)]
    assert max(counts) > 10
    assert sum(counts) == 100


def test_one_row_by_itself_ends_as_any_input():
    outcomes = run_one(Mosaic(MosaicConfig(epochs=2)), answered("Name a colour.", "Blue."), lambda *_: "unasked")
    assert [(o.status, o.input_key, o.record.key) for o in outcomes] == [
        ("accepted", "s:0:0", "s:0:0"),
        ("accepted", "s:0:0", "s:0:1"),
    ]


def test_the_known_answers_are_those_of_the_fixtures():
    fixture = json.loads(public_data("methods/data_fixtures.json").read_text())["D21"]
    assert {name.lower(): " ".join(order) for name, order in fixture["order"].items()} == ORDERS
    assert {name.lower(): " ".join(kept) for name, kept in fixture["mask"].items()} == MASKS


@pytest.mark.real
def test_the_stage_starts_no_engine(tmp_path):
    import ray
    from drivers import generate

    from itune_ray.config.generate import GenerateJob
    from itune_ray.engine.host import EngineHost

    host = EngineHost()
    job = GenerateJob.model_validate(
        {
            "name": "m",
            "prompts": [{"type": "playground", "split": "chat", "rows": 60}],
            "teacher": {"model": {"path": "any"}, "engine": {"type": "fake"}},
            "recipe": {"type": "mosaic", "epochs": 2},
        }
    )
    manifest = generate(job, str(tmp_path), host).manifest
    assert manifest["engine_starts"] == host.starts == 0
    assert manifest["funnel"]["accepted"] > 0
    assert not ray.is_initialized(), "nothing here needs Ray"
