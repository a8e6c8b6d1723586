"""Soft preference labels: known answers, both orders, and labelers that are biased, truthful, silent or undecided."""

import asyncio
import dataclasses
import json
import math
import random
from collections import Counter

import pytest
from pydantic import ValidationError
from scripted import Scripted, answered, last_turn, llm, prompt
from testdata import public_data

from itune_ray.config.recipes import PreferenceLabelConfig
from itune_ray.config.shared import ModelRef
from itune_ray.engine.base import Completion, Sample
from itune_ray.errors import ConfigError
from itune_ray.generate.recipes import preference_label
from itune_ray.generate.recipes.preference_label import (
    PreferenceLabel,
    direct_score,
    option_ids,
    p_first,
    position_bias,
    soft_label,
    total_of,
)
from itune_ray.model.render import model_renderer

TOKENIZER = model_renderer(ModelRef(path="playground://base")).tokenizer
A, B = (TOKENIZER(letter, add_special_tokens=False)["input_ids"][0] for letter in "AB")
GOOD, BAD = "It is seven.", "It is a fish."
ROW = answered("How many days has a week?", GOOD, rejected=BAD, model="writer@1", seed=5)


def shown_first(turn: str) -> str:
    return turn.split("[Answer A ", 1)[1].split("]\n", 1)[1].split("\n", 1)[0]


class Labeler(Scripted):
    """Gives each option a log-probability by what is shown first; replies to all else with reasons.

    `known`: the tokens whose log-probability it gives.
    """

    def __init__(self, log_probs, known=(A, B)):
        super().__init__(lambda turn, index: "The first is longer.")
        self._log_probs, self._known = log_probs, known

    @property
    def texts(self):
        """Prompts so far, as text."""
        return [TOKENIZER.decode(list(request.token_ids)) for request in self.asked if request.token_ids]

    def _complete(self, request):
        if request.token_ids is None:
            return super()._complete(request)
        self.asked.append(request)
        if isinstance(reply := self._script("", 0), Exception):
            return Completion(id=request.id, error=str(reply), retryable=True)
        values = dict(zip((A, B), self._log_probs(shown_first(TOKENIZER.decode(list(request.token_ids)))), strict=True))
        entry = {token: value for token, value in values.items() if token in self._known}
        entries = (None, *[{}] * (len(request.token_ids) - 2), entry)
        first = {token: entry[token] for token in request.sampling.logprob_token_ids if token in entry}
        sample = Sample(text="A", token_ids=(A,), finish_reason="length", logprobs=({**first, 3: -9.0},))
        return Completion(id=request.id, samples=(sample,), prompt_token_ids=request.token_ids, prompt_logprobs=entries)


def truthful(first: str) -> tuple[float, float]:
    return (-0.1, -3.0) if first == GOOD else (-3.0, -0.1)


def always_first(first: str) -> tuple[float, float]:
    return (-0.2, -1.7)


def labelled(log_probs=truthful, row=ROW, engine=None, **config):
    recipe = PreferenceLabel(PreferenceLabelConfig(**config))
    (outcome,) = asyncio.run(recipe(row, llm(engine or Labeler(log_probs))))
    assert outcome.input_key == row.key
    return outcome


def exchanged(row):
    turns = (*row.prompt, {"role": "assistant", "content": row.rejected})
    return dataclasses.replace(row, messages=turns, rejected=row.response)


def facts(outcome):
    return outcome.record.meta["preference_label"]


def test_known_answers():
    fixture = json.loads(public_data("methods/data_fixtures.json").read_text())["D14_D15"]
    one, two = tuple(fixture["order1_logp"]), tuple(fixture["order2_logp"])
    assert [p_first(one), 1 - p_first(one)] == pytest.approx(fixture["order1_p"], abs=1e-12)
    assert [p_first(two), 1 - p_first(two)] == pytest.approx(fixture["order2_p_positions"], abs=1e-12)
    assert soft_label(one, two) == pytest.approx(fixture["avg_p_resp1"], abs=1e-12)
    assert p_first(one) == pytest.approx(0.81757, abs=1e-5)
    low, high = fixture["cot_clamp"]
    assert soft_label(one, (-1.7, -0.2), clamp=high) == high
    assert soft_label((-1.7, -0.2), one, clamp=high) == pytest.approx(low)
    spread = [math.log(fixture["drlaif"]["P"][str(i)]) if 5 <= i <= 9 else -math.inf for i in range(1, 11)]
    assert direct_score(spread) == pytest.approx(fixture["drlaif"]["norm"], abs=1e-6)
    assert direct_score([value + 3 for value in spread]) == pytest.approx(2 * (fixture["drlaif"]["raw"] - 1) / 9 - 1)


