"""RRHF against the paper's code and known answers; the rows it takes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from oracle import assert_same, batch_of, oracle, ours
from torch import Tensor

from itune_ray.config.objectives import RrhfConfig
from itune_ray.data.batches import Batch, collate
from itune_ray.model.logprobs import TokenScores
from itune_ray.train.documents import SCORE, SEGMENTS
from itune_ray.train.objectives.rrhf import Rrhf
from itune_ray.train.prepare import prepare_locally

RRHF = {"type": "rrhf", "answers": 4}


def rrhf_job(folder: Path, packing: bool, **objective: Any) -> Any:
    return tiny.job(folder, objective={**RRHF, **objective}, packing=packing, batch=7, steps=1)


def rank_loss(scores: Tensor, rewards: Tensor) -> Tensor:
    """The loss of one row as GanjinZero/RRHF's train.py computes it (`diff[aval].sum()`, negated)."""
    diff = scores.unsqueeze(0) - scores.unsqueeze(-1)
    reward_diff = rewards.unsqueeze(0) - rewards.unsqueeze(-1)
    wrong = torch.bitwise_and(reward_diff > 0, diff < 0)
    return -diff[wrong].sum()


@pytest.mark.parametrize("packing", [False, True], ids=["unpacked", "packed"])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_it_is_the_papers_code(folder, tmp_path, packing, power):
    job = rrhf_job(folder, packing, length_power=power, nll=0.7)
    batch = batch_of(job, tiny.ranked(7), tmp_path)
    assert sorted(batch.columns[SEGMENTS].tolist()) == [2, 2, 2, 3, 3, 4, 4]

    def formula(found: list[Tensor]) -> Tensor:
        total, best, start = torch.zeros(()), [], 0
        for count in batch.columns[SEGMENTS].tolist():
            own, rewards = found[start : start + count], batch.columns[SCORE][start : start + count]
            total = total + rank_loss(torch.stack([v.sum() / len(v) ** power for v in own]), rewards)
            best.append(own[int(rewards.argmax())])
            start += count
        assert float(total.detach()) > 0
        return total / 7 - 0.7 * torch.cat(best).mean()

    assert_same(ours(job, folder, batch), oracle(folder, batch, formula))


def one_row(log_probs: list[float], scores: list[float]) -> Batch:
    """A row of answers of one token each."""
    count = len(log_probs)
    segments = torch.arange(count).repeat_interleave(2)[None]
    labels = torch.ones(1, 2 * count, dtype=torch.int64)
    labels[0, ::2] = -100
    columns = {SCORE: torch.tensor(scores), SEGMENTS: torch.tensor([count])}
    return Batch(labels, labels, labels, segments, (count,), (("a:0:0",),), columns)


@pytest.mark.parametrize(
    ("log_probs", "scores", "rank", "nll", "accuracy"),
    [
        ([-1.0, -2.0, -3.0], [3.0, 2.0, 1.0], 0.0, 1.0, 1.0),
        ([-3.0, -2.0, -1.0], [3.0, 2.0, 1.0], 4.0, 3.0, 0.0),
        ([-2.0, -2.0], [1.0, 0.0], 0.0, 2.0, 0.5),
        ([-2.0, -1.0, -4.0], [1.0, 0.0, 0.0], 1.0, 2.0, 0.5),
    ],
)
def test_known_answers(log_probs, scores, rank, nll, accuracy):
    values = torch.tensor(log_probs)
    objective, batch = Rrhf(RrhfConfig()), one_row(log_probs, scores)
    loss = objective(TokenScores(values, values), batch)
    assert float(loss.terms["rank"]) == pytest.approx(rank)
    assert float(loss.terms["nll"]) == pytest.approx(nll)
    assert float(loss.metrics["rank_accuracy"].total) == pytest.approx(accuracy)
    assert objective.units(batch) == {"rank": 1, "nll": 1}


def test_the_dummy_of_an_idle_rank_counts_nothing_and_stays_in_the_graph():
    objective, batch = Rrhf(RrhfConfig()), collate([], 0)
    loss = objective(TokenScores(torch.zeros(0, requires_grad=True), torch.zeros(0)), batch)
    assert all(total.requires_grad and float(total.detach()) == 0 for total in loss.terms.values())
    assert set(objective.units(batch).values()) == {0}


def test_rows_that_rank_nothing_are_quarantined(folder, tmp_path):
    two = [{"response": "apple", "score": 1}, {"response": "river", "score": 0}]
    given: list[Any] = [
        two,
        None,
        [],
        "apple",
        [{"response": "apple"}, two[0]],
        [{"response": "apple", "score": float("nan")}, two[1]],
        [two[0], {"response": "river", "score": 1}],
        [two[0], {"response": "apple", "score": 0}],
        [{"response": f"apple {i}", "score": i} for i in range(5)],
        [two[0], {"response": "river " * 200, "score": 0}],
    ]
    records = [replace(r, meta={"responses": g}) for r, g in zip(tiny.chats(len(given)), given, strict=True)]
    prepared = prepare_locally(rrhf_job(folder, True), records, str(tmp_path))
    reasons = {"equal_answers": 1, "equal_scores": 1, "no_ranking": 5, "too_long": 1, "too_many_answers": 1}
    assert (prepared.accepted, prepared.rejected) == (1, reasons)


def test_a_packed_row_must_hold_all_answers(folder):
    with pytest.raises(
        ValueError, match="pack_length 256 must be at least 4 times max_length, for a row's answers, 512"
    ):
        tiny.job(folder, objective=RRHF, pack_length=256)
