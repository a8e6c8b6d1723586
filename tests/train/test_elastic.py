"""Ranks come and go: the curve is that of a fixed run, with dropout, packing, mixing and a curriculum; on as many ranks
bit for bit."""

from dataclasses import replace

import pytest
import tiny
import torch
from ranks import run_ranks
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from itune_ray.train.loop import train_local, train_rank
from itune_ray.train.metrics import read_metrics
from itune_ray.train.prepare import prepare_locally
from itune_ray.train.randomness import draws

STEPS = 50
CASES = {
    "full fsdp2, dropout in attention": {"strategy": {"type": "fsdp2"}},
    "lora ddp, dropout in attention and adapter": {"model.peft": {"type": "lora", "rank": 4, "dropout": 0.2}},
    "full ddp, dropout in attention, easy rows first": {"curriculum": {"start": 0.2}},
}


class KilledRank(BaseException):
    """Stands for a kill: nothing after it runs."""


def job_of(folder, **overrides):
    settings = {"steps": STEPS, "batch": 8, "packing": True, "micro_batch": 4, "checkpoint": {"every_steps": 5}}
    return tiny.job(folder, **{**settings, "optimizer": {"type": "adamw", "lr": 1e-4}, **overrides})


def mixed(count):
    """Rows of three weights, left out, used as they are, or repeated in an epoch, and of seven difficulties."""
    return [
        replace(r, weight=(0.5, 1.0, 2.0)[r.position % 3], meta={"curriculum": {"difficulty": r.position % 7}})
        for r in tiny.chats(count)
    ]


def train_until(runs):
    """On this rank, each in turn: train a stage on, and die on the way to a step where one is given."""
    for job, stage, dies_at in runs:

        def on_place(step, place, dies_at=dies_at):
            if step == dies_at:
                raise KilledRank

        try:
            train_rank(job, prepare_locally(job, [], stage), stage, on_place=on_place)
            assert dies_at is None
        except KilledRank:
            pass


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    root = tmp_path_factory.mktemp("elastic")
    folder = tiny.llama(root / "model", attention_dropout=0.1)
    jobs = {case: job_of(folder, **overrides) for case, overrides in CASES.items()}
    for case, job in jobs.items():
        for run in ("fixed", "one", "twice", "resized"):
            prepare_locally(job, mixed(40), str(root / case / run))

    def on(world, *runs):
        todo = [(job, str(root / case / run), dies_at) for case, job in jobs.items() for run, dies_at in runs]
        run_ranks(world, train_until, todo)

    on(2, ("fixed", None), ("twice", 13), ("twice", 34), ("twice", None), ("resized", 18))
    on(1, ("one", None), ("resized", 37))
    on(2, ("resized", None))
    return root


def column(stage, *names):
    return [tuple(row[name] for name in names) for row in read_metrics(str(stage))]


@pytest.mark.real
@pytest.mark.parametrize("case", CASES)
def test_interrupted_and_resumed_twice_is_uninterrupted_bit_for_bit(stages, case):
    names = ("step", "loss", "grad_norm", "lr", "tokens", "units")
    twice, fixed = (column(stages / case / run, *names) for run in ("twice", "fixed"))
    assert len(fixed) == STEPS
    assert twice == fixed


@pytest.mark.real
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("run", ["one", "resized"])
def test_the_loss_of_every_step_is_that_of_another_number_of_ranks(stages, case, run):
    ranks = [count for (count,) in column(stages / case / run, "ranks")]
    assert ranks == ([2] * 15 + [1] * 20 + [2] * 15 if run == "resized" else [1] * STEPS)
    found, fixed = (column(stages / case / r, "loss") for r in (run, "fixed"))
    torch.testing.assert_close(found, fixed, rtol=1e-6, atol=0)


def test_dropout_belongs_to_a_row_whatever_the_micro_batch(folder, tmp_path):
    lora = {"model.peft": {"type": "lora", "rank": 4, "dropout": 0.5}, "steps": 3}
    for size in (1, 8):
        train_local(job_of(folder, micro_batch=size, **lora), mixed(40), str(tmp_path / str(size)))
    dry = {**lora, "model.peft": {"type": "lora", "rank": 4}}
    train_local(job_of(folder, **dry), mixed(40), str(tmp_path / "dry"))
    names = ("loss", "grad_norm")
    assert column(tmp_path / "8", *names) == column(tmp_path / "1", *names)
    assert column(tmp_path / "8", *names) != column(tmp_path / "dry", *names)


def test_what_draws_in_training():
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "n_layer": 1, "n_embd": 8, "n_head": 1}
    assert not draws(GPT2LMHeadModel(GPT2Config(**still)))
    assert draws(GPT2LMHeadModel(GPT2Config(**{**still, "attn_pdrop": 0.1})))
    noisy = nn.Linear(1, 1)
    noisy.router_jitter_noise = 0.01  # type: ignore[assignment]
    assert draws(nn.Sequential(noisy))
    adapted = nn.Linear(1, 1)
    adapted.rank_dropout = {"default": 0.1}  # type: ignore[assignment]
    assert draws(adapted)
