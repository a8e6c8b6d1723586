"""Objectives against oracles: TRL's trainers, closed forms, and which rows become documents of them."""

from dataclasses import replace

import pytest
import tiny
import torch
from oracle import assert_same_gradients, our_steps, trl_steps
from torch.nn.functional import logsigmoid

from itune_ray.config.objectives import DpoConfig
from itune_ray.data.batches import Batch, collate
from itune_ray.data.chat import ChatRenderer
from itune_ray.data.order import PackedTable
from itune_ray.model.logprobs import TokenScores
from itune_ray.train.objectives.dpo import REFERENCE, Dpo
from itune_ray.train.prepare import prepare_locally

DPO = {"type": "dpo"}


def batch_of_pairs(folder, stage, packing: bool) -> Batch:
    job = tiny.job(folder, objective=DPO, packing=packing, batch=6, steps=1)
    prepared = prepare_locally(job, tiny.pairs(6), str(stage))
    return collate(PackedTable(prepared.folder).rows(0), pad_id=0)


def by_segment(batch: Batch) -> dict[tuple[str, int], list[int]]:
    """(key, 0 for the chosen answer or 1 for the rejected) -> places of its tokens among the supervised ones."""
    places, place = {}, 0
    for row in range(len(batch.labels)):
        for column in range(1, batch.labels.shape[1]):
            if batch.labels[row, column] != -100:
                segment = int(batch.segments[row, column])
                places.setdefault((batch.keys[row][segment // 2], segment % 2), []).append(place)
                place += 1
    return places


@pytest.mark.parametrize("packing", [False, True])
def test_dpo_is_the_closed_form_term_by_term(folder, tmp_path, packing):
    """Value and gradient, on made-up log-probs, with smoothed labels and the chosen answers' likelihood."""
    batch = batch_of_pairs(folder, tmp_path, packing)
    torch.manual_seed(0)
    log_probs = -torch.rand(batch.num_supervised) * 3
    log_probs.requires_grad_()
    reference = -10 * torch.rand(sum(batch.num_segments), dtype=torch.float64)
    config = DpoConfig(beta=0.3, label_smoothing=0.1, nll=0.5)
    objective = Dpo(config)
    batch = replace(batch, columns={REFERENCE: reference})
    loss = objective(TokenScores(log_probs, torch.zeros_like(log_probs)), batch)

    places = by_segment(batch)
    keys = [key for row in batch.keys for key in row]
    dpo, nll, margins = torch.zeros(()), torch.zeros(()), []
    for index, key in enumerate(keys):
        chosen, rejected = (log_probs[places[key, side]].double().sum() for side in (0, 1))
        margin = 0.3 * ((chosen - reference[2 * index]) - (rejected - reference[2 * index + 1]))
        dpo = dpo - 0.9 * logsigmoid(margin) - 0.1 * logsigmoid(-margin)
        nll = nll - chosen
        margins.append(margin.item())
    units = objective.units(batch)
    assert units == {"dpo": 6, "nll": sum(len(places[key, 0]) for key in keys)}
    for term, expected in (("dpo", dpo), ("nll", nll)):
        torch.testing.assert_close(loss.terms[term], expected, rtol=1e-6, atol=0)
    got, wanted = (torch.autograd.grad(total, log_probs)[0] for total in (sum(loss.terms.values()), dpo + nll))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)
    assert float(loss.metrics["reward_margin"].total) == pytest.approx(sum(margins))
    assert float(loss.metrics["reward_accuracy"].total) == sum(m > 0 for m in margins)


def test_rows_that_are_no_pair_are_quarantined_with_a_reason(folder, tmp_path):
    good, lone, equal, long, longer = tiny.pairs(5)
    rows = [
        good,
        replace(lone, rejected=None),
        replace(equal, rejected=equal.response),
        replace(long, rejected="river " * 200),
        replace(longer, messages=(*longer.prompt, {"role": "assistant", "content": "stone " * 200})),
    ]
    job = tiny.job(folder, objective=DPO, packing=True)
    assert job.pack_capacity == 2 * job.max_length
    prepared = prepare_locally(job, rows, str(tmp_path))
    assert (prepared.accepted, prepared.rejected) == (1, {"equal_answers": 1, "no_pair": 1, "too_long": 2})


def test_a_packed_row_must_hold_a_pair(folder):
    with pytest.raises(ValueError, match="pack_length 128 must be at least twice max_length, for a pair, 256"):
        tiny.job(folder, objective=DPO, pack_length=128)


def test_sft_equals_trls_trainer(folder, tmp_path):
    """Three steps of loss and every gradient, theirs over four accumulated micro-batches of very unequal answers."""
    trl = pytest.importorskip("trl")
    rows, template = tiny.chats(8), ChatRenderer(tiny.tokenizer())
    data = [{"prompt": template.prompt_text(r.prompt), "completion": f"{r.response}<|im_end|>"} for r in rows]
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    bare = {"processing_class": tiny.tokenizer(None)}
    theirs = trl_steps(trl.SFTTrainer, trl.SFTConfig, folder, tmp_path / "trl", data, **parts, **bare)
    ours = our_steps(tiny.job(folder, batch=8, clip_norm=None), rows, tmp_path / "ours")
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-4)
    assert [row["grad_norm"] for row in ours] == pytest.approx([row["grad_norm"] for row in theirs], rel=1e-4)
    for mine, other in zip(ours, theirs, strict=True):
        assert_same_gradients(mine["gradients"], other["gradients"])
