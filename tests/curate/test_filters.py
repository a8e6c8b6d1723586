"""Filters: what each keeps, under which reason the rest goes, and the figures of the literature."""

import json
import math
import pickle
from typing import Any, get_args

import pytest
from testdata import public_data

from itune_ray.config.base import validate
from itune_ray.config.curate import AnyFilter, CurateJob
from itune_ray.curate.filters import FILTERS, load_filter
from itune_ray.curate.filters.base import RowFilter, Seen, Verdict
from itune_ray.curate.filters.human_rating import HumanRating, wilson
from itune_ray.data.records import Record
from itune_ray.errors import ConfigError, DataError


def configured(**config: Any) -> Any:
    """The filter of a job file's section."""
    job = {"name": "x", "inputs": [{"source": {"type": "file", "path": "x"}}], "filters": [config]}
    return load_filter(validate(CurateJob, job, "x").filters[0])


def row(answer: str | None = "a", prompt: str = "q", position: int = 0, **facts: Any) -> Record:
    turns = [("user", prompt)] + ([] if answer is None else [("assistant", answer)])
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Record(source="s", position=position, messages=messages, **facts)


def test_the_registry_is_the_union():
    union = {cls.model_fields["type"].default for cls in get_args(get_args(AnyFilter)[0])}
    assert set(FILTERS) == union


@pytest.mark.parametrize(
    "config",
    [
        {"type": "length"},
        {"type": "finish_reason"},
        {"type": "refusal"},
        {"type": "grader"},
        {"type": "human_rating"},
        {"type": "custom", "import_path": f"{__name__}:Shouting"},
    ],
)
def test_row_filters_travel_to_workers_even_after_use(config):
    made = configured(**config)
    verdict = made.keep(row("HELLO"))
    again = pickle.loads(pickle.dumps(made))
    assert isinstance(again, RowFilter)
    assert again.keep(row("HELLO")).keep == verdict.keep
    assert again.identity() == made.identity()


# --- length, finish reason -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "prompt", "reason"),
    [
        ("12345", "abc", None),
        ("1234567890", "abcdef", None),
        ("1234", "abc", "short_response"),
        ("  1234  ", "abc", "short_response"),
        ("12345678901", "abc", "long_response"),
        ("12345", "ab", "short_prompt"),
        ("12345", "abcdefg", "long_prompt"),
        (None, "abc", None),
        (None, "a", "short_prompt"),
    ],
)
def test_length(answer, prompt, reason):
    made = configured(type="length", min_response=5, max_response=10, min_prompt=3, max_prompt=6)
    assert made.keep(row(answer, prompt)).reason == reason


def test_length_of_a_text_is_that_of_an_answer():
    made = configured(type="length", min_response=2, max_response=3, min_prompt=5)
    assert made.keep(Record(source="s", position=0, text="abc")).keep
    assert made.keep(Record(source="s", position=0, text="abcd")).reason == "long_response"


def test_system_turns_are_no_prompt():
    messages = ({"role": "system", "content": "x" * 99}, *row("answer", "q").messages)
    made = configured(type="length", max_prompt=5)
    assert made.keep(Record(source="s", position=0, messages=messages)).keep


@pytest.mark.parametrize(("finish", "keep"), [("stop", True), (None, True), ("length", False)])
def test_finish_reason(finish, keep):
    verdict = configured(type="finish_reason").keep(row(finish_reason=finish))
    assert verdict.keep is keep
    assert verdict.reason == (None if keep else "finish_length")


# --- refusal -------------------------------------------------------------------------------------------------------

