"""Copies of a sharded model: four ranks in two nodes of two train what ddp and plain fsdp2 train."""

import os
import shutil

import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import run_ranks
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, Replicate, Shard

from itune_ray.errors import TrainError
from itune_ray.train.loop import train_rank
from itune_ray.train.metrics import read_metrics
from itune_ray.train.prepare import prepare_locally
from itune_ray.train.strategies import build_strategy
from itune_ray.train.world import current_world

pytestmark = pytest.mark.real
STEPS, HALF = 4, 2
PLACES = {
    "ddp": {"type": "ddp"},
    "fsdp2": {"type": "fsdp2"},
    "hsdp": {"type": "fsdp2", "shard_over": "node"},
    "hsdp 2": {"type": "fsdp2", "shard_over": 2, "reshard_after_forward": False},
}
MODELS = {"full": {}, "lora": {"model.peft": {"type": "lora", "rank": 4}}, "bf16": {"precision": "bf16"}}
CASES = [(model, place) for model in MODELS for place in PLACES if place != "hsdp 2" or model == "full"]


def job_of(folder, model, place):
    settings = {"steps": STEPS, "batch": 8, "packing": True, "micro_batch": 2, "clip_norm": 0.1}
    return tiny.job(folder, **{**settings, "strategy": PLACES[place], **MODELS[model]})


def train(runs, per_node=2):
    os.environ["LOCAL_WORLD_SIZE"] = str(per_node)
    for job, stage, stop_at in runs:
        train_rank(job, prepare_locally(job, [], stage), stage, stop_at=stop_at)


@pytest.fixture(scope="module")
def stages(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("hsdp")

    def planned(model, place, name, stop_at=None):
        job = job_of(folder, model, place)
        prepare_locally(job, tiny.chats(40), str(root / name))
        return job, str(root / name), stop_at

    runs = [planned(model, place, f"{model}/{place}") for model, place in CASES]
    runs.append(planned("full", "hsdp", "full/half", HALF))
    run_ranks(4, train, runs)
    shutil.copytree(root / "full/half", root / "full/moved")
    run_ranks(2, train, [planned("full", "fsdp2", "full/moved")])
    return root


def figures(stage):
    return [(row["loss"], row["grad_norm"]) for row in read_metrics(str(stage))]


@pytest.mark.parametrize("case", [case for case in CASES if "hsdp" in case[1]], ids=str)
def test_losses_norms_and_weights_are_those_of_ddp_and_fsdp2(stages, case):
    model, place = case
    found = figures(stages / model / place)
    assert len(found) == STEPS
    torch.testing.assert_close(found, figures(stages / model / "fsdp2"), rtol=1e-5, atol=0)
    tolerance = 5e-3 if model == "bf16" else 1e-5
    torch.testing.assert_close(found, figures(stages / model / "ddp"), rtol=tolerance, atol=0)
    one, other = (load_file(stages / model / p / "model/model.safetensors") for p in (place, "fsdp2"))
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < (1e-2 if model == "bf16" else 1e-5)


def test_its_checkpoint_is_taken_up_by_two_ranks_of_plain_fsdp2(stages):
    torch.testing.assert_close(figures(stages / "full/moved"), figures(stages / "full/ddp"), rtol=1e-5, atol=0)


def placed(config):
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    strategy = build_strategy(config, current_world(), "fp32")
    layer = torch.nn.Linear(8, 8)
    weight = strategy.prepare(layer).weight
    assert isinstance(weight, DTensor)
    return weight.placements, tuple(weight.to_local().shape), weight.device_mesh.mesh.tolist()


def test_a_node_holds_a_whole_copy_and_a_rank_its_share(folder):
    config = job_of(folder, "full", "hsdp").strategy
    expected = ((Replicate(), Shard(0)), (4, 8), [[0, 1], [2, 3]])
    assert run_ranks(4, placed, config) == [expected] * 4


def refusal(config, per_node):
    os.environ["LOCAL_WORLD_SIZE"] = str(per_node[dist.get_rank()])
    with pytest.raises(TrainError) as error:
        build_strategy(config, current_world(), "fp32")
    return str(error.value)


def refusals(node, three):
    return refusal(node, (1, 2)), refusal(three, (2, 2))


def test_what_does_not_divide_is_one_clear_line_on_every_rank(folder):
    node, three = (tiny.job(folder, strategy={"type": "fsdp2", "shard_over": s}).strategy for s in ("node", 3))
    for nodes, copies in run_ranks(2, refusals, node, three):
        assert "as many workers on every node" in nodes
        assert "2 workers, 3 per copy" in copies
        assert "strategy.shard_over" in copies
