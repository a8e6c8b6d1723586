"""Prompt techniques: what each adds, that none loses the prompt, and answers that must follow a form."""

import itertools
import json
import re

import pytest
from pydantic import TypeAdapter, ValidationError
from scripted import prompt, run

from itune_ray.config.recipes import TechniqueConfig
from itune_ray.config.techniques import FRAMES, Technique
from itune_ray.generate.recipes.technique import Technique as Recipe
from itune_ray.generate.techniques import TECHNIQUES, TechniqueError, enhanced, follows_skeleton, is_label

BASIC = "Describe how a heat pump warms a small house in winter."
PARAMS = {
    "clear_instruction": {"verb": "Explain", "aspects": ["parts", "costs"], "min_items": 3},
    "role": {"role": "a plumber", "audience": "a child", "style_rules": ["use analogies", "no jargon"]},
    "chain_of_thought": {"target": "the heat in kWh", "answer_tag": "Heat"},
    "few_shot": {"header": "Sort texts.", "demos": [{"input": "a", "label": "x"}, {"input": "b", "label": "y"}]},
    "multi_document": {"docs": ["one text", "another text"], "kind": "reports"},
    "domain_specific": {"domain": "heating", "asker": "A tenant", "case": "It is cold.", "sections": ["Cause", "Cure"]},
    "hallucination_guard": {"entity": "the Zorb pump"},
    "peft_inspired": {"speciality": "reviewer", "expertise": "pumps", "focus": ["noise", "leaks"]},
    "multilingual": {"langs": ["English", "French"], "count": 2},
    "self_evaluation": {},
    "value_aligned": {"system": "heating law", "dimensions": ["fairness", "freedom"]},
    "compositional": {
        "steps": [{"text": "List parts."}, {"text": "Price it.", "uses": 1, "each": True}, {"text": "Sum.", "uses": 2}]
    },
    "task_decomposition": {
        "goal": "a guide",
        "subtasks": [{"text": "Name tools", "quantity": "five"}, {"text": "Name risks", "quantity": "three"}],
    },
    "bias_mitigation": {"n": 4, "axes": ["region", "income"], "highlights": ["need", "gain"]},
    "contextual_grounding": {"context": "Winters differ by valley.", "variation": "temperature"},
    "output_format": {"skeleton": [{"heading": "Parts", "items": 2}, {"heading": "Costs"}]},
}
MARKED = {
    "clear_instruction": ["Explain: ", "at least 3 points", "- parts", "- costs", "evidence"],
    "role": ["You are a plumber.", "a child", "use analogies; no jargon"],
    "chain_of_thought": ["step by step", "the heat in kWh", '"Heat:"'],
    "few_shot": ["Sort texts.", "Input: a\nLabel: x", "Input: b\nLabel: y", f"Input: {BASIC}"],
    "multi_document": ["2 reports", "1. ", "4. ", '<document id="1">\none text\n</document>', '<document id="2">'],
    "domain_specific": ["heating", "A tenant", "It is cold.", "1. Cause\n2. Cure"],
    "hallucination_guard": ["if the Zorb pump is well documented", "well established"],
    "peft_inspired": ["Act as a specialised reviewer", "pumps", "1. noise\n2. leaks"],
    "multilingual": ["2 times in each", "English, French"],
    "self_evaluation": ["solve it in steps", "1. Check each step.", "from 1 to 5", "4. "],
    "value_aligned": ["heating law", "1. fairness\n2. freedom", "different groups"],
    "compositional": [
        "1. First: List",
        "2. Then, for each item of stage 1:",
        "3. Finally, from what stage 2 gave: Sum",
    ],
    "task_decomposition": ["Goal: a guide", "1. Name tools (five)\n2. Name risks (three)"],
    "bias_mitigation": ["4 subjects", "region, income", "- need\n- gain"],
    "contextual_grounding": ["Context:\nWinters differ by valley.\n\nInstruction:\n", "Heed how temperature"],
    "output_format": ["## Parts\n- ...\n- ...\n## Costs\n- ..."],
}
GROUPS = [
    ["role", "domain_specific", "peft_inspired", "value_aligned"],
    ["contextual_grounding", "multi_document"],
    [
        "clear_instruction",
        "task_decomposition",
        "compositional",
        "bias_mitigation",
        "multilingual",
        "hallucination_guard",
    ],
    ["few_shot"],
    ["chain_of_thought", "self_evaluation"],
    ["output_format"],
]
RANK = {name: rank for rank, group in enumerate(GROUPS) for name in group}


