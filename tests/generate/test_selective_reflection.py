"""Selective reflection: the truth table over all sign patterns, guards and NaN, and the recipe that fills it."""

import asyncio
import itertools
import json
import math
from dataclasses import replace

import pytest
import tiny
from scripted import Scripted, answered, prompt
from testdata import public_data

from itune_ray.config.recipes import SelectiveReflectionConfig
from itune_ray.config.shared import ModelRef
from itune_ray.engine.base import Completion, Sample, Sampling
from itune_ray.engine.llm import EngineLlm
from itune_ray.generate.recipes.selective_reflection import SelectiveReflection
from itune_ray.generate.selective_reflection import Difficulty, select_version

FIXTURE = json.loads(public_data("methods/data_fixtures.json").read_text())["D12"]
LOW, HIGH = 0.3, 0.6


def scores(q_harder=True, qa_lower=True, a_lower=True):
    """Versions all below 1 with these signs: IFD(Q) > IFD(ori), rIFD(QA) < rIFD(Q), rIFD(A) < rIFD(ori)."""
    return {
        "ori": Difficulty(0.5, HIGH if a_lower else LOW),
        "Q": Difficulty(0.7 if q_harder else 0.4, HIGH if qa_lower else LOW),
        "A": Difficulty(0.5, LOW if a_lower else HIGH),
        "QA": Difficulty(0.7, LOW if qa_lower else HIGH),
    }


def expected(signs):
    for pattern, version in FIXTURE["choice"].items():
        if all(want in ("*", str(int(sign))) for want, sign in zip(pattern.split(","), signs, strict=True)):
            return version
    raise AssertionError(signs)


@pytest.mark.parametrize("signs", itertools.product([True, False], repeat=3), ids=str)
def test_every_sign_pattern(signs):
    version = expected(signs)
    assert select_version(scores(*signs), mode="full") == version
    assert select_version(scores(*signs)) == (version if version in FIXTURE["released_keeps"] else None)


def test_equal_ratios_take_nothing_new():
    same = dict.fromkeys(("ori", "Q", "A", "QA"), Difficulty(0.5, 0.5))
    assert select_version(same, mode="full") == "ori"
    assert select_version(same) is None


@pytest.mark.parametrize("signs", itertools.product([True, False], repeat=3), ids=str)
@pytest.mark.parametrize("ratio", ["ifd", "reversed_ifd"])
def test_the_version_taken_must_be_below_one(signs, ratio):
    raised = {version: replace(s, **{ratio: getattr(s, ratio) + 1}) for version, s in scores(*signs).items()}
    assert select_version(raised, mode="full") is None, "all rise, so the order is the same"


@pytest.mark.parametrize("version", ["ori", "Q", "A", "QA"])
@pytest.mark.parametrize("ratio", ["ifd", "reversed_ifd"])
def test_a_ratio_that_was_not_scored_excludes_the_row(version, ratio):
    for signs in itertools.product([True, False], repeat=3):
        holed = scores(*signs)
        holed[version] = replace(holed[version], **{ratio: math.nan})
        assert select_version(holed, mode="full") is None


# --- the recipe ----------------------------------------------------------------------------------------------------

PAIRS = {
    "ori": ("Name a colour.", "Blue."),
    "Q": ("Name two colours.", "Blue, red."),
    "A": ("Name a colour.", "Blue, as the sky."),
    "QA": ("Name two colours.", "Blue as the sky, red as blood."),
}
ROW = answered(*PAIRS["ori"], model="writer@1", seed=3, finish_reason="stop")


def review(turn: str, _: int) -> str:
    if "[New Instruction]" in turn:
        return f"[New Instruction] {PAIRS['Q'][0]} [End]\n[New Answer] {PAIRS['Q'][1]} [End]"
    better = PAIRS["QA" if PAIRS["Q"][1] in turn else "A"][1]
    return f"[Better Answer] {better} [End]"


