"""Recipes against the fake engine: what comes out, and how each input that cannot be answered ends."""

import asyncio
from typing import get_args

import pytest
from pydantic import TypeAdapter

from itune_ray.config.recipes import CustomRecipeConfig, RecipeConfig, RespondConfig
from itune_ray.config.shared import FakeEngineConfig, ModelRef
from itune_ray.data.records import Record
from itune_ray.engine.base import Sampling
from itune_ray.engine.fake import CONTEXT, FakeEngine
from itune_ray.engine.llm import EngineLlm
from itune_ray.errors import ConfigError
from itune_ray.generate.recipes import RECIPES, load_recipe
from itune_ray.generate.recipes.base import recipe_identity

ANSWERED = ({"role": "user", "content": "reverse ate please"}, {"role": "assistant", "content": "eta"})


def prompt(text: str = "Name a colour.", **fields) -> Record:
    return Record(**{"source": "s", "position": 7, "messages": ({"role": "user", "content": text},), **fields})


def respond(row: Record, engine: FakeEngineConfig | None = None, **config):
    sampling = Sampling(temperature=0.7, max_tokens=50)
    llm = EngineLlm(FakeEngine(engine), model="teacher@abc", sampling=sampling, seed=3, stage="generate")
    return asyncio.run(load_recipe(RespondConfig(**config))(row, llm))


def test_registry_equals_the_union():
    (union, _) = get_args(RecipeConfig)
    assert set(RECIPES) | {"custom"} == {kind.model_fields["type"].default for kind in get_args(union)}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("messages", [ANSWERED, ANSWERED[:1]], ids=["answered", "prompt"])
def test_every_input_ends_whatever_the_model_says(name, messages):
    graded = {"scorer": {"type": "grader", "grader": "generate_recipe:first_digit"}}
    settings = {"preference": graded, "best_of_n": graded, "task_tokens": {"names": {"task": ["colour"]}}}
    recipe = load_recipe(TypeAdapter(RecipeConfig).validate_python({"type": name, **settings.get(name, {})}))
    ref = ModelRef(path="playground://base")
    llm = EngineLlm(FakeEngine(), model="m@1", sampling=Sampling(temperature=1.0), ref=ref)
    row = prompt(messages=messages)
    outcomes = asyncio.run(recipe(row, llm))
    assert len(outcomes) == (recipe.rows_per_input or len(outcomes)) > 0
    assert len({outcome.record.key for outcome in outcomes}) == len(outcomes)
    for outcome in outcomes:
        assert outcome.input_key == row.key
        assert outcome.status == "accepted" or outcome.reason
        for field in recipe.provides if outcome.status == "accepted" else ():
            assert getattr(outcome.record, field) not in (None, (), ""), f"{name} provides no {field}"


def test_all_samples_are_kept_with_what_made_them():
    outcomes = respond(prompt(), samples=4)
    assert [o.record.key for o in outcomes] == [f"s:7:{i}" for i in range(4)]
    assert {o.input_key for o in outcomes} == {"s:7:0"}
    assert len({o.record.response for o in outcomes}) == 4
    first = outcomes[0].record
    assert (first.model, first.recipe, first.parents) == ("teacher@abc", "respond", ("s:7:0",))
    assert first.sampling == {"temperature": 0.7, "top_p": 1.0, "top_k": -1, "max_tokens": 50, "stop": []}
    assert [o.record.seed - first.seed for o in outcomes] == [0, 1, 2, 3]


def test_inputs_that_are_samples_themselves_do_not_collide():
    keys = [o.record.key for sample in range(3) for o in respond(prompt(sample=sample), samples=2)]
    assert len(set(keys)) == 6


def test_the_seed_is_of_the_row_and_not_of_the_order():
    again = [respond(prompt(f"question {i}", position=i))[0].record.response for i in range(5)]
    backwards = [respond(prompt(f"question {i}", position=i))[0].record.response for i in reversed(range(5))]
    assert again == backwards[::-1]
    assert respond(prompt(position=1))[0].record.seed != respond(prompt(position=2))[0].record.seed


