"""Compiled layers: the same numbers, the same bits after a resume, and one clear line where they cannot be had."""

import shutil

import architectures
import pytest
import tiny
import torch
from ranks import run_ranks
from runs import losses

from itune_ray.config.train import TrainJob
from itune_ray.errors import ModelError, TrainError
from itune_ray.model.compiled import decoder_layers
from itune_ray.train import loop
from itune_ray.train.build import build_model
from itune_ray.train.loop import train_local, train_rank
from itune_ray.train.prepare import prepare_locally
from itune_ray.train.renderer import load_renderer
from itune_ray.train.strategies import build_strategy
from itune_ray.train.world import World

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
HIDDEN = 64
"""Of the tiny model."""
SIZE = {"steps": 3, "batch": 8, "packing": True, "pack_length": 128, "micro_batch": 1}
LORA = {"type": "lora", "rank": 4, "dropout": 0.2}


def job_of(folder, **overrides) -> TrainJob:
    return tiny.job(folder, **{**SIZE, "compile": True, **overrides})


CASES = {
    "full": ({"model.attention": "sdpa"}, tiny.chats),
    "dpo": ({"objective": {"type": "dpo"}, "pack_length": 256}, tiny.pairs),
    "reward": ({"objective": {"type": "reward"}, "pack_length": 256}, tiny.pairs),
}
LONG_CASES = {
    "masked": ({"model.attention": "eager", "micro_batch": 2}, tiny.chats),
    "dora, recomputed": ({"model.peft": {**LORA, "dora": True}, "gradient_checkpointing": True}, tiny.chats),
}


def moves_nothing_but_rounding(folder, tmp_path, overrides, records) -> None:
    for name, compiled in (("plain", False), ("compiled", True)):
        train_local(job_of(folder, compile=compiled, **overrides), records, str(tmp_path / name))
    torch.testing.assert_close(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_it_moves_nothing_but_rounding(folder, tmp_path, case):
    overrides, rows = CASES[case]
    moves_nothing_but_rounding(folder, tmp_path, overrides, rows(24))


@pytest.mark.soak
@pytest.mark.parametrize("case", LONG_CASES)
def test_it_moves_nothing_but_rounding_in_what_takes_longer(folder, tmp_path, case):
    overrides, rows = LONG_CASES[case]
    moves_nothing_but_rounding(folder, tmp_path, overrides, rows(24))


def train(job: TrainJob, stage: str) -> None:
    train_rank(job, prepare_locally(job, [], stage), stage)


@pytest.mark.real
def test_sharded_over_two_ranks_with_dropout(folder, tmp_path):
    records, lora = tiny.chats(24), {"model.peft": LORA}
    train_local(job_of(folder, compile=False, **lora), records, str(tmp_path / "one"))
    job = job_of(folder, strategy={"type": "fsdp2"}, **lora)
    prepare_locally(job, records, str(tmp_path / "two"))
    run_ranks(2, train, job, str(tmp_path / "two"))
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5, atol=1e-8)


class Stopped(BaseException):
    pass


def test_a_resumed_run_compiles_the_same(folder, tmp_path, monkeypatch):
    """Its first row is another one. Rows are as wide as the hidden size, which is no size of theirs."""
    wide = {"pack_length": HIDDEN, "max_length": HIDDEN}
    records, job = tiny.chats(40), job_of(folder, steps=4, checkpoint={"every_steps": 2}, precision="bf16", **wide)
    monkeypatch.setattr("itune_ray.model.cpu.has_bf16_units", lambda: True)
    shapes = []
    ahead = loop.compile_ahead
    monkeypatch.setattr(loop, "compile_ahead", lambda s, b: (shapes.append(tuple(b.input_ids.shape)), ahead(s, b)))
    train_local(job, records, str(tmp_path / "whole"))

    def stop(done, total, row):
        if done == 3:
            raise Stopped

    with pytest.raises(Stopped):
        train_local(job, records, str(tmp_path / "parts"), stop)
    torch.compiler.reset()
    train_local(job, records, str(tmp_path / "parts"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert shapes == [(1, HIDDEN)] * 3


def built(folder, **overrides):
    job, world = job_of(folder, **overrides), World()
    strategy = build_strategy(job.strategy, world, job.precision)
    return build_model(job, load_renderer(job.model).tokenizer, strategy, world)


def test_the_layers_alone_are_compiled_and_not_where_our_own_blocks_are_faster(folder, monkeypatch):
    for units, precision, compiled in ((True, "bf16", True), (False, "bf16", False), (False, "fp32", True)):
        monkeypatch.setattr("itune_ray.model.cpu.has_bf16_units", lambda units=units: units)
        made = built(folder, precision=precision)
        layers = decoder_layers(made.model)
        assert len(layers) == made.model.config.num_hidden_layers
        assert all(("forward" in vars(layer)) is compiled for layer in layers)
        assert made.compiled is compiled


def test_experts_are_refused(tmp_path):
    folder = architectures.family("qwen3_moe", tmp_path)
    with pytest.raises(ModelError, match="mixture of experts cannot be compiled"):
        built(str(folder), router_loss=0.0)


@pytest.mark.parametrize(
    ("overrides", "got"),
    [
        ({"strategy": {"type": "deepspeed"}}, "got strategy deepspeed"),
        ({"model.peft": {"type": "bitfit"}}, "got method bitfit"),
    ],
)
def test_what_cannot_be_compiled_is_refused(folder, overrides, got):
    with pytest.raises(ValueError, match=f"compile=true .*{got}"):
        job_of(folder, **overrides)


def test_no_compiler_is_one_clear_line(folder, tmp_path, monkeypatch):
    from torch._inductor.utils import fresh_cache

    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nowhere/g++",))
    monkeypatch.setattr("itune_ray.model.cpu.has_bf16_units", lambda: True)
    torch.compiler.reset()
    with (
        fresh_cache(),
        pytest.raises(TrainError, match=r"layers cannot be compiled: .*allowed: compile=false") as caught,
    ):
        train_local(job_of(folder), tiny.chats(24), str(tmp_path))
    assert "\n" not in str(caught.value)
    torch.compiler.reset()
