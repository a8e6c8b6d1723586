"""From answers through the ledger to scores."""

import json
import math

import pytest

from itune_ray.benchmarks.base import Benchmark, Grade, Item, Metric, Reply, share
from itune_ray.config.evaluate import BootstrapConfig
from itune_ray.data.intervals import wilson
from itune_ray.data.ledger import Ledger
from itune_ray.data.storage import Folder
from itune_ray.evaluate.answers import MAX_ATTEMPTS, answers_table, cause_of, is_settled, outcome_of
from itune_ray.evaluate.ask import Answer, Question
from itune_ray.evaluate.score import score_benchmark, score_names


class Toy(Benchmark):
    """Right where the reply is `yes`; a second metric is the reply's length."""

    version = "7"
    metrics = (
        Metric("exact_match", "share", share, "right", binary=True),
        Metric("length", "points", share, "characters"),
    )

    def __init__(self, size, failed_as="an empty reply"):
        super().__init__("toy")
        self.size, self.failed_as = size, failed_as

    def items(self):
        return [
            Item(
                key=f"k{i}",
                reference="yes",
                category=f"family {i % 2}",
                text=f"q{i}",
                groups=("every third",) if i % 3 == 0 else (),
            )
            for i in range(self.size)
        ]

    def grade(self, item, reply):
        ok = reply.text == item.reference
        return Grade(
            score=float(ok), ok=ok, sums={"exact_match": (float(ok), 1.0), "length": (float(len(reply.text)), 1.0)}
        )

    def settings(self):
        return {"size": self.size}


def answer(benchmark, position, text, cause=None, retryable=False):
    question = Question(model="m", benchmark="toy", position=position, item=benchmark.items()[position])
    if cause:
        return Answer(question=question, cause=cause, retryable=retryable)
    reply = Reply(text=text)
    return Answer(question=question, reply=reply, grade=benchmark.grade(question.item, reply), num_tokens=1)


def rows_of(tmp_path, answers):
    ledger = Ledger(Folder.at(tmp_path) / "ledger")
    for index in range(0, len(answers), 7):
        ledger.commit([outcome_of(a, 1) for a in answers[index : index + 7]])
    return answers_table(ledger.table()).to_pylist()


def scores_of(tmp_path, benchmark, answers):
    rows = rows_of(tmp_path, answers)
    return score_benchmark(benchmark, benchmark.items(), rows, BootstrapConfig(samples=300), seed=0)


def test_answers_keep_their_order_through_the_ledger(tmp_path):
    benchmark = Toy(25)
    answers = [answer(benchmark, i, f"reply {i}") for i in range(25)]
    rows = rows_of(tmp_path, list(reversed(answers)))
    assert [(row["item"], row["reply"], row["prompt"]) for row in rows] == [
        (f"k{i}", f"reply {i}", f"q{i}") for i in range(25)
    ]
    assert json.loads(rows[3]["sums"])["length"] == [7.0, 1.0]


def test_several_metrics_are_several_scores(tmp_path):
    benchmark = Toy(20)
    scores = scores_of(tmp_path, benchmark, [answer(benchmark, i, "yes" if i < 15 else "no") for i in range(20)])
    assert list(scores) == list(score_names(benchmark)) == ["toy.exact_match", "toy.length"]
    assert scores["toy.exact_match"]["value"] == 0.75
    assert scores["toy.length"]["value"] == pytest.approx((15 * 3 + 5 * 2) / 20)
    assert scores["toy.exact_match"]["settings"] == {"version": "7", "size": 20, "interval": "95%, 300 resamples"}


def test_a_failed_item_counts_as_wrong_and_is_counted(tmp_path):
    benchmark = Toy(20)
    answers = [answer(benchmark, i, "yes") for i in range(18)]
    answers += [answer(benchmark, i, "", cause="prompt_too_long: 900 tokens") for i in (18, 19)]
    score = scores_of(tmp_path, benchmark, answers)["toy.exact_match"]
    assert (score["value"], score["n"], score["failed"]) == (0.9, 20, 2)
    assert score["failed_as"] == "an empty reply"


def test_a_failed_item_can_be_left_out_but_is_counted_all_the_same(tmp_path):
    benchmark = Toy(20, failed_as="left out")
    answers = [answer(benchmark, i, "yes") for i in range(18)]
    answers += [answer(benchmark, i, "", cause="broken") for i in (18, 19)]
    score = scores_of(tmp_path, benchmark, answers)["toy.exact_match"]
    assert (score["value"], score["n"], score["failed"]) == (1.0, 18, 2)


def test_few_or_uniform_items_get_wilsons_interval(tmp_path):
    benchmark = Toy(120)
    scores = scores_of(tmp_path, benchmark, [answer(benchmark, i, "no") for i in range(120)])["toy.exact_match"]
    assert scores["interval"] == "wilson"
    assert (scores["low"], scores["high"]) == pytest.approx(wilson(0, 120))
    assert scores["high"] > 0.02
    mixed = scores_of(tmp_path / "b", benchmark, [answer(benchmark, i, "yes" if i % 4 else "no") for i in range(120)])[
        "toy.exact_match"
    ]
    assert mixed["interval"] == "bootstrap"
    assert mixed["low"] < 0.75 < mixed["high"]
    assert mixed["categories"]["family 0"]["interval"] == "wilson"


def test_slices_partition_the_items(tmp_path):
    benchmark = Toy(30)
    score = scores_of(tmp_path, benchmark, [answer(benchmark, i, "yes" if i % 2 else "no") for i in range(30)])[
        "toy.exact_match"
    ]
    assert {name: (part["value"], part["n"]) for name, part in score["categories"].items()} == {
        "family 0": (0.0, 15),
        "family 1": (1.0, 15),
    }
    assert score["groups"]["every third"]["n"] == 10


def test_scores_are_plain_json(tmp_path):
    benchmark = Toy(3, failed_as="left out")
    scores = scores_of(tmp_path, benchmark, [answer(benchmark, i, "", cause="broken") for i in range(3)])
    text = json.dumps(scores, allow_nan=False)
    assert json.loads(text)["toy.length"]["value"] is None


def test_which_rows_need_no_engine_any_more():
    benchmark = Toy(4)

    def row(answered, attempts):
        return outcome_of(answered, attempts).to_row()

    assert is_settled(row(answer(benchmark, 0, "no"), 1))
    assert is_settled(row(answer(benchmark, 1, "", cause="too long"), 1))
    assert not is_settled(row(answer(benchmark, 2, "", cause="timeout", retryable=True), MAX_ATTEMPTS - 1))
    assert is_settled(row(answer(benchmark, 2, "", cause="timeout", retryable=True), MAX_ATTEMPTS))


def test_equal_causes_are_counted_together():
    assert cause_of("prompt_too_long: 900 tokens, max_model_len 512") == "prompt_too_long"
    assert cause_of("no answer within 600 s (replica 3)") == cause_of("no answer within 60 s (replica 1)")
    assert cause_of(None) is None


def test_a_failed_answer_has_no_grade_in_the_table(tmp_path):
    benchmark = Toy(2)
    rows = rows_of(tmp_path, [answer(benchmark, 0, "yes"), answer(benchmark, 1, "", cause="broken")])
    assert (rows[1]["ok"], rows[1]["reply"], rows[1]["failure"], rows[1]["sums"]) == (None, None, "broken", "{}")
    assert math.isnan(rows[1]["score"])
