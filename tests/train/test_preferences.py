"""Losses over preference pairs against TRL's functions and trainers, the closed forms and known answers."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from oracle import assert_same, batch_of, oracle, ours, pair_job, trl_pairs, trl_steps
from torch import Tensor
from torch.nn.functional import logsigmoid

from itune_ray.config.objectives import IpoConfig, RobustConfig, SimpoConfig
from itune_ray.config.train import TrainJob
from itune_ray.data.batches import Batch, collate
from itune_ray.model.logprobs import TokenScores
from itune_ray.train.loop import train_local
from itune_ray.train.metrics import read_metrics
from itune_ray.train.objectives.dpo import Dpo
from itune_ray.train.objectives.ipo import Ipo
from itune_ray.train.objectives.orpo import log_odds
from itune_ray.train.objectives.pairs import REFERENCE
from itune_ray.train.objectives.robust import Robust
from itune_ray.train.objectives.simpo import Simpo

PACKING = pytest.mark.parametrize("packing", [False, True], ids=["unpacked", "packed"])


def sides(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Values of the chosen and of the rejected segments."""
    return torch.stack(values[0::2]), torch.stack(values[1::2])


def deltas(found: list[Tensor], batch: Batch, per_token: bool = False) -> Tensor:
    """Δw - Δl of every pair."""
    reference = batch.columns[REFERENCE]
    ratios = [
        (values.double().sum() - reference[i]) / (len(values) if per_token else 1) for i, values in enumerate(found)
    ]
    chosen, rejected = sides(ratios)
    return chosen - rejected


@PACKING
def test_cdpo_with_nll_is_the_closed_form(folder, tmp_path, packing):
    job = pair_job(folder, {"type": "dpo", "beta": 0.3, "label_smoothing": 0.1, "nll": 0.5}, packing)
    batch = batch_of(job, tiny.pairs(6), tmp_path)

    def formula(found: list[Tensor]) -> Tensor:
        margin = 0.3 * deltas(found, batch)
        nll = -torch.cat(found[0::2]).mean()
        return (-0.9 * logsigmoid(margin) - 0.1 * logsigmoid(-margin)).mean() + 0.5 * nll

    assert_same(ours(job, folder, batch), oracle(folder, batch, formula))


@PACKING
def test_robust_undoes_the_flips(folder, tmp_path, packing):
    job = pair_job(folder, {"type": "robust", "beta": 0.3, "flipped": 0.2}, packing)
    batch = batch_of(job, tiny.pairs(6), tmp_path)

    def formula(found: list[Tensor]) -> Tensor:
        margin = 0.3 * deltas(found, batch)
        return ((-0.8 * logsigmoid(margin) + 0.2 * logsigmoid(-margin)) / 0.6).mean()

    assert_same(ours(job, folder, batch), oracle(folder, batch, formula))


def test_robust_is_unbiased_under_flips_where_smoothing_is_not():
    robust = Robust(RobustConfig(beta=1.0, flipped=0.2))
    zero, margin = torch.zeros(5), torch.linspace(-2, 2, 5)
    clean = -logsigmoid(margin)
    expected = 0.8 * robust.losses(margin, zero) + 0.2 * robust.losses(-margin, zero)
    torch.testing.assert_close(expected, clean)
    smoothed = Dpo(pair_job(Path("any"), {"type": "dpo", "label_smoothing": 0.2}, False).objective)
    assert not torch.allclose(0.8 * smoothed.losses(margin, zero) + 0.2 * smoothed.losses(-margin, zero), clean)


@PACKING
def test_ipo_is_per_token(folder, tmp_path, packing):
    job = pair_job(folder, {"type": "ipo", "tau": 0.25}, packing)
    batch = batch_of(job, tiny.pairs(6), tmp_path)

    def formula(found: list[Tensor]) -> Tensor:
        return ((deltas(found, batch, per_token=True) - 2.0) ** 2).mean()

    assert_same(ours(job, folder, batch), oracle(folder, batch, formula))


@PACKING
def test_simpo_equals_trls_loss(folder, tmp_path, packing):
    trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    job = pair_job(folder, {"type": "simpo", "beta": 2.5, "gamma": 0.8}, packing)
    batch = batch_of(job, tiny.pairs(6), tmp_path)
    settings = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=0.8, beta=2.5, label_smoothing=0.0, accelerator=CPU
    )

    def formula(found: list[Tensor]) -> Tensor:
        return trainer.cpo_loss(settings, *sides([values.mean() for values in found]))[0].mean()

    assert_same(ours(job, folder, batch), oracle(folder, batch, formula))


