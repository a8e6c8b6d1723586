"""Templates: every one renders, shows all it should and nothing it asks for, and labels mean what they say (D40)."""

import asyncio
import itertools
import re
from collections import Counter
from typing import Any

import jinja2
import jinja2.meta
import pytest
from pydantic import TypeAdapter
from testdata import public_data

from itune_ray.config.base import validate
from itune_ray.config.generate import GenerateJob
from itune_ray.config.recipes import RecipeConfig
from itune_ray.config.shared import FileSource
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.data.sources import read_source
from itune_ray.engine.llm import no_llm
from itune_ray.engine.templates import render
from itune_ray.errors import ConfigError
from itune_ray.generate.recipes import load_recipe
from itune_ray.generate.recipes.base import builtin_prompt
from itune_ray.generate.recipes.templates import SHOWS, TASKS, closed, label_text, shown_options, split_templates

ALL = [(task, name) for task in TASKS for name in split_templates(builtin_prompt("templates", f"{task}.jinja"))]
EXAMPLES = [{"input": f"in{i}", "output": f"out{i}", "explanation": f"why{i}"} for i in (1, 2)]
FIELDS: dict[str, Any] = {
    "definition": "Mark the verb.",
    "input": "Birds sing.",
    "first": "It rains.",
    "second": "The road is wet.",
    "question": "Which one?",
    "context": "Three stones lay in a row.",
    "text": "So good!",
    "answer": "The third.",
    "options": "- red\n- green",
    "positive": EXAMPLES,
    "negative": [{"input": "in9", "output": "out9", "explanation": "why9"}],
}


def template(task: str, name: str) -> str:
    return split_templates(builtin_prompt("templates", f"{task}.jinja"))[name]


def fields(**meta: Any) -> Record:
    return Record(source="s", position=0, meta=meta)


def made(row: Record, seed: int = 0, **config: Any) -> list[Outcome]:
    recipe = load_recipe(TypeAdapter(RecipeConfig).validate_python({"type": "templates", **config}))
    return asyncio.run(recipe(row, no_llm(seed, "generate")))


def reason(row: Record, **config: Any) -> str | None:
    (outcome,) = made(row, **config)
    return outcome.reason


# --- the templates -------------------------------------------------------------------------------------------------


def test_there_are_ten_of_each_task_and_no_two_are_alike():
    assert Counter(task for task, _ in ALL) == dict.fromkeys(TASKS, 10)
    texts = [template(task, name) for task, name in ALL]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(("task", "name"), ALL)
def test_a_template_shows_what_it_should_and_never_what_it_asks_for(task, name):
    used = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(template(task, name)))
    assert used <= SHOWS[task]
    assert used >= SHOWS[task] - {"positive", "negative"}


@pytest.mark.parametrize("bare", [False, True], ids=["all fields", "least fields"])
@pytest.mark.parametrize(("task", "name"), ALL)
def test_a_template_renders_without_stray_characters(task, name, bare):
    empty = {"context": "", "options": "", "positive": [], "negative": []} if bare else {"context": "Three stones."}
    values = {slot: {**FIELDS, **empty}[slot] for slot in SHOWS[task]}
    text = render(template(task, name), **values).strip()
    for slot in SHOWS[task] - {"positive", "negative"}:
        assert text.count(values[slot]) == 1 or not values[slot]
    assert not re.search(r"[{}%#]|\|\|\||None|\bn\n|\n{3}|[ \t]\n|  |\[\]", text), text


@pytest.mark.parametrize(("task", "name"), ALL)
def test_fields_of_one_line_are_recovered_from_what_was_rendered(task, name):
    slots = [slot for slot in SHOWS[task] if slot not in ("positive", "negative")]
    marks = {**{slot: f"@{slot}@" for slot in slots}, "positive": [], "negative": []}
    shown = {slot: marks[slot] for slot in SHOWS[task]}
    skeleton = re.escape(render(template(task, name), **shown).strip())
    lines = {"options": r"- [^\n]+(?:\n- [^\n]+)*"}
    for slot in slots:
        skeleton = skeleton.replace(f"@{slot}@", f"(?P<{slot}>{lines.get(slot, '.+?')})")
    text = render(
        template(task, name), **{slot: {**FIELDS, **marks}.get(slot) for slot in shown} | {s: FIELDS[s] for s in slots}
    )
    match = re.fullmatch(skeleton, text.strip(), re.DOTALL)
    assert match is not None
    assert match.groupdict() == {slot: FIELDS[slot] for slot in slots}


# --- labels --------------------------------------------------------------------------------------------------------

OPTIONS = ["cat", "dog", "eel"]