def test_distributions_are_averaged_and_not_their_logarithms():
    one, two = (-0.01, -5.0), (-0.7, -0.7)
    assert soft_label(one, two) == pytest.approx((p_first(one) + 0.5) / 2)
    assert soft_label(one, two) != pytest.approx(p_first(((one[0] + two[1]) / 2, (one[1] + two[0]) / 2)), abs=0.05)


def test_exchanging_the_orders_gives_one_minus_p():
    rng = random.Random(0)
    for _ in range(200):
        one, two = ((rng.uniform(-9, 0), rng.uniform(-9, 0)) for _ in range(2))
        assert p_first(one) + p_first(one[::-1]) == pytest.approx(1)
        for clamp in (None, 0.6):
            assert soft_label(one, two, clamp) + soft_label(two, one, clamp) == pytest.approx(1)


def test_the_clamp_comes_after_averaging():
    assert soft_label((-0.01, -5.0), (-0.01, -5.0), clamp=0.6) == pytest.approx(0.5)
    sure, unsure = (-0.01, -5.0), (-0.6, -0.7)
    clamped_first = (0.6 + 1 - p_first(unsure)) / 2
    assert soft_label(sure, unsure, clamp=0.6) == 0.6 != pytest.approx(clamped_first)


def test_a_truthful_labeler_orders_the_row_and_swaps_it_where_needed():
    kept = labelled()
    assert kept.status == "accepted"
    assert (kept.record.response, kept.record.rejected) == (GOOD, BAD)
    assert (kept.record.model, kept.record.seed, kept.record.recipe) == ("writer@1", 5, "preference_label")
    swapped = labelled(row=exchanged(ROW))
    assert (swapped.record.response, swapped.record.rejected) == (GOOD, BAD)
    assert (swapped.record.model, swapped.record.seed) == (None, None), "nobody knows who wrote the other answer"
    assert [facts(o)["swapped"] for o in (kept, swapped)] == [False, True]
    assert [facts(o)["p_chosen"] for o in (kept, swapped)] == pytest.approx([1 / (1 + math.exp(-2.9))] * 2)
    assert facts(kept)["orders"] == {"given_first": [-0.1, -3.0], "given_second": [-3.0, -0.1]}
    assert facts(kept)["labeler"] == "teacher@1"
    assert kept.score == facts(kept)["p_chosen"]


@pytest.mark.parametrize("config", [{}, {"reasons_first": True}])
def test_exchanging_the_answers_gives_one_minus_p(config):
    def uneven(first):
        return (-0.3, -1.5) if first == GOOD else (-0.9, -1.0)

    one, two = labelled(uneven, **config), labelled(uneven, exchanged(ROW), **config)
    p, q = ((1 - f["p_chosen"]) if f["swapped"] else f["p_chosen"] for f in map(facts, (one, two)))
    assert p != 0.5
    assert p + q == pytest.approx(1)
    assert facts(one)["principle"] == facts(two)["principle"]


def test_a_labeler_that_always_takes_the_first_gives_a_half_and_is_told_by_its_bias():
    outcome = labelled(always_first)
    assert (outcome.status, outcome.reason) == ("rejected", "tie")
    assert facts(outcome)["p_chosen"] == 0.5
    orders = [tuple(map(tuple, facts(labelled(by))["orders"].values())) for by in (always_first, truthful)]
    assert position_bias(orders[:1]) == 1.0
    assert position_bias(orders[1:]) == 0.0
    assert position_bias(orders) == 0.5
    assert position_bias([((-1.7, -0.2), (-1.7, -0.2))]) == 1.0, "always the second is a bias as well"
    assert position_bias([((-0.7, -0.7), (-0.2, -1.7))]) == 0.0
    assert math.isnan(position_bias([]))


def test_ties_are_what_is_nearer_to_a_half_than_allowed():
    def slight(first):
        return (math.log(0.53), math.log(0.47)) if first == GOOD else (math.log(0.47), math.log(0.53))

    assert labelled(slight, tie=0.05).reason == "tie"
    assert labelled(slight, tie=0.02).status == "accepted"
    exact = labelled(always_first, tie=0)
    assert (exact.status, exact.record.response) == ("accepted", GOOD)
    with pytest.raises(ValidationError, match="leaves no label"):
        PreferenceLabelConfig(reasons_first=True, tie=0.2)


def test_both_orders_are_asked_for_exactly_the_options_tokens():
    engine = Labeler(truthful)
    labelled(engine=engine)
    assert [shown_first(text) for text in engine.texts] == [GOOD, BAD]
    assert engine.texts[0].split(GOOD)[0] == engine.texts[1].split(BAD)[0], "nothing but the order differs"
    wanted = sorted({token for option in "AB" for token in option_ids(TOKENIZER, option)})
    for request in engine.asked:
        assert list(request.sampling.logprob_token_ids) == wanted
        assert (request.sampling.max_tokens, request.sampling.temperature) == (1, 0.0)


