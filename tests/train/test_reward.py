"""The reward model: its loss against TRL's trainer, its head, and what transformers makes of the export."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from oracle import assert_same_gradients, our_steps, trl_steps
from ranks import STRATEGIES, run_ranks
from transformers import AutoModelForSequenceClassification

from itune_ray.config.objectives import RewardConfig
from itune_ray.config.train import TrainJob
from itune_ray.data.batches import Batch, collate
from itune_ray.data.chat import ChatRenderer
from itune_ray.data.order import PackedTable
from itune_ray.data.records import Record
from itune_ray.errors import ModelError
from itune_ray.model.logprobs import TokenScores
from itune_ray.model.reward import initial_head, install_reward_head, own_padding
from itune_ray.train.documents import MARGIN
from itune_ray.train.loop import train_local, train_rank
from itune_ray.train.metrics import read_metrics
from itune_ray.train.objectives.reward import Reward, last_tokens
from itune_ray.train.prepare import prepare_locally

REWARD = {"type": "reward"}
PAD: Any = tiny.tokenizer().pad_token_id
HELD_OUT = {"validation": {"data": [{"source": {"type": "playground", "split": "chat", "rows": 1}}]}}


def reward_job(folder: Path, **overrides: Any) -> Any:
    settings = {"objective": REWARD, "batch": 8, "steps": 3, "micro_batch": 3, "packing": True, "clip_norm": None}
    return tiny.job(folder, **{**settings, **overrides})


def figures(stage: Path) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in read_metrics(str(stage))]


def texts(row: Record) -> list[list[int]]:
    """Token ids of the chosen and the rejected chat, as their template ends them."""
    other = replace(row, messages=(*row.prompt, {"role": "assistant", "content": row.rejected or ""}))
    return [ChatRenderer(tiny.tokenizer()).record_ids(chat).input_ids for chat in (row, other)]


def scored(model: Any, rows: list[Record]) -> torch.Tensor:
    """[P, 2] rewards by plain transformers, all texts in one padded batch."""
    ids = [torch.tensor(text) for row in rows for text in texts(row)]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
    with torch.no_grad():
        return model(input_ids=padded, attention_mask=mask).logits.view(-1, 2)


def reward_folder(folder: Path, out: Path) -> Path:
    """A reward model that has a head already."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    torch.manual_seed(5)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    model.save_pretrained(out)
    tiny.tokenizer().save_pretrained(out)
    return out