REFUSALS = [
    "I can't help with that.",
    "I’m sorry, but I cannot assist with this request.",
    "As an AI language model, I have no body.",
    "Sorry. I am not able to provide instructions for that.",
    "I won't\n do that.",
    "Je suis désolé, mais je ne peux pas vous aider.",
    "En tant qu’IA, je n'ai pas d'avis.",
    "Lo siento, pero no puedo ayudarte con eso.",
    "No es ético. Me niego a responder.",
    "NO PUEDO PROPORCIONAR esa información.",
    "It's not appropriate or ethical to discuss this.",
    "Il n'est pas approprié de fournir ces détails.",
]
ANSWERS = [
    "The bird can't help but sing.",
    "I am an animal lover.",
    "I cannot wait to see you!",
    "You can help with that.",
    "I can help with that.",
    "He said to his aide: provide more.",
    "Como iaia, la abuela cocina.",
    "Je peux vous aider.",
    "In a letter it is not appropriate to use slang.",
    "I am unable to attend the meeting tomorrow.",
    "No puedo creerlo, qué bonito.",
    "",
]


@pytest.mark.parametrize("answer", REFUSALS)
def test_refusals_are_found(answer):
    assert configured(type="refusal").keep(row(answer)).reason == "refusal"


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_are_no_refusals(answer):
    assert configured(type="refusal").keep(row(answer)).keep


def test_only_the_head_of_the_final_answer_is_read():
    made = configured(type="refusal")
    assert made.keep(row("Fine.", "Translate: I can't help with that.")).keep
    assert made.keep(row("x" * 200 + " I can't help with that.")).keep
    earlier = ({"role": "user", "content": "q"}, {"role": "assistant", "content": REFUSALS[0]}, *row("Sure.").messages)
    assert made.keep(Record(source="s", position=0, messages=earlier)).keep


def test_own_phrases_are_added_at_word_boundaries():
    made = configured(type="refusal", phrases=["Not My Job"])
    assert not made.keep(row("Well, that's not my  job!")).keep
    assert made.keep(row("not my jobs")).keep


def test_a_share_of_all_rows_stays_as_refusals_whatever_the_order():
    made = configured(type="refusal", keep_share=0.1)
    records = [row(REFUSALS[0] if i % 2 else "Sure.", position=i) for i in range(60)]

    def reprieved(order: list[Record]) -> frozenset[str]:
        return made.settle(Seen(order, [made.keep(r).keep for r in order], [math.nan] * 60)).reprieved

    kept = reprieved(records)
    assert len(kept) == 6
    assert kept == reprieved(records[::-1])
    assert kept != {records[i].key for i in range(1, 12, 2)}
    assert made.settles
    assert not configured(type="refusal").settles


# --- human rating --------------------------------------------------------------------------------------------------


def rated(*ratings: Any, position: int = 0) -> Record:
    return row(position=position, meta={"ratings": list(ratings)})


def settle(made: HumanRating, records: list[Record]) -> dict[str, Any]:
    verdicts = [made.keep(record) for record in records]
    return dict(made.settle(Seen(records, [v.keep for v in verdicts], [v.score for v in verdicts])).facts["q_manual"])


def test_q_manual_of_the_methods_example():
    ratings, tau, q, (low, high) = (5, 4, 3, 5, 2, 4, 4, 1), 4, 0.625, (0.3057, 0.8632)
    facts = settle(
        configured(type="human_rating", threshold=(tau - 1) / 4), [rated(r, position=i) for i, r in enumerate(ratings)]
    )
    assert facts["value"] == q
    assert facts["n"] == 8
    assert (facts["low"], facts["high"]) == pytest.approx((low, high), abs=1e-4)


def test_q_manual_equals_the_fixture():
    fixture = json.loads(public_data("methods/data_fixtures.json").read_text())["D01"]
    made = configured(type="human_rating", threshold=(fixture["tau"] - 1) / 4)
    facts = settle(made, [rated(r, position=i) for i, r in enumerate(fixture["ratings"])])
    assert facts["value"] == fixture["Q_manual"]
    assert [facts["low"], facts["high"]] == pytest.approx(fixture["wilson95"], abs=1e-4)


def test_q_manual_falls_with_the_threshold():
    records = [rated(r, position=i) for i, r in enumerate((1, 2, 3, 4, 5, 5, 3, 2))]
    values = [settle(configured(type="human_rating", threshold=t / 20), records)["value"] for t in range(21)]
    assert values == sorted(values, reverse=True)
    assert values[0] == 1