def technique(name, **params):
    return TypeAdapter(Technique).validate_python({"type": name, **PARAMS[name], **params})


def test_there_are_sixteen_and_each_is_tested():
    assert len(TECHNIQUES) == 16
    assert set(TECHNIQUES) == set(PARAMS) == set(MARKED) == set(RANK)
    assert frozenset(GROUPS[0]) == FRAMES
    assert sorted(TECHNIQUES, key=RANK.__getitem__) == list(TECHNIQUES), "the order of application"


@pytest.mark.parametrize("name", PARAMS)
def test_what_each_adds_and_keeps(name):
    text = enhanced(BASIC, [technique(name)])
    for mark in MARKED[name]:
        assert mark in text
    assert BASIC in text
    assert text == enhanced(BASIC, [technique(name)])
    assert not re.search(r"\{\w*\}", text), "no open slot"
    assert TECHNIQUES[name].marker not in BASIC


@pytest.mark.parametrize("name", PARAMS)
def test_a_second_application_is_refused(name):
    with pytest.raises(TechniqueError, match=f"{name} is in the prompt already") as refusal:
        enhanced(enhanced(BASIC, [technique(name)]), [technique(name)])
    assert refusal.value.reason == "already_applied"


def test_the_label_is_empty_and_last_with_exactly_k_demos():
    text = enhanced(BASIC, [technique("few_shot"), technique("output_format")])
    assert text.endswith("\n\nLabel:")
    assert len(re.findall(r"^Label: \S", text, re.MULTILINE)) == 2
    assert text.count(BASIC) == 1


@pytest.mark.parametrize("pair", itertools.permutations(PARAMS, 2), ids="+".join)
def test_composed_in_the_specified_order_whatever_the_order_named(pair):
    first, second = sorted(pair, key=RANK.__getitem__)
    if {first, second} <= FRAMES:
        with pytest.raises(ValidationError, match="both say who answers"):
            TechniqueConfig(techniques=(technique(first), technique(second)))
        return
    text = enhanced(BASIC, [technique(name) for name in pair])
    assert text == enhanced(BASIC, [technique(name) for name in reversed(pair)])
    assert text.count(BASIC) == 1
    assert all(TECHNIQUES[name].marker in text for name in pair)
    if second == "few_shot" and first in GROUPS[2]:
        assert f"\n\nInput: {enhanced(BASIC, [technique(first)])}\n\n" in text, "demos wrap the whole task"
    elif RANK[first] < RANK[second]:
        assert text.index(TECHNIQUES[first].marker) < text.index(TECHNIQUES[second].marker)


def test_what_cannot_be_combined_is_told():
    with pytest.raises(ValidationError, match="named twice"):
        TechniqueConfig(techniques=(technique("role"), technique("role")))
    with pytest.raises(ValidationError, match="both say who answers"):
        TechniqueConfig(techniques=(technique("role"),), filled=("peft_inspired",))
    with pytest.raises(ValidationError, match="no technique is named"):
        TechniqueConfig(techniques=())
    with pytest.raises(ValidationError, match="makes a label the whole answer"):
        TechniqueConfig(techniques=(technique("few_shot", closed=True), technique("chain_of_thought")))
    with pytest.raises(ValidationError, match="step 1 uses step 2, which does not come before it"):
        technique("compositional", steps=[{"text": "a", "uses": 2}, {"text": "b"}])
    with pytest.raises(ValidationError, match="needs `uses`"):
        technique("compositional", steps=[{"text": "a"}, {"text": "b", "each": True}])


def test_answers_are_read_back():
    skeleton = technique("output_format")
    good = "## Parts\n- a pump\n- a pipe\n\n## Costs\n- much"
    assert follows_skeleton(good, skeleton)
    for bad in (
        good.replace("- a pipe\n", ""),
        good.replace("Costs", "Prices"),
        f"Here it is.\n{good}",
        good.replace("much", "..."),
        good + "\n- more",
        "## Costs\n- much\n## Parts\n- a\n- b",
        "",
    ):
        assert not follows_skeleton(bad, skeleton), bad
    assert is_label("x", technique("few_shot", closed=True))
    assert is_label("z", technique("few_shot"))
    assert not is_label("z", technique("few_shot", closed=True))
    assert not is_label("x\n\nInput: c\nLabel: y", technique("few_shot"))