def test_three_steps_equal_trls_trainer(folder, tmp_path):
    """Loss and every gradient, with margins and centred rewards, from a model that has its head."""
    trl = pytest.importorskip("trl")
    start = reward_folder(folder, tmp_path / "start")
    rows = [replace(row, meta={"lead": 0.25 * (row.position % 3)}) for row in tiny.pairs(8)]
    data = [
        {"chosen_ids": chosen, "rejected_ids": rejected, "margin": row.meta["lead"]}
        for row, (chosen, rejected) in ((row, texts(row)) for row in rows)
    ]
    model = AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32)
    settings = {"center_rewards_coefficient": 0.1, "disable_dropout": True, "model": model}
    theirs = trl_steps(trl.RewardTrainer, trl.RewardConfig, start, tmp_path / "trl", data, **settings)
    objective = {**REWARD, "margin": "lead", "center": 0.1}
    ours = our_steps(reward_job(start, objective=objective, micro_batch=2), rows, tmp_path / "ours")
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=2e-4)
    assert [row["reward_accuracy"] for row in ours] == pytest.approx([row["accuracy"] for row in theirs])
    for mine, other in zip(ours, theirs, strict=True):
        assert_same_gradients(mine["gradients"], other["gradients"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_rows_have_the_rewards_of_texts_alone(folder, tmp_path, attention):
    start = reward_folder(folder, tmp_path / "start")
    prepared = prepare_locally(reward_job(start), tiny.pairs(8), str(tmp_path / "stage"))
    rows = PackedTable(prepared.folder).rows(0)
    batch = collate(rows, pad_id=0)
    assert batch.is_packed
    assert len(rows) < 8
    model: Any = AutoModelForSequenceClassification.from_pretrained(start, attn_implementation=attention)
    install_reward_head(model)
    from itune_ray.data.batches import model_inputs

    inputs = model_inputs(batch, "mask_4d", torch.float32)
    with torch.no_grad():
        values = model(**inputs, labels=batch.labels, token_scores=True, value_at=last_tokens(batch)).values
    by_key = {row.key: row for row in tiny.pairs(8)}
    expected = scored(model, [by_key[key] for keys in batch.keys for key in keys])
    torch.testing.assert_close(values.view(-1, 2), expected, rtol=1e-4, atol=1e-5)


def batch_of_values(margin: float) -> Batch:
    flat = torch.zeros(1, 4, dtype=torch.int64)
    return Batch(flat, flat, flat, flat, (2,), (("a:0:0",),), {MARGIN: torch.tensor([margin])})


@pytest.mark.parametrize(
    ("values", "margin", "center", "loss", "accuracy"),
    [
        ([1.5, 1.5], 0.0, 0.0, math.log(2), 0.5),
        ([2.0, 1.0], 1.0, 0.0, math.log(2), 1.0),
        ([0.0, 1.0], 0.5, 0.0, math.log1p(math.exp(1.5)), 0.0),
        ([2.0, 1.0], 1.0, 0.1, math.log(2) + 0.9, 1.0),
    ],
)
def test_known_answers(values, margin, center, loss, accuracy):
    objective = Reward(RewardConfig(center=center))
    nothing = torch.zeros(0)
    found = objective(TokenScores(nothing, nothing, values=torch.tensor(values)), batch_of_values(margin))
    total = sum(c * float(found.terms[name]) for name, c in objective.coefficients.items())
    assert total == pytest.approx(loss, rel=1e-6)
    assert float(found.metrics["reward_accuracy"].total) == accuracy


@pytest.mark.parametrize("peft", [{"type": "full"}, {"type": "lora", "rank": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_export_scores_held_out_pairs_as_the_run_did(folder, tmp_path, peft, strategy):
    held_out = tiny.pairs(34)[24:]
    overrides = {"model.peft": peft, "strategy": {"type": strategy}, "steps": 12}
    job = reward_job(folder, **overrides, **HELD_OUT, optimizer={"type": "adamw", "lr": 3e-3})
    outcome = train_local(job, tiny.pairs(24), str(tmp_path), held_out=held_out)
    first, last = (json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines())
    model = AutoModelForSequenceClassification.from_pretrained(str(outcome.model_path))
    rewards = scored(model, held_out)
    margin = rewards[:, 0] - rewards[:, 1]
    assert float(margin.mean()) == pytest.approx(last["reward_margin"], rel=1e-3)
    assert float((margin > 0).double().mean()) == pytest.approx(last["reward_accuracy"])
    assert last["n"] == 10
    assert last["low"] <= last["reward_accuracy"] <= last["high"]
    assert last["reward_accuracy"] > first["reward_accuracy"], "it learns that repeated words lose"
    assert model.config.architectures == ["LlamaForSequenceClassification"]
    assert model.config.num_labels == 1
    if peft["type"] == "full":
        assert outcome.adapter_path is None
        return
    from peft import PeftModel

    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(outcome.adapter_path))
    adapted.config.pad_token_id = model.config.pad_token_id
    torch.testing.assert_close(scored(adapted.eval(), held_out), rewards, rtol=1e-3, atol=1e-4)


def test_a_fresh_head_is_a_function_of_the_seed(folder, tmp_path):
    """Whichever way the weights are loaded, and however they are sharded."""
    runs = {"ddp": {}, "fsdp2": {"strategy": {"type": "fsdp2"}}, "other seed": {"seed": 1}}
    for name, overrides in runs.items():
        train_local(reward_job(folder, **overrides), tiny.pairs(24), str(tmp_path / name))
    assert figures(tmp_path / "fsdp2")[0] == pytest.approx(figures(tmp_path / "ddp")[0], rel=1e-5)
    assert figures(tmp_path / "other seed")[0] != pytest.approx(figures(tmp_path / "ddp")[0], rel=1e-3)
    assert float(initial_head((1, 4095), 0).std()) == pytest.approx(1 / 64, rel=0.05)


def train(job: Any, stage: str) -> list[tuple[float, float]]:
    train_rank(job, prepare_locally(job, [], stage), stage)
    return figures(Path(stage))


@pytest.mark.real
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_divided_work_gives_the_same_figures(folder, tmp_path, strategy):
    """One process and nothing packed, against two ranks, packed rows and one row a micro-batch; and one rank idle."""
    objective = {**REWARD, "center": 0.1}
    for batch, rows in ((8, 24), (1, 1)):
        one, two = tmp_path / f"one-{batch}", tmp_path / f"two-{batch}"
        plain = reward_job(folder, objective=objective, batch=batch, packing=False, micro_batch=8)
        train_local(plain, tiny.pairs(rows), str(one))
        job = reward_job(
            folder, objective=objective, batch=batch, pack_length=320, micro_batch=1, strategy=STRATEGIES[strategy]
        )
        prepare_locally(job, tiny.pairs(rows), str(two))
        (found, _) = run_ranks(2, train, job, str(two))
        torch.testing.assert_close(found, figures(one), rtol=1e-5, atol=1e-7)


def test_a_run_that_pauses_goes_on_as_the_whole(folder, tmp_path):
    job = reward_job(folder, **{"model.peft": {"type": "lora", "rank": 4}})
    train_local(job, tiny.pairs(24), str(tmp_path / "whole"))
    train_local(job, tiny.pairs(24), str(tmp_path / "parts"), stop_at=2)
    train_local(job, tiny.pairs(24), str(tmp_path / "parts"))
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")


def test_a_fresh_model_can_be_a_reward_model(folder, tmp_path):
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    init = {"config": {**config, "num_attention_heads": 2}, "tokenizer": str(folder)}
    tree = reward_job(folder, steps=1).model_dump()
    job = TrainJob.model_validate({**tree, "model": {"init": init, "attention": "eager"}})
    outcome = train_local(job, tiny.pairs(8), str(tmp_path))
    assert AutoModelForSequenceClassification.from_pretrained(str(outcome.model_path)).config.num_labels == 1


def test_rows_without_a_margin_are_quarantined(folder, tmp_path):
    given = ({"lead": 1}, {"lead": "much"}, {}, {"lead": True}, {"lead": float("nan")})
    rows = [replace(row, meta=meta) for row, meta in zip(tiny.pairs(5), given, strict=True)]
    job = reward_job(folder, objective={**REWARD, "margin": "lead"})
    prepared = prepare_locally(job, rows, str(tmp_path))
    assert (prepared.accepted, prepared.rejected) == (1, {"no_margin": 4})


def test_padding_that_ends_texts_is_not_given_to_transformers():
    words = tiny.tokenizer()
    assert own_padding(words) == words.pad_token_id
    words.pad_token = words.eos_token
    assert own_padding(words) is None


def test_muon_leaves_the_head_to_adamw(folder, tmp_path):
    from itune_ray.config.optimizer import MuonConfig
    from itune_ray.train.optimizer import build_optimizers

    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    muon, _ = build_optimizers(model, MuonConfig()).optimizers
    assert all(p is not model.score.weight for group in muon.param_groups for p in group["params"])


def test_an_adapter_to_continue_is_one_line(folder):
    settings = {"model.adapter": "somewhere", "model.peft": {"type": "lora"}}
    with pytest.raises(ValueError, match="objective reward starts from a whole model"):
        reward_job(folder, **settings)


def test_a_model_without_a_scalar_head_is_one_line(folder):
    from transformers import AutoModelForCausalLM

    with pytest.raises(ModelError, match="no scalar head"):
        install_reward_head(AutoModelForCausalLM.from_pretrained(folder))


def test_an_export_names_the_architecture_and_not_its_sharding(folder, tmp_path):
    job = tiny.job(folder, steps=1, strategy={"type": "fsdp2"})
    outcome = train_local(job, tiny.chats(16), str(tmp_path))
    assert json.loads((Path(str(outcome.model_path)) / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]