class Student(Scripted):
    """Scores so that every ratio is as planned: an answer alone costs 1 per token, after its prompt 1 + ln(ratio)."""

    def __init__(self, planned):
        super().__init__(lambda *_: "")
        self._planned = planned
        self.texts: dict[str, str] = {}

    def _complete(self, request):
        self.asked.append(request)
        *_, version, kind, which, _work = request.id.split("/")
        ratio = getattr(self._planned[version], "ifd" if kind == "ifd" else "reversed_ifd")
        self.texts[f"{version}/{kind}/{which}"] = tiny.tokenizer().decode(list(request.token_ids))
        loss = 1.0 + (math.log(ratio) if which == "conditioned" else 0.0)
        entries = (None, *({token: -loss} for token in request.token_ids[1:]))
        sample = Sample(text="", token_ids=(0,), finish_reason="length")
        return Completion(id=request.id, samples=(sample,), prompt_token_ids=request.token_ids, prompt_logprobs=entries)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("student"))


def made(folder, planned, row=ROW, script=review, **config):
    """The outcome, and the two engines."""
    teacher, student = Scripted(script), Student(planned)
    greedy = Sampling(temperature=0.0)
    llms = {
        name: EngineLlm(engine, model=f"{name}@1", sampling=greedy, stage="generate", ref=ModelRef(path=str(folder)))
        for name, engine in (("teacher", teacher), ("student", student))
    }
    recipe = SelectiveReflection(SelectiveReflectionConfig(**config)).bind({"student": llms["student"]})
    (outcome,) = asyncio.run(recipe(row, llms["teacher"]))
    assert outcome.input_key == row.key
    return outcome, teacher, student


@pytest.mark.parametrize("signs", itertools.product([True, False], repeat=3), ids=str)
@pytest.mark.parametrize("mode", ["released", "full"])
def test_the_recipe_takes_the_version_of_the_truth_table(folder, signs, mode):
    version = expected(signs)
    taken = version if mode == "full" or version in FIXTURE["released_keeps"] else None
    outcome, teacher, _ = made(folder, scores(*signs), mode=mode)
    facts = outcome.record.meta["selective_reflection"]
    planned = {name: pytest.approx([s.ifd, s.reversed_ifd]) for name, s in scores(*signs).items()}
    assert facts["ratios"] == planned
    assert len(teacher.asked) == 3
    if taken is None:
        assert (outcome.status, outcome.reason) == ("rejected", "not_selected")
        return
    assert (outcome.status, facts["version"]) == ("accepted", taken)
    assert tuple(m["content"] for m in outcome.record.messages) == PAIRS[taken]
    assert outcome.record.model == ("writer@1" if taken == "ori" else "teacher@1")


def test_each_version_is_scored_forwards_and_backwards(folder):
    outcome, teacher, student = made(folder, scores())
    assert len(student.texts) == 4 * 2 * 2
    for version, (instruction, answer) in PAIRS.items():
        forwards, alone = student.texts[f"{version}/ifd/conditioned"], student.texts[f"{version}/ifd/direct"]
        assert forwards.index(instruction) < forwards.rindex(answer)
        assert answer in alone
        assert instruction not in alone
        backwards, alone = (student.texts[f"{version}/reversed/{which}"] for which in ("conditioned", "direct"))
        assert backwards.index(answer) < backwards.rindex(instruction), "the guess prompt shows the answer"
        assert instruction in alone
        assert "[Answer" not in alone
    asked = [*teacher.asked, *student.asked]
    read = sum(len(request.token_ids or ()) for request in student.asked)
    assert outcome.record.num_prompt_tokens == read + sum(len(turn.split()) for turn in teacher.turns)
    assert outcome.record.num_tokens == len(student.asked) + sum(len(review(t, 0).split()) for t in teacher.turns)
    assert len({request.id for request in asked}) == len(asked) == 3 + 16


def test_what_cannot_be_decided_has_a_reason(folder):
    silent, *_ = made(folder, scores(), script=lambda turn, _: "It is fine as it is.")
    assert (silent.status, silent.reason, silent.raw) == ("rejected", "not_reflected", "It is fine as it is.")
    unscored = {**scores(), "A": Difficulty(math.inf, 0.5)}
    outcome, *_ = made(folder, unscored)
    assert (outcome.status, outcome.reason) == ("rejected", "not_scored")
    assert outcome.record.meta["selective_reflection"]["ratios"]["A"][0] is None
    json.dumps(outcome.to_row()["meta"], allow_nan=False)
    assert made(folder, scores(), row=prompt("q"))[0].reason == "no_answer"
    failed, *_ = made(folder, scores(), script=lambda *_: OSError("gone"))
    assert (failed.status, failed.cause) == ("failed", "gone")