@pytest.mark.parametrize(
    ("label", "options", "kind", "means"),
    [
        (1, OPTIONS, "auto", "dog"),
        ("1", OPTIONS, "auto", "dog"),
        ("dog", OPTIONS, "auto", "dog"),
        (" dog ", OPTIONS, "auto", "dog"),
        ("B", OPTIONS, "auto", "dog"),
        ("b", OPTIONS, "auto", "dog"),
        ("2", ["2", "1", "0"], "index", "0"),
        ("2", ["2", "1", "0"], "text", "2"),
        (2, ["2", "1", "0"], "auto", "0"),
        ("0", ["0", "1"], "auto", "0"),
    ],
)
def test_a_label_means_an_option(label, options, kind, means):
    assert label_text(label, options, kind) == means


@pytest.mark.parametrize(
    ("label", "options", "why"),
    [
        (-1, OPTIONS, "no_label"),
        ("-1", OPTIONS, "no_label"),
        (3, OPTIONS, "no_label"),
        ("D", OPTIONS, "no_label"),
        ("cow", OPTIONS, "no_label"),
        (True, OPTIONS, "no_label"),
        ("1", ["1", "0", "2"], "ambiguous_label"),
        (0, ["same", "same"], "bad_options"),
        (0, [str(i) for i in range(27)], "bad_options"),
        (0, [["x"]], "bad_options"),
    ],
)
def test_a_label_that_means_none_is_rejected(label, options, why):
    assert reason(fields(question="q", options=options, label=label)) == why


def test_options_are_shuffled_and_the_answer_follows():
    orders, styles = Counter(), Counter()
    for seed in range(300):
        (outcome,) = made(fields(question="Which one swims?", choices=OPTIONS, answer="C"), seed)
        prompt, answer = (m["content"] for m in outcome.record.messages)
        order, style = outcome.record.meta["shown_options"], outcome.record.meta["option_style"]
        orders[tuple(order)] += 1
        styles[style] += 1
        assert sorted(order) == OPTIONS
        assert answer == (f"{'ABC'[order.index('eel')]}) eel" if style == "letters" else "eel")
        assert shown_options(order, style) in prompt
        assert ("eel" in prompt) is (style != "none")
    assert len(orders) == 6
    assert min(orders.values()) > 25
    assert min(styles.values()) > 70


# --- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("meta", "task"),
    [
        ({"definition": "d", "input": "i", "references": ["o"]}, "task"),
        ({"premise": "p", "hypothesis": "h", "label": 0, "options": ["yes", "no"]}, "pair"),
        ({"question": "q", "choices": ["a", "b"], "answer": 1}, "choice"),
        ({"QUESTION": "q", "context": "c", "answer": "a"}, "question"),
        ({"text": "t", "label": "x", "options": ["x", "y"]}, "classify"),
    ],
)
def test_columns_tell_the_task(meta, task):
    (outcome,) = made(fields(**meta))
    assert outcome.status == "accepted"
    assert (outcome.record.meta["task_type"], outcome.record.meta["template"].split("/")[0]) == (task, task)
    assert outcome.record.meta.items() >= meta.items()


@pytest.mark.parametrize(
    ("meta", "config", "why"),
    [
        ({"other": "x"}, {}, "no_task"),
        ({"question": "q", "answer": " "}, {}, "no_answer"),
        ({"question": "q"}, {"task": "question"}, "no_answer"),
        ({"question": "", "choices": ["a"], "answer": 0}, {}, "no_question"),
        ({"text": "t", "label": 0}, {"task": "classify"}, "no_options"),
        ({"definition": "d", "input": "i", "references": [" "]}, {}, "no_answer"),
        ({"definition": "d", "input": "i"}, {}, "no_answer"),
        (
            {"question": "q", "a": "x"},
            {"task": "choice", "columns": {"options": ["a", "b"], "label": ["a"]}},
            "no_options",
        ),
    ],
)
def test_rows_that_fill_no_template_end_with_a_reason(meta, config, why):
    assert reason(fields(**meta), **config) == why


def test_columns_and_labels_of_your_own():
    row = fields(premise="It rained.", choice1="Wet.", choice2="Dry.", ask="effect", label=0)
    columns = {"question": ["premise"], "options": ["choice1", "choice2"], "context": ["ask"]}
    (outcome,) = made(row, task="choice", columns=columns, option_styles=["list"])
    assert outcome.record.response == "Wet."
    assert "effect" in outcome.record.prompt[0]["content"]
    (outcome,) = made(fields(text="t", label=1), task="classify", options=["bad", "good"], option_styles=["none"])
    assert outcome.record.response == "good"


def test_the_question_is_the_answer_of_the_inverted_task():
    (outcome,) = made(fields(question="Who sang?", answer="The bird did."), task="inverted")
    assert outcome.record.response == "Who sang?"
    assert "The bird did." in outcome.record.prompt[0]["content"]
    assert "Who sang?" not in outcome.record.prompt[0]["content"]


