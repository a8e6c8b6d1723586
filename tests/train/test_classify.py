"""L-Tuning, prefix and prompt: the loss against a pass per text and label, what a segment sees, what is written."""

import math
from typing import Any

import pytest
import tiny
import torch
from methods import METHODS, config, rows, settings
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, DynamicCache

from itune_ray.data.batches import collate, model_inputs
from itune_ray.data.chat import ChatRenderer
from itune_ray.data.order import PackedTable
from itune_ray.errors import ModelError, TrainError
from itune_ray.model.export import write_adapter
from itune_ray.model.peft import apply_peft, parameter_report
from itune_ray.model.peft.l_tuning import NAME, PROMPT
from itune_ray.model.peft.saved import load_adapted
from itune_ray.model.reward import install_reward_head
from itune_ray.train.loop import train_local
from itune_ray.train.metrics import read_metrics
from itune_ray.train.objectives import build_objective
from itune_ray.train.prepare import prepare_locally

LABELS = METHODS["l_tuning"]["labels"]
FORMS = pytest.mark.parametrize("method", ["l_tuning", "l_tuning_prompt"])
SHAPE = {"batch": 8, "max_length": 40, "packing": True, "pack_length": 300, "micro_batch": 3}


def job_of(folder, method="l_tuning", **overrides):
    return tiny.job(folder, **{**SHAPE, **settings(method), "optimizer": {"type": "adamw", "lr": 3e-3}, **overrides})


def classifier(folder, attention="eager") -> Any:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, attn_implementation=attention)


def adapted(folder, method="l_tuning", attention="eager", **overrides) -> Any:
    model = classifier(folder, attention)
    install_reward_head(model)
    return apply_peft(model, config(method, **overrides), tiny.tokenizer(), 0)


def states_by_hand(model, label):
    """M(y) [N, h], by a pass of its own."""
    ids = torch.tensor([tiny.tokenizer()(LABELS[label], add_special_tokens=False)["input_ids"]])
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]


def prefix_by_hand(model, label):
    """[P, 2 · layers · kv width] of a label, from the definition."""
    own, h = getattr(model, NAME), states_by_hand(model, label)
    pooled = (h @ own.queries.weight.T).softmax(0).T @ h
    inner = torch.tanh(pooled @ own.inner.weight.T + own.inner.bias)
    return inner @ own.outer.weight.T + own.outer.bias


def score_after_a_prompt_by_hand(model, ids, label):
    """w · M(G(M(y)) ⊕ e(x)): one text, one label, plain transformers."""
    own, h = getattr(model, PROMPT), states_by_hand(model, label)
    prompt = torch.tanh(h @ own.inner.weight.T + own.inner.bias) @ own.outer.weight.T + own.outer.bias
    whole = torch.cat([prompt, model.get_input_embeddings()(torch.tensor(ids))])[None]
    return (model.base_model(inputs_embeds=whole).last_hidden_state[0, -1] @ model.score.weight[0]).double()


def score_by_hand(model, ids, label):
    """w · M(x; p): one text, one label, plain transformers."""
    if hasattr(model, PROMPT):
        return score_after_a_prompt_by_hand(model, ids, label)
    prefix, cache = prefix_by_hand(model, label), DynamicCache()
    width = 32  # one key head per layer
    for layer, part in enumerate(prefix.split(2 * width, dim=1)):
        cache.update(*(half[None, None] for half in part.split(width, dim=1)), layer)
    states = model.base_model(input_ids=torch.tensor([ids]), past_key_values=cache).last_hidden_state
    return (states[0, -1] @ model.score.weight[0]).double()


@FORMS
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_texts_score_as_each_text_behind_each_label_alone(folder, tmp_path, attention, method):
    model, job = adapted(folder, method, attention), job_of(folder, method)
    objective = build_objective(job.objective)
    records = rows("l_tuning", 8)
    batch = collate(PackedTable(prepare_locally(job, records, str(tmp_path)).folder).rows(0), pad_id=0)
    assert batch.is_packed
    with torch.no_grad():
        inputs = model_inputs(batch, "mask_4d", torch.float32)
        scores = model(**inputs, labels=batch.labels, token_scores=True, **objective.head_inputs(batch))
        by_key, renderer = {record.key: record for record in records}, ChatRenderer(tiny.tokenizer())
        texts = [by_key[key] for keys in batch.keys for key in keys]
        expected = torch.stack(
            [torch.stack([score_by_hand(model, renderer.prompt_ids(r.prompt), y) for y in range(3)]) for r in texts]
        )
    torch.testing.assert_close(scores.values.view(-1, 3).double(), expected, rtol=1e-4, atol=1e-5)
    right = torch.tensor([LABELS.index(r.response) for r in texts])
    loss = objective(scores, batch)
    target = torch.nn.functional.one_hot(right, 3).double()
    bce = torch.nn.functional.binary_cross_entropy_with_logits(expected, target)
    assert float(loss.terms["entail"]) / objective.units(batch)["entail"] == pytest.approx(float(bce), rel=1e-4)
    assert float(loss.metrics["accuracy"].total) == int((expected.argmax(1) == right).sum())