def test_reasons_come_first_greedily_and_the_label_is_clamped():
    engine = Labeler(truthful)
    outcome = labelled(engine=engine, reasons_first=True)
    assert facts(outcome)["p_chosen"] == 0.6
    reasons, choice, *_ = engine.asked
    assert (reasons.sampling.temperature, reasons.sampling.max_tokens) == (0.0, 512)
    assert not reasons.sampling.logprob_token_ids
    assert "A or B" not in last_turn(reasons)
    text = TOKENIZER.decode(list(choice.token_ids))
    assert text.index(last_turn(reasons)[:40]) < text.index("The first is longer.") < text.index("A or B")
    assert len(engine.asked) == 4
    assert facts(labelled(reasons_first=True, clamp=0.8))["p_chosen"] == 0.8


def test_an_option_that_the_engine_says_nothing_of_has_no_label():
    silent = labelled(engine=Labeler(truthful, known=(A,)))
    assert (silent.status, silent.reason) == ("rejected", "no_option")


def test_an_impossible_option_has_no_label():
    outcome = labelled(lambda first: (-math.inf, -0.1))
    assert (outcome.status, outcome.reason) == ("rejected", "no_option")


def test_options_of_several_tokens_are_scored_and_their_first_tokens_unasked(monkeypatch):
    monkeypatch.setattr(preference_label, "option_ids", lambda tokenizer, option: ())
    engine = Labeler(truthful)
    assert facts(labelled(engine=engine))["p_chosen"] == facts(labelled())["p_chosen"]
    assert [request.token_ids[-1] for request in engine.asked] == [A, B, A, B]


def test_an_option_counts_all_its_single_tokens():
    class Tokens:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": {"A": [1], " A": [2], "B": [3], " B": [9, 3]}[text]}

    assert option_ids(Tokens(), "A") == (1, 2)
    assert option_ids(Tokens(), "B") == (3,)
    assert total_of({1: math.log(0.2), 2: math.log(0.3), 3: -1.0}, (1, 2)) == pytest.approx(math.log(0.5))
    assert total_of({3: -1.0}, (1, 2)) is None
    assert total_of({1: -math.inf}, (1,)) is None


@pytest.mark.parametrize(
    ("reason", "row"),
    [
        ("no_pair", answered("q", "a")),
        ("no_pair", answered("q", "a", rejected=" ")),
        ("no_pair", prompt("q", rejected="b")),
        ("equal_answers", answered("q", "a", rejected=" a\n")),
        ("no_prompt", dataclasses.replace(ROW, messages=ROW.messages[1:])),
    ],
)
def test_rows_without_two_answers_are_rejected_unasked(reason, row):
    engine = Labeler(truthful)
    outcome = labelled(engine=engine, row=row)
    assert (outcome.status, outcome.reason) == ("rejected", reason)
    assert not engine.asked
    assert outcome.record.model == row.model


def test_principles_are_drawn_evenly_by_row_and_left_out_on_request():
    rows = [dataclasses.replace(ROW, position=i) for i in range(480)]
    drawn = [facts(labelled(row=row))["principle"] for row in rows]
    counts = Counter(drawn)
    assert len(counts) == 16
    assert sum((n - 30) ** 2 / 30 for n in counts.values()) < 37.7  # χ², 15 degrees, p = 0.001
    assert drawn[:40] == [facts(labelled(row=row))["principle"] for row in rows[:40]]
    assert facts(labelled(criterion="general"))["principle"] is None


def test_principles_of_the_user_are_asked(tmp_path):
    file = tmp_path / "own.json"
    file.write_text('{"principles": [{"id": "short", "question": "Which is shorter?"}]}')
    engine = Labeler(truthful)
    assert facts(labelled(engine=engine, principles=str(file)))["principle"] == "short"
    assert all("Which is shorter?" in text for text in engine.texts)
    file.write_text("{}")
    with pytest.raises(ConfigError, match="wrong at principles: Field required"):
        PreferenceLabel(PreferenceLabelConfig(principles=str(file)))


def test_a_row_that_cannot_be_rendered_is_rejected_with_the_reason():
    token = TOKENIZER.all_special_tokens[0]
    outcome = labelled(row=answered(f"What is {token}?", GOOD, rejected=BAD))
    assert (outcome.status, outcome.reason) == ("rejected", "control_tokens")


def test_a_failed_call_fails_the_row():
    engine = Labeler(truthful)
    engine._script = lambda turn, index: OSError("gone")
    outcome = labelled(engine=engine)
    assert (outcome.status, outcome.cause) == ("failed", "gone")


def test_scores_that_do_not_exist_have_no_mean():
    with pytest.raises(ValueError, match="two or more scores"):
        direct_score([-math.inf, -math.inf])