def test_scales_are_made_comparable_and_raters_told_apart():
    mixed = [
        rated({"value": 9, "scale_min": 0, "scale_max": 10, "rater": "ann"}, {"value": 2, "rater": "bob"}),
        rated({"value": 70, "scale_min": 0, "scale_max": 100, "rater": "ann"}, position=1),
    ]
    made = configured(type="human_rating", threshold=0.6)
    assert made.keep(mixed[0]) == Verdict(False, "low_rating", pytest.approx((0.9 + 0.25) / 2))
    facts = settle(made, mixed)
    assert facts["raters"] == {"ann": {"value": 1.0, "n": 2}, "bob": {"value": 0.0, "n": 1}}


def test_a_mean_at_the_threshold_passes_whatever_its_rounding():
    made = configured(type="human_rating", threshold=0.7)
    third = {"scale_min": 0, "scale_max": 1}
    assert made.keep(rated(*({"value": v, **third} for v in (0.6, 0.7, 0.8)))).keep


def test_unrated_rows_stay_and_are_no_part_of_n():
    facts = settle(
        configured(type="human_rating"), [rated(5), row(position=1), rated(position=2), rated(1, position=3)]
    )
    assert (facts["n"], facts["unrated"], facts["value"]) == (2, 2, 0.5)
    assert configured(type="human_rating").keep(row()).keep


@pytest.mark.parametrize(
    "rating", [6, 0, "good", None, {"value": 3, "scale_min": 3, "scale_max": 3}, {"rater": "x"}, math.nan]
)
def test_a_rating_off_its_scale_is_a_bad_rating(rating):
    assert configured(type="human_rating").keep(rated(rating)).reason == "bad_rating"


def test_a_missed_q_min_stops_the_job():
    made = configured(type="human_rating", q_min=0.5)
    good = [rated(5, position=i) for i in range(40)]
    settle(made, good)
    with pytest.raises(DataError, match=r"Q_manual is 0\.625 over 8.*0\.5.*q_min"):
        settle(made, [rated(r, position=i) for i, r in enumerate((5, 4, 3, 5, 2, 4, 4, 1))])
    with pytest.raises(DataError, match="0 rated rows"):
        settle(made, [row()])


def test_wilson_at_the_edges():
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-12)
    assert wilson(10, 10)[1] == pytest.approx(1)
    assert all(map(math.isnan, wilson(0, 0)))


# --- grader, custom ------------------------------------------------------------------------------------------------


def length_grader(prompt: str, reply: str, meta: dict[str, Any]) -> float:
    if reply == "boom":
        raise ValueError("no\nreply")
    return math.nan if reply == "?" else len(reply) / meta["of"]


def test_a_grader_of_the_users_scores_rows():
    made = configured(type="grader", grader=f"{__name__}:length_grader", threshold=0.5)
    assert made.keep(row("12345", meta={"of": 10})) == Verdict(True, score=0.5)
    assert made.keep(row("1234", meta={"of": 10})) == Verdict(False, "wrong_answer", 0.4)
    assert made.keep(row("?", meta={"of": 10})).reason == "ungradable"
    assert made.keep(row("boom", meta={"of": 10})).failure == "ValueError: no reply"
    assert made.keep(row(None)).reason == "no_answer"
    assert made.identity()["source"].startswith("source:")


def test_the_playground_grades_its_own_answers_right():
    from itune_ray.playground.sets import rows

    made = configured(type="grader")
    records = list(rows("chat", 40, 5))
    assert all(made.keep(record).keep for record in records)
    wrong = records[0].messages[0]["content"]
    assert made.keep(row("surely wrong", wrong)) == Verdict(False, "wrong_answer", 0.0)
    unknown = made.keep(row("x", "what is the meaning of it all"))
    assert unknown.reason == "ungradable"
    assert math.isnan(unknown.score)


def test_an_unknown_grader_is_named():
    with pytest.raises(ConfigError, match="did you mean 'playground'"):
        configured(type="grader", grader="playgroud")