def test_a_head_of_zeros_costs_log_2(folder, tmp_path):
    job = job_of(folder)
    model = adapted(folder)
    model.score.weight.data.zero_()
    objective = build_objective(job.objective)
    batch = collate(PackedTable(prepare_locally(job, rows("l_tuning", 8), str(tmp_path)).folder).rows(0), pad_id=0)
    inputs = model_inputs(batch, "mask_4d", torch.float32)
    scores = model(**inputs, labels=batch.labels, token_scores=True, **objective.head_inputs(batch))
    assert float(objective(scores, batch).terms["entail"].detach()) / 8 == pytest.approx(math.log(2), rel=1e-6)


@FORMS
def test_only_what_is_made_of_labels_and_the_head_are_trained(folder, method):
    model = adapted(folder, method)
    names = {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    hidden, width = 64, 16
    queries, out = (3 * hidden, 2 * 2 * 32) if method == "l_tuning" else (0, hidden)
    assert names == {NAME if method == "l_tuning" else PROMPT, "score"}
    expected = queries + hidden * width + width + width * out + out + hidden
    assert parameter_report(model).trainable == expected


@pytest.mark.parametrize(("method", "steps"), [("l_tuning", 30), ("l_tuning_prompt", 90)])
def test_it_learns(folder, tmp_path, method, steps):
    outcome = train_local(job_of(folder, method, steps=steps), rows("l_tuning", 64), str(tmp_path))
    metrics = read_metrics(str(tmp_path))
    assert metrics[0]["loss"] > 0.6
    assert metrics[-1]["loss"] < 0.5
    assert sum(row["accuracy"] for row in metrics[-5:]) / 5 > 0.6 > 1 / 3
    assert outcome.model_path is None


@FORMS
def test_a_saved_adapter_scores_as_it_did(folder, tmp_path, method):
    model, job = adapted(folder, method), job_of(folder, method)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    write_adapter(model, tiny.tokenizer(), str(tmp_path / "adapter"), base_path=str(folder))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert f"{NAME if method == 'l_tuning' else PROMPT}.states" in saved  # M(y), as the adapter was trained with
    fresh = classifier(folder)
    install_reward_head(fresh)
    fresh.score.weight.data.zero_()  # the adapter brings its own
    loaded: Any = load_adapted(fresh, str(tmp_path / "adapter"))
    batch = collate(PackedTable(prepare_locally(job, rows("l_tuning", 8), str(tmp_path)).folder).rows(0), 0)
    asked = {**model_inputs(batch, "mask_4d", torch.float32), "labels": batch.labels, "token_scores": True}
    asked |= build_objective(job.objective).head_inputs(batch)
    with torch.no_grad():
        assert torch.equal(loaded(**asked).values, model(**asked).values)


def test_rows_without_one_of_the_labels_are_quarantined(folder, tmp_path):
    records = [*rows("l_tuning", 4), tiny.chat("apple", "rocket", position=4)]
    prepared = prepare_locally(job_of(folder), records, str(tmp_path / "answers"))
    assert (prepared.accepted, prepared.rejected) == (4, {"unknown_label": 1})
    told = [
        tiny.chat("apple", "anything", position=0, meta={"kind": "stone"}),
        tiny.chat("river", "anything", position=1),
    ]
    job = job_of(folder, objective={"type": "classify", "field": "kind"})
    prepared = prepare_locally(job, told, str(tmp_path / "field"))
    assert (prepared.accepted, prepared.rejected) == (1, {"no_label": 1})
    with pytest.raises(TrainError, match=r"no row is left.*unknown_label.*model\.peft\.labels"):
        prepare_locally(job_of(folder), records[4:], str(tmp_path / "none"))


def test_method_and_objective_need_each_other(folder):
    with pytest.raises(ValidationError, match=r"need each other.*got l_tuning and sft"):
        tiny.job(folder, **{"model.peft": METHODS["l_tuning"]})
    with pytest.raises(ValidationError, match="got full and classify"):
        tiny.job(folder, objective={"type": "classify"})
    with pytest.raises(ValidationError, match="labels must differ"):
        config("l_tuning", labels=["yes", "yes"])


def test_a_label_without_a_token_is_refused(folder):
    with pytest.raises(ModelError, match=r"a label has no token.*model\.peft\.labels"):
        adapted(folder, labels=["yes", ""])
