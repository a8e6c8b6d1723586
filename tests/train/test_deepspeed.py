"""ZeRO trains, resumes and exports what ddp does. Two processes import DeepSpeed once and run all cases in turn."""

import os
import shutil

import pytest
import tiny
import torch
from ranks import STRATEGIES, run_ranks
from safetensors.torch import load_file

from itune_ray.config.train import TrainJob
from itune_ray.errors import TrainError
from itune_ray.train.loop import train_rank
from itune_ray.train.metrics import read_metrics
from itune_ray.train.prepare import prepare_locally

pytestmark = pytest.mark.real
STEPS, HALF = 4, 2
LORA = {"model.peft": {"type": "lora", "rank": 4, "train_tokens": ["<|im_start|>"]}}
FRESH = {
    "config": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": False,
    }
}
MODELS = {
    "full": {},
    "lora": LORA,
    "lora bf16": {**LORA, "precision": "bf16"},
    "full bf16": {"precision": "bf16"},
    "fresh": {"model.path": None, "model.init": FRESH},
    "recomputed": {"gradient_checkpointing": True},
    "one row": {"batch": 1, "packing": False},
    "diverging": {"optimizer": {"type": "adamw", "lr": 1e30}, "clip_norm": None},
}
"""Name -> what differs from full tuning of a pretrained model in fp32."""
PLACES = {**STRATEGIES, "zero3 persisted": {"type": "deepspeed"}}
PLACES |= {f"{name} offloaded": {**STRATEGIES[name], "offload": True} for name in ("zero1", "zero2", "zero3")}
WHOLE = [
    *(("full", place) for place in ("ddp", "zero1", "zero2", "zero3", "zero3 persisted")),
    *((model, place) for model in ("lora", "lora bf16", "full bf16") for place in ("ddp", "zero2", "zero3")),
    *((model, place) for model in ("fresh", "recomputed", "one row") for place in ("ddp", "zero3")),
    *(("full", f"{name} offloaded") for name in ("zero1", "zero2", "zero3")),
    *((model, "zero3 offloaded") for model in ("lora", "full bf16")),
    ("one row", "zero2"),
    ("diverging", "zero2"),
    ("diverging", "zero3"),
]
PAUSED = [
    *(("full", place) for place in ("zero1", "zero2", "zero3 persisted")),
    ("lora", "zero3"),
    ("full bf16", "zero3"),
    ("full", "zero2 offloaded"),
    ("full", "zero3 offloaded"),
]
"""Paused half-way and taken up again by the same ranks."""
MOVED = [
    ("full", "zero3", "zero3"),
    ("full", "zero3", "ddp"),
    ("full", "zero2", "fsdp2"),
    ("full", "ddp", "zero3"),
    ("lora", "zero3", "zero3"),
    ("lora", "ddp", "zero3"),
    ("lora", "zero3", "ddp"),
    ("full", "zero2", "zero2"),
    ("full", "zero1", "zero3 offloaded"),
    ("full", "zero3 offloaded", "fsdp2"),
]
"""(model, strategy of the first half on two ranks, strategy of the second half on one)."""


def job_of(folder, model, place) -> TrainJob:
    overrides = {"steps": STEPS, "batch": 8, "packing": True, "strategy": PLACES[place], **MODELS[model]}
    if "model.init" in overrides:
        overrides["model.init"] = {**FRESH, "tokenizer": str(folder)}
    return tiny.job(folder, **overrides)


def train(runs):
    """On this rank: the error of every run that fails, by place in the list."""
    errors = {}
    for index, (job, stage, stop_at) in enumerate(runs):
        try:
            train_rank(job, prepare_locally(job, [], stage), stage, stop_at=stop_at)
        except TrainError as error:
            errors[index] = str(error)
    return errors


@pytest.fixture(scope="module")
def stages(folder, tmp_path_factory):
    """Name of a run -> its stage; `errors` -> messages by run."""
    root = tmp_path_factory.mktemp("zero")

    def planned(model, place, name, stop_at=None):
        job, stage = job_of(folder, model, place), root / name
        prepare_locally(job, tiny.chats(40), str(stage))
        return job, str(stage), stop_at

    on_two = [planned(model, place, f"{model}/{place}") for model, place in WHOLE]
    for model, place in PAUSED:
        on_two += [planned(model, place, f"{model}/{place} paused", stop_at) for stop_at in (HALF, None)]
    halves = {(model, first) for model, first, _ in MOVED}
    on_two += [planned(model, first, f"{model}/{first} half", HALF) for model, first in sorted(halves)]
    errors, _ = run_ranks(2, train, on_two)
    for model, first, then in MOVED:
        shutil.copytree(root / f"{model}/{first} half", root / f"{model}/{first} to {then}")
    errors_alone = run_ranks(1, train, [planned(m, then, f"{m}/{first} to {then}") for m, first, then in MOVED])
    assert errors_alone == [{}]
    return root, {on_two[index][1].removeprefix(f"{root}/"): message for index, message in errors.items()}


