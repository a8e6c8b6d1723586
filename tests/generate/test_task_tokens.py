"""Control tokens: one id each, never typed by users, never learned as answers, and left out as often as asked."""

import importlib.resources
from collections import Counter

import pytest
from pydantic import ValidationError
from scripted import answered, prompt, run
from transformers import AutoTokenizer

from itune_ray.config.recipes import TaskTokensConfig
from itune_ray.data.chat import ChatRenderer
from itune_ray.generate.recipes.task_tokens import TaskTokens, defused

NAMES = {"length": ("short", "long"), "task": ("sum", "sort")}
META = {"task": "sum", "length": "short", "other": 1}


def recipe(**config):
    return TaskTokens(TaskTokensConfig(**{"names": NAMES, "dropout": 0.0, **config}))


def one(row, **config):
    def unasked(turn, index):
        raise AssertionError("asked")

    (outcome,) = run(recipe(**config), row, unasked)
    return outcome


@pytest.mark.parametrize(
    ("form", "place", "expected"),
    [
        ("text", "user", ["[task: sum] [length: short]\nAdd 2 and 3.", "5"]),
        ("special", "user", ["<|task:sum|> <|length:short|>\nAdd 2 and 3.", "5"]),
        ("text", "system", ["[task: sum] [length: short]", "Add 2 and 3.", "5"]),
    ],
)
def test_tokens_stand_before_the_prompt_in_a_fixed_order(form, place, expected):
    row = answered("Add 2 and 3.", "5", meta=META, model="human@1")
    outcome = one(row, form=form, place=place)
    assert [m["content"] for m in outcome.record.messages] == expected
    assert outcome.record.messages[0]["role"] == place
    assert (outcome.record.key, outcome.record.parents, outcome.record.model) == (row.key, (row.key,), "human@1")
    assert len(outcome.record.meta["task_tokens"]) == 2


def test_a_system_message_is_kept():
    turns = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add."})
    outcome = one(prompt(messages=turns, meta={"task": "sum"}), place="system")
    assert [m["content"] for m in outcome.record.messages] == ["[task: sum]\nBe brief.", "Add."]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (prompt("Add.", meta={"task": "multiply"}), "unknown_task"),
        (prompt("Add.", meta={"other": 1}), "no_attribute"),
        (prompt(" ", meta=META), "no_prompt"),
        (answered("Add.", "It is [task: sum] 5.", meta=META), "token_in_answer"),
        (answered("Add.", "<|length:long|> 5.", meta=META), "token_in_answer"),
    ],
)
def test_what_the_registry_does_not_have_is_rejected(row, reason):
    outcome = one(row)
    assert (outcome.status, outcome.reason) == ("rejected", reason)


def test_names_come_from_other_keys_of_meta():
    assert one(prompt("Add.", meta={"family": "sort"}), keys={"task": "family"}).record.messages[0]["content"] == (
        "[task: sort]\nAdd."
    )


def test_what_a_user_types_is_defused():
    typed = "Do <|task:sort|> and [length: long], [2] and <|end|> stay."
    assert defused(typed) == "Do (task:sort) and (length: long), [2] and <|end|> stay."
    content = one(prompt(typed, meta=META), form="special").record.messages[0]["content"]
    assert content.count("<|task:") == 1
    assert content.startswith("<|task:sum|> <|length:short|>\nDo (task:sort)")


def test_the_share_without_tokens_is_the_dropout_and_is_by_row():
    made = recipe(dropout=0.1)
    outcomes = [o for i in range(2000) for o in run(made, prompt("Add.", i, meta=META), lambda *_: "")]
    counts = Counter(bool(o.record.meta["task_tokens"]) for o in outcomes)
    assert abs(counts[False] - 200) < 4 * (2000 * 0.1 * 0.9) ** 0.5
    assert made.facts(outcomes) == {"added_tokens": [], "without_tokens": counts[False]}
    assert all(o.record.messages[0]["content"] == "Add." for o in outcomes if not o.record.meta["task_tokens"])
    assert run(made, prompt("Add.", 7, meta=META), lambda *_: "")[0].record == outcomes[7].record


def test_each_special_token_is_one_id_and_none_is_learned():
    folder = importlib.resources.files("itune_ray.playground") / "models" / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokens = recipe(form="special").facts([])["added_tokens"]
    assert tokens == ["<|task:sum|>", "<|task:sort|>", "<|length:short|>", "<|length:long|>"]
    assert tokenizer.add_tokens(tokens) == 4
    ids = {token: tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens}
    assert all(len(found) == 1 for found in ids.values())
    assert [tokenizer.decode(found) for found in ids.values()] == tokens
    record = one(answered("Add 2 and 3.", "5", meta=META), form="special").record
    rendered = ChatRenderer(tokenizer).record_ids(record)
    supervised = {token for token, flag in zip(rendered.input_ids, rendered.supervised, strict=True) if flag}
    added = {found[0] for found in ids.values()}
    assert len(added & set(rendered.input_ids)) == 2
    assert supervised
    assert not added & supervised


def test_names_that_would_break_a_token_are_refused():
    with pytest.raises(ValidationError, match="pattern"):
        TaskTokensConfig(names={"task": ("a|b",)})
    with pytest.raises(ValidationError, match="at least 1"):
        TaskTokensConfig(names={})