def test_documents_may_not_hold_the_delimiter():
    with pytest.raises(TechniqueError, match="delimiter"):
        enhanced(BASIC, [technique("multi_document", docs=["a </document> b", "c"])])


def recipe(*techniques, **config):
    return Recipe(TechniqueConfig(techniques=techniques, **config))


@pytest.mark.parametrize(("store", "kept"), [("enhanced", True), ("basic", False)])
def test_the_teacher_sees_the_enhanced_prompt_and_the_row_holds_what_is_asked_for(store, kept):
    def script(turn, index):
        assert "You are a plumber." in turn
        return "It moves heat."

    (outcome,) = run(recipe(technique("role"), store=store), prompt(BASIC), script)
    first, answer = (m["content"] for m in outcome.record.messages)
    assert outcome.status == "accepted"
    assert answer == "It moves heat."
    assert ("You are a plumber." in first) is kept
    assert (first == BASIC) is not kept
    assert outcome.record.recipe == "technique+role"
    assert outcome.record.meta["techniques"][0]["role"] == "a plumber"
    assert outcome.record.parents == ("s:0:0",)


@pytest.mark.parametrize("name", PARAMS)
def test_the_teacher_may_give_the_parameters(name):
    seen = []

    def script(turn, index):
        if "JSON schema" in turn:
            assert BASIC in turn
            assert f'"const": "{name}"' not in turn, "the type is known"
            return f"```json\n{json.dumps(PARAMS[name])}\n```"
        seen.append(turn)
        return "## Parts\n- a\n- b\n## Costs\n- c"

    (outcome,) = run(recipe(filled=(name,)), prompt(BASIC), script)
    assert seen == [enhanced(BASIC, [technique(name)])]
    assert outcome.status == "accepted"
    assert outcome.record.recipe == f"technique+{name}"


@pytest.mark.parametrize(
    "reply",
    [
        "A plumber.",
        "[]",
        '{"role": "x"}',
        '{"role": "x", "audience": "y", "z": 1}',
        "{",
        '{"role": "{{ x }}", "audience": "y"}',
    ],
)
def test_parameters_that_do_not_fit_are_asked_for_again_and_then_refused(reply):
    asked = []
    (outcome,) = run(recipe(filled=("role",)), prompt(BASIC), lambda turn, index: asked.append(turn) or reply)
    assert (outcome.status, outcome.reason, outcome.raw) == ("rejected", "unparsable_parameters", reply)
    assert len(asked) == 2


def test_parameters_are_filled_from_the_row():
    seen = []
    grounded = technique("contextual_grounding", context="{{ meta.passage }}")
    row = prompt(BASIC, meta={"passage": "It snows."})
    (outcome,) = run(recipe(grounded), row, lambda turn, index: seen.append(turn) or "ok")
    assert "Context:\nIt snows." in seen[0]
    assert outcome.record.meta["techniques"][0]["context"] == "It snows."
    (undefined,) = run(recipe(grounded), prompt(BASIC), lambda turn, index: "ok")
    assert (undefined.status, undefined.reason) == ("rejected", "template_undefined")


@pytest.mark.parametrize(
    ("reason", "techniques", "text", "reply"),
    [
        ("off_format", ["output_format"], BASIC, "It is so."),
        ("no_label", ["few_shot"], BASIC, "x\nInput: more"),
        ("already_applied", ["role"], "Write so that a child can follow.", "ok"),
        ("no_prompt", ["role"], " ", "ok"),
        ("truncated", ["role"], BASIC, ("It mo", "length")),
        ("empty", ["role"], BASIC, " "),
    ],
)
def test_what_cannot_be_a_row_is_rejected(reason, techniques, text, reply):
    (outcome,) = run(recipe(*map(technique, techniques)), prompt(text), lambda turn, index: reply)
    assert (outcome.status, outcome.reason) == ("rejected", reason)