class Shouting:
    def __init__(self, limit: int = 3):
        self.limit = limit

    def keep(self, record: Record) -> bool:
        if record.response == "boom":
            raise RuntimeError("odd row")
        return not (record.response or "").isupper() or len(record.response or "") <= self.limit


class Silent:
    def keep(self, record: Record) -> str:
        return "yes"


def test_a_filter_of_the_users():
    made = configured(type="custom", import_path=f"{__name__}:Shouting", args={"limit": 2})
    assert made.keep(row("fine")).keep
    assert made.keep(row("LOUD")).reason == "shouting"
    assert made.keep(row("boom")).failure == "RuntimeError: odd row"


@pytest.mark.parametrize(
    ("path", "args", "message"),
    [
        (f"{__name__}:Nothing", {}, "cannot import"),
        (f"{__name__}:Shouting", {"n": 1}, "do not fit"),
        (f"{__name__}:Record", {"source": "s", "position": 0}, "no method keep"),
    ],
)
def test_a_filter_that_cannot_work_is_known_before_any_row(path, args, message):
    with pytest.raises(ConfigError, match=message):
        configured(type="custom", import_path=path, args=args)


def test_a_filter_that_returns_nonsense_fails_its_rows():
    made = configured(type="custom", import_path=f"{__name__}:Silent")
    assert made.keep(row()).failure == "keep returned str, not a Verdict or a bool"


# --- minhash settings ----------------------------------------------------------------------------------------------


def test_minhash_says_what_it_will_find():
    facts = configured(type="minhash_dedup").facts()
    assert (facts["bands"], facts["rows"]) == (32, 4)
    assert facts["recall_at_threshold"] >= 0.99
    given = configured(type="minhash_dedup", bands=25, rows=5).facts()
    assert given["recall_at_threshold"] == pytest.approx(0.990, abs=5e-4)
    weighted = configured(type="minhash_dedup", threshold=0.9, bands=5, rows=25).facts()
    assert weighted["recall_at_threshold"] == pytest.approx(0.31, abs=0.005)


@pytest.mark.parametrize("given", [{"bands": 5}, {"rows": 5}, {"bands": 20, "rows": 9}])
def test_minhash_settings_that_cannot_work(given):
    with pytest.raises(ConfigError, match=r"minhash_dedup needs both|exceeds the signature"):
        configured(type="minhash_dedup", **given)


def test_named_raters_of_the_same_rows_are_compared():
    def rated(*values: tuple[str, int]) -> dict[str, Any]:
        return {"meta": {"ratings": [{"rater": rater, "value": value} for rater, value in values]}}

    made = configured(type="human_rating", threshold=0.5)
    rows = [
        row(position=0, **rated(("ann", 5), ("bob", 5))),
        row(position=1, **rated(("ann", 1), ("bob", 1), ("bob", 3))),
        row(position=2, **rated(("ann", 4), ("bob", 4))),
        row(position=3, **rated(("ann", 2))),
        row(position=4, meta={"ratings": [9]}),
    ]
    verdicts = [made.keep(record) for record in rows]
    seen = Seen(rows, [v.keep for v in verdicts], [v.score for v in verdicts])
    agreement = made.settle(seen).facts["agreement"]
    assert (agreement["units"], agreement["raters"]) == (3, 2)
    assert agreement["percent_agreement"] == pytest.approx(2 / 3), "bob's two ratings of row 1 are one of 2"
    assert 0.8 < agreement["alpha"] < 1
    unnamed = row(meta={"ratings": [5, 1]})
    assert "agreement" not in made.settle(Seen([unnamed], [True], [0.5])).facts


class Unserialisable:
    def keep(self, record: Record) -> Verdict:
        return Verdict(True, meta={"record": record})


def test_facts_of_a_custom_filter_must_be_json():
    verdict = configured(type="custom", import_path=f"{__name__}:Unserialisable").keep(row())
    assert verdict.failure is not None
    assert "no JSON" in verdict.failure