@PACKING
def test_orpo_equals_trls_odds_ratio_and_the_likelihood(folder, tmp_path, packing):
    trainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    job = pair_job(folder, {"type": "orpo", "weight": 0.3}, packing)
    batch = batch_of(job, tiny.pairs(6), tmp_path)
    settings = SimpleNamespace(beta=0.3, accelerator=CPU)

    def formula(found: list[Tensor]) -> Tensor:
        ratio = trainer.odds_ratio_loss(settings, *sides([values.mean() for values in found]))[0]
        return -torch.cat(found[0::2]).mean() - ratio.mean()

    assert_same(ours(job, folder, batch), oracle(folder, batch, formula))


CPU = SimpleNamespace(device="cpu")


def test_log_odds_are_exact_at_both_ends():
    p = torch.tensor([1e-30, 0.25, 0.5, 1 - 1e-6], dtype=torch.float64)
    torch.testing.assert_close(log_odds(p.log()), torch.log(p / (1 - p)), rtol=1e-9, atol=1e-12)
    certain = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    odds = log_odds(certain)
    (gradient,) = torch.autograd.grad(odds.sum(), certain)
    assert float(odds.detach()) == pytest.approx(math.log(1e7), rel=1e-6)
    assert float(gradient) == 0.0


def known(objective: Any, log_probs: list[list[float]]) -> float:
    """The loss of one pair whose answers have these tokens, at θ = θ_ref."""
    lengths = [len(values) for values in log_probs]
    flat = torch.tensor([value for values in log_probs for value in values])
    segments = torch.tensor([[0] * (1 + lengths[0]) + [1] * (1 + lengths[1])])
    labels = torch.ones_like(segments)
    labels[0, 0] = labels[0, lengths[0] + 1] = -100
    sums = torch.tensor([sum(values) for values in log_probs], dtype=torch.float64)
    batch = Batch(labels, labels, labels, segments, (2,), (("a:0:0",),), {REFERENCE: sums})
    loss = objective(TokenScores(flat, flat), batch)
    return float(loss.terms[objective.name])


def test_known_answers_where_the_policy_is_its_reference():
    answers = [[-1.0, -2.0], [-0.5, -0.5, -2.0]]
    assert known(Robust(RobustConfig()), answers) == pytest.approx(math.log(2), abs=1e-6)
    assert known(Ipo(IpoConfig(tau=0.25)), answers) == pytest.approx(4.0, abs=1e-6)
    # SimPO has no reference: means -1.5 and -1, so -log σ(2 · (-0.5) - 1).
    assert known(Simpo(SimpoConfig(beta=2.0, gamma=1.0)), answers) == pytest.approx(math.log1p(math.exp(2)), abs=1e-6)


@pytest.mark.parametrize("name", ["robust", "ipo", "simpo", "orpo"])
def test_a_rank_without_rows_adds_nothing_and_stays_in_the_graph(folder, name):
    job = pair_job(folder, {"type": name}, False)
    loss, units = dummy(job, folder)
    assert set(units.values()) == {0}
    assert all(total.requires_grad and float(total.detach()) == 0.0 for total in loss.terms.values())


def dummy(job: TrainJob, folder: Path) -> tuple[Any, dict[str, int]]:
    from transformers import AutoModelForCausalLM

    from itune_ray.data.batches import model_inputs
    from itune_ray.model.logprobs import install_fused_head
    from itune_ray.train.objectives import build_objective

    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    install_fused_head(model)
    batch, objective = collate([], 0), build_objective(job.objective)
    inputs = model_inputs(batch, "mask_4d", torch.float32)
    scores = model(**inputs, labels=batch.labels, token_scores=True, **objective.head_inputs(batch))
    return objective(scores, batch), objective.units(batch)


LOSSES = {
    "robust": ({"type": "robust", "beta": 0.3, "flipped": 0.2}, {"loss_type": "robust", "label_smoothing": 0.2}, 0.3),
    "ipo": ({"type": "ipo", "tau": 0.3}, {"loss_type": "ipo"}, 0.3),
    "rpo": (
        {"type": "dpo", "beta": 0.3, "nll": 0.5},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        0.3,
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_three_steps_equal_trls_trainer(folder, tmp_path, name):
    """Loss and gradient norm; from the second step on the policy is no longer its reference."""
    trl = pytest.importorskip("trl")
    objective, settings, beta = LOSSES[name]
    rows, settings = tiny.pairs(8), {**settings, "beta": beta, "processing_class": tiny.tokenizer(None)}
    theirs = trl_steps(trl.DPOTrainer, trl.DPOConfig, folder, tmp_path / "trl", trl_pairs(rows), **settings)
    train_local(
        tiny.job(folder, objective=objective, steps=3, batch=8, packing=True, clip_norm=None), rows, str(tmp_path / "o")
    )
    found = read_metrics(str(tmp_path / "o"))
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in theirs], rel=3e-4)
    assert [row["grad_norm"] for row in found] == pytest.approx([row["grad_norm"] for row in theirs], rel=3e-4)