def test_a_chat_is_a_question_and_its_answer():
    messages = ({"role": "user", "content": "Who sang?"}, {"role": "assistant", "content": "The bird."})
    (outcome,) = made(Record(source="s", position=0, messages=messages, model="m"))
    assert outcome.record.response == "The bird."
    assert "Who sang?" in outcome.record.messages[0]["content"]
    assert (outcome.record.model, outcome.record.parents, outcome.record.recipe) == (None, ("s:0:0",), "templates")


def test_templates_are_drawn_evenly_and_without_repetition():
    row = fields(question="q", answer="a")
    used = Counter(o.record.meta["template"] for seed in range(300) for o in made(row, seed, samples=4))
    assert len(used) == 10
    assert max(used.values()) < 1.35 * min(used.values())
    outcomes = made(row, samples=10)
    assert len({o.record.meta["template"] for o in outcomes}) == 10
    assert [o.record.key for o in outcomes] == [f"s:0:{i}" for i in range(10)]
    assert len(made(row, samples=12)) == 12


def test_the_same_seed_and_row_give_the_same_rows():
    rows = [fields(question=f"q{i}", choices=OPTIONS, answer=i % 3) for i in range(20)]
    assert [made(row, 5, samples=2) for row in rows] == [made(row, 5, samples=2) for row in rows]
    assert [made(row, 5) for row in rows] != [made(row, 6) for row in rows]


def test_examples_are_shown_within_the_budget():
    meta = {
        "definition": "Do it",
        "input": "now",
        "references": ["one", "two"],
        "positive": EXAMPLES,
        "negative": EXAMPLES,
    }
    texts = {}
    for seed, (most, chars) in itertools.product(range(60), ((2, 4096), (0, 4096), (2, 30))):
        (outcome,) = made(fields(**meta), seed, positive=most, max_chars=chars)
        texts.setdefault((most, chars), []).append(outcome.record.messages[0]["content"])
    assert any("out1" in text and "out2" in text for text in texts[2, 4096])
    assert not any("Right" in text for text in texts[0, 4096])
    assert not any("in2" in text for text in texts[2, 30])
    assert any("in1" in text for text in texts[2, 30])
    assert all("Do it." in text and "now." in text for text in texts[2, 4096])
    answers = {made(fields(**meta), seed)[0].record.response for seed in range(30)}
    assert answers == {"one", "two"}


def test_punctuation_is_added_where_there_is_none():
    assert [closed(text) for text in ("a", "a.", "a?", "", "a)")] == ["a.", "a.", "a?", "", "a)"]


def test_long_fields_are_cut():
    (outcome,) = made(fields(question="q" * 9000, answer="a"), max_chars=100)
    assert outcome.record.messages[0]["content"].count("q" * 100) == 1
    assert "q" * 101 not in outcome.record.messages[0]["content"]


def test_your_own_templates(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("Asked: {{ question }}\n")
    (outcome,) = made(fields(question="q", answer="a"), templates={"question": str(file)})
    assert outcome.record.messages[0]["content"] == "Asked: q"
    assert outcome.record.meta["template"] == "question/own"
    file.write_text("{{ nothing }}")
    assert reason(fields(question="q", answer="a"), templates={"question": str(file)}) == "template_undefined"


# --- public rows and jobs ------------------------------------------------------------------------------------------


def test_tasks_of_natural_instructions_and_questions_of_mmlu():
    tasks = read_source(
        FileSource(path=str(public_data("data/natural_instructions_v2/ni_en_tasks.jsonl.gz")), limit=20)
    )
    for row in tasks.records[::40]:
        (outcome,) = made(row)
        assert outcome.status == "accepted"
        assert outcome.record.response in row.meta["references"]
        assert closed(row.meta["definition"].strip()[:4096]) in outcome.record.messages[0]["content"]
    mmlu = read_source(FileSource(path=str(public_data("data/mmlu/dev.jsonl.gz")), format="fields"))
    columns = {"options": [f"choice{i}" for i in range(4)]}
    ends = Counter()
    for row in mmlu.records:
        (outcome,) = made(row, task="choice", columns=columns, label="index")
        ends[outcome.reason or "accepted"] += 1
        if outcome.status == "accepted":
            right = row.meta[f"choice{row.meta['answer']}"].strip()
            assert (outcome.record.response or "").removeprefix("A) ")[-len(right) :] == right
    assert ends["accepted"] > 0.97 * len(mmlu.records)


def test_a_job_without_a_model_needs_no_teacher_and_others_do():
    tree = {"name": "x", "prompts": [{"type": "file", "path": "x"}]}
    assert validate(GenerateJob, {**tree, "recipe": {"type": "templates"}}, "x").teacher is None
    with pytest.raises(ConfigError, match="respond needs a model"):
        validate(GenerateJob, tree, "x")
    with pytest.raises(ConfigError, match="leave teacher out"):
        validate(GenerateJob, {**tree, "recipe": {"type": "templates"}, "teacher": {"model": {"path": "x"}}}, "x")
    with pytest.raises(ConfigError, match="names none"):
        asyncio.run(no_llm(0, "x").generate([], key="k"))