def figures(stage):
    return [(row["loss"], row["grad_norm"]) for row in read_metrics(str(stage))]


def weights(stage):
    files = sorted(stage.glob("model/*.safetensors")) + sorted(stage.glob("adapter/*.safetensors"))
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def largest_difference(stage, other):
    one, two = weights(stage), weights(other)
    assert one.keys() == two.keys()
    assert one
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@pytest.mark.parametrize(
    "case", [c for c in WHOLE if c[1] != "ddp" and "bf16" not in c[0] and c[0] != "diverging"], ids=str
)
def test_losses_norms_and_the_exported_weights_are_those_of_ddp(stages, case):
    model, place = case
    stage, ddp = stages[0] / model / place, stages[0] / model / "ddp"
    torch.testing.assert_close(figures(stage), figures(ddp), rtol=1e-5, atol=0)
    assert largest_difference(stage, ddp) < 1e-5


@pytest.mark.parametrize("case", [c for c in WHOLE if c[1] != "ddp" and "bf16" in c[0]], ids=str)
def test_bf16_is_autocast_as_in_ddp(stages, case):
    """Equal until the first update; from there on, bf16 turns differences of rounding into its own."""
    model, place = case
    stage, ddp = stages[0] / model / place, stages[0] / model / "ddp"
    torch.testing.assert_close(figures(stage)[0], figures(ddp)[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(figures(stage), figures(ddp), rtol=5e-3, atol=0)
    assert {tensor.dtype for name, tensor in weights(stage).items() if name.startswith("model/")} == {torch.bfloat16}


@pytest.mark.parametrize("case", PAUSED, ids=str)
def test_a_pause_changes_no_bit(stages, case):
    whole, paused = (stages[0] / case[0] / name for name in (case[1], f"{case[1]} paused"))
    assert figures(paused) == figures(whole)
    assert largest_difference(paused, whole) == 0.0


@pytest.mark.parametrize("case", MOVED, ids=str)
def test_a_checkpoint_of_two_ranks_is_taken_up_by_one_and_by_another_strategy(stages, case):
    model, first, then = case
    moved, ddp = stages[0] / model / f"{first} to {then}", stages[0] / model / "ddp"
    torch.testing.assert_close(figures(moved), figures(ddp), rtol=1e-5, atol=0)
    assert largest_difference(moved, ddp) < 1e-5


def test_a_loss_that_is_not_finite_stops_the_run(stages):
    assert stages[1].keys() == {"diverging/zero2", "diverging/zero3"}
    assert all("not finite at step 2" in message for message in stages[1].values())


def test_a_rank_holds_half_of_what_zero3_trains(stages):
    """Runs of two ranks, one half each: nothing is in the checkpoint twice."""
    sizes = [f.stat().st_size for f in (stages[0] / "full/zero3 half/checkpoint").glob("step-*/*.distcp")]
    assert len(sizes) == 2
    assert max(sizes) < 1.1 * min(sizes)


def left_behind(job, stage):
    """What a training adds to the environment of its process."""
    before = set(os.environ)
    train_rank(job, prepare_locally(job, [], stage), stage)
    return os.environ.keys() - before


@pytest.mark.parametrize("place", ["zero2", "zero3"])
def test_no_launchers_variable_is_left_in_the_process(folder, tmp_path, place):
    """A LOCAL_RANK left behind makes accelerate join a group of processes that nobody started."""
    job = job_of(folder, "full", place)
    prepare_locally(job, tiny.chats(8), str(tmp_path))
    assert run_ranks(1, left_behind, job, str(tmp_path)) == [set()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": {"type": "deepspeed", "stage": 2, "persist_below": 0}}, "persist_below is for stage 3"),
        ({"strategy": {"type": "deepspeed", "stage": 4}}, "1, 2 or 3"),
        ({"strategy": {"type": "deepspeed"}, "optimizer": {"type": "muon"}}, "strategy.type=ddp"),
    ],
    ids=str,
)
def test_what_cannot_work_cannot_be_written(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny.job(folder, **settings)