def test_an_answer_in_the_row_is_replaced():
    answered = prompt(messages=({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "old"}))
    (outcome,) = respond(answered)
    assert [m["role"] for m in outcome.record.messages] == ["user", "assistant"]
    assert outcome.record.response != "old"


@pytest.mark.parametrize(
    "messages", [(), ({"role": "system", "content": "x"},), ({"role": "user", "content": "  "},)], ids=str
)
def test_a_row_that_asks_nothing_is_rejected(messages):
    outcomes = respond(prompt(messages=messages), samples=2)
    assert [(o.status, o.reason) for o in outcomes] == [("rejected", "no_prompt")] * 2


def test_a_prompt_longer_than_the_context_is_rejected_with_its_length():
    outcomes = respond(prompt("word " * 600), samples=2)
    assert [(o.status, o.reason) for o in outcomes] == [("rejected", "prompt_too_long")] * 2
    assert outcomes[0].raw == f"prompt_too_long: 601 tokens, max_model_len {CONTEXT}"


def test_an_engine_error_that_may_pass_is_failed_and_not_rejected():
    outcomes = respond(prompt(), FakeEngineConfig(fail_rate=1.0), samples=2)
    assert [(o.status, o.cause) for o in outcomes] == [("failed", "injected failure")] * 2


def test_an_empty_answer_is_rejected_and_a_cut_one_is_kept():
    assert respond(prompt(), FakeEngineConfig(empty_rate=1.0))[0].reason == "empty"
    (cut,) = respond(prompt(), FakeEngineConfig(truncate_rate=1.0))
    assert (cut.status, cut.record.finish_reason) == ("accepted", "length")


def test_system_and_template(tmp_path):
    file = tmp_path / "user.jinja"
    file.write_text("{{ prompt }} ({{ meta.language }})")
    (outcome,) = respond(prompt(meta={"language": "fr"}), system="Be brief.", template=str(file))
    assert [m["content"] for m in outcome.record.prompt] == ["Be brief.", "Name a colour. (fr)"]
    (missing,) = respond(prompt(), template=str(file))
    assert (missing.status, missing.reason) == ("rejected", "template_undefined")
    own = prompt(messages=({"role": "system", "content": "Mine."}, {"role": "user", "content": "Hi"}))
    assert respond(own, system="Be brief.")[0].record.messages[0]["content"] == "Mine."


def test_a_template_decides_the_identity_by_its_text(tmp_path):
    file = tmp_path / "user.jinja"
    file.write_text("{{ prompt }}")
    plain = recipe_identity(load_recipe(RespondConfig(template=str(file))))
    file.write_text("{{ prompt }}!")
    assert recipe_identity(load_recipe(RespondConfig(template=str(file)))) != plain


def test_wrong_templates_are_told_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match="no such template file"):
        load_recipe(RespondConfig(template=str(tmp_path / "none.jinja")))
    (tmp_path / "bad.jinja").write_text("{{ prompt ")
    with pytest.raises(ConfigError, match=r"not valid Jinja.*line 1"):
        load_recipe(RespondConfig(template=str(tmp_path / "bad.jinja")))


def test_a_custom_recipe_is_found_or_explained():
    assert load_recipe(CustomRecipeConfig(import_path="generate_recipe:Echo", args={"word": "x"})).word == "x"
    with pytest.raises(ConfigError, match="did you mean 'Echo'"):
        load_recipe(CustomRecipeConfig(import_path="generate_recipe:Ecko"))
    with pytest.raises(ConfigError, match="cannot be imported"):
        load_recipe(CustomRecipeConfig(import_path="no_such_module:Echo"))
    with pytest.raises(ConfigError, match="refuses its arguments"):
        load_recipe(CustomRecipeConfig(import_path="generate_recipe:Echo", args={"volume": 1}))
