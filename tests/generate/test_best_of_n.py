"""Best of n: which answer is kept, what is kept of the others, and which prompts give none."""

import pytest
from pydantic import TypeAdapter
from scripted import Scripted, llm, prompt, run

from itune_ray.config.recipes import BestOfNConfig, RecipeConfig
from itune_ray.errors import ConfigError
from itune_ray.generate.recipes.best_of_n import BestOfN

ROW = prompt("reverse stone please")
JUDGED = {"type": "judge", "judge": {"model": {"path": "judge"}, "engine": {"type": "fake"}}}


def length(asked, answer, meta):
    """A grader: longer is better, up to ten characters."""
    return min(len(answer), 10) / 10


def best(*replies, row=ROW, judge=None, **config):
    config = {"scorer": {"type": "grader", "grader": "test_best_of_n:length"}, **config}
    recipe = BestOfN(BestOfNConfig.model_validate({"samples": len(replies), **config}))
    recipe = recipe if judge is None else recipe.bind({"judge": llm(judge)})
    (outcome,) = run(recipe, row, lambda turn, index: replies[index])
    return outcome


def test_the_best_is_kept_with_the_scores_of_all():
    outcome = best("abc", "abcde", "a", "abc")
    assert (outcome.status, outcome.score) == ("accepted", 0.5)
    assert outcome.record.response == "abcde"
    assert outcome.record.meta["best_of_n"]["scores"] == [0.3, 0.5, 0.1, 0.3]
    assert outcome.record.num_tokens == 4
    seeds = [best("abc", "ab").record.seed, best("ab", "abc").record.seed]
    assert seeds[1] - seeds[0] == 1, "a sample's seed is that of its index"


def test_the_exact_grader_of_the_world_is_the_default():
    outcome = best("stone", "enots", scorer={"type": "grader"})
    assert (outcome.record.response, outcome.score) == ("enots", 1.0)


def test_of_equals_the_frequent_one_then_the_earlier_one():
    assert best("abc", "xyz", "xyz").record.response == "xyz"
    assert best("abc", "xyz").record.response == "abc"


@pytest.mark.parametrize(
    ("replies", "reason"),
    [
        ((("abc", "length"), ("abcd", "length")), "truncated"),
        (("", " "), "empty"),
        (("", ("abc", "length")), "truncated"),
    ],
)
def test_without_a_whole_answer_there_is_no_row(replies, reason):
    outcome = best(*replies)
    assert (outcome.status, outcome.reason) == ("rejected", reason)


def test_a_cut_answer_is_never_kept():
    assert best(("abcdef", "length"), "ab").record.response == "ab"


def test_a_least_score_drops_the_prompt():
    assert best("abc", "a", min_score=0.3).status == "accepted"
    outcome = best("abc", "a", min_score=0.31)
    assert (outcome.reason, outcome.score, outcome.record.response) == ("low_score", 0.3, "abc")


def rates(turn, index):
    """Judges by the digit in the answer."""
    answer = turn.split("[Answer ")[1].split("]\n")[1].split("\n")[0]
    return answer if answer.isdigit() else "no idea"


def test_a_judge_decides_and_rates_equal_answers_once():
    judge = Scripted(rates)
    outcome = best("3", "4", "4", "what", judge=judge, scorer=JUDGED)
    assert (outcome.record.response, outcome.score) == ("4", 4.0)
    assert outcome.record.meta["best_of_n"]["scores"] == [3.0, 4.0, 4.0, None]
    assert len(judge.turns) == 3
    assert best("what", "who", judge=judge, scorer=JUDGED).reason == "unscored"


def test_a_guided_judge_sees_the_reference_of_the_row():
    judge = Scripted(lambda turn, index: "5" if "the right one" in turn else "1")
    scorer = {**JUDGED, "reference": "right"}
    row = prompt("Why?", meta={"right": "the right one"})
    assert best("a", "b", row=row, judge=judge, scorer=scorer).score == 5.0
    assert best("a", "b", row=prompt("Why?"), judge=judge, scorer=scorer).reason == "no_reference"


def test_a_broken_judge_or_model_fails_the_row():
    assert best("a", "b", judge=Scripted(lambda *_: OSError("gone")), scorer=JUDGED).cause == "gone"
    assert best("a", OSError("gone")).status == "failed"


def test_bad_input_is_one_line():
    with pytest.raises(ConfigError, match="unknown grader; did you mean 'playground'"):
        BestOfN(BestOfNConfig.model_validate({"scorer": {"type": "grader", "grader": "plaground"}}))
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        TypeAdapter(RecipeConfig).validate_python({"type": "best_of_n", "samples": 1})
