"""Every parameter-efficient method's way to vLLM, as `SUPPORT` states it: the adapter, the merged model, or a refusal.

Adapters share one engine. Every merged model has its own, since `reload_weights` on CPU did not give the new one
(docs/decisions.md): two are in `make test`, the others in `make soak`.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from engine_contract import on_loop
from methods import METHODS, rows
from methods import settings as of_method

from itune_ray.config.adaptation import SUPPORT
from itune_ray.config.shared import ModelRef, VllmEngineConfig
from itune_ray.engine.base import Request, Sampling
from itune_ray.engine.llm import EngineLlm
from itune_ray.errors import ModelError
from itune_ray.model.gate import gap
from itune_ray.train.gate import read_report
from itune_ray.train.loop import train_local
from itune_ray.train.served import served_scores

pytestmark = pytest.mark.real
TOLERANCE = 1e-4
"""Nats per token, in fp32."""
ADAPTERS = [method for method in METHODS if SUPPORT[method].route == "adapter"]
MERGED = [method for method in METHODS if SUPPORT[method].route in ("adapter", "merged")]
MERGED_IN_MAKE_TEST = ("dora", "bitfit")
"""One that changes matrices, one that adds parameters."""
REFUSED = [method for method in METHODS if method not in (*ADAPTERS, "full", "bitfit", "qlora")]
"""Methods whose adapter folder vLLM must not take; a QLoRA folder it would take, over a base it was not trained on."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Method -> the stage of a short training with the export gate, made when first asked."""
    made: dict[str, Path] = {}

    def of(method: str) -> Path:
        if method not in made:
            torch.set_num_threads(1)
            made[method] = tmp_path_factory.mktemp(method)
            settings = {"steps": 3, "batch": 8, "gate": {"prompts": 3}, "optimizer": {"type": "adamw", "lr": 0.02}}
            train_local(tiny.job(base, **{**settings, **of_method(method)}), rows(method, 24), str(made[method]))
        return made[method]

    return of


def started(folder, adapters: int):
    from itune_ray.engine.vllm import VllmEngine

    config = VllmEngineConfig(max_adapters=adapters, max_adapter_rank=8, kv_cache_gb=0.05)
    return VllmEngine(config, ModelRef(path=str(folder), dtype="float32"))


@pytest.fixture(scope="module")
def over_base(base):
    """An engine on the base that takes adapters."""
    engine = started(base, adapters=1)
    yield engine
    engine.close()


def gap_of(engine, stage, loop, adapter=None):
    """vLLM against the trained model, on the documents of the stage's gate."""
    report = read_report(str(stage))
    llm = EngineLlm(engine, model="m", sampling=Sampling(), adapter=adapter, stage="gate")
    return gap(report.trained, on_loop(loop, served_scores(llm, report.documents)))


@pytest.mark.parametrize("method", ADAPTERS)
def test_an_adapter_says_what_was_trained(trained, over_base, loop, method):
    stage = trained(method)
    assert gap_of(over_base, stage, loop, str(stage / "adapter")) < TOLERANCE
    assert gap_of(over_base, stage, loop) > 10 * TOLERANCE, "the base alone says the same"


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m in MERGED_IN_MAKE_TEST else pytest.mark.soak) for m in MERGED]
)
def test_a_merged_model_says_what_was_trained(trained, loop, method):
    stage = trained(method)
    engine = started(stage / "model", adapters=0)
    try:
        assert gap_of(engine, stage, loop) < TOLERANCE
    finally:
        engine.close()


@pytest.mark.parametrize("method", REFUSED)
def test_vllm_takes_no_other_adapter(trained, over_base, loop, method):
    """What the route of a method is not: the folder is refused, not served as something else."""
    folder = str(trained(method) / "adapter")
    request = Request(id="x", token_ids=(5, 6, 7), sampling=replace(Sampling(), max_tokens=1), adapter=folder)
    (answer,) = on_loop(loop, over_base.generate([request]))
    assert answer.error is not None
    assert not answer.retryable


def test_the_gate_refuses_what_vllm_does_not_score(trained, over_base, loop):
    stage = trained("dora")
    with pytest.raises(ModelError, match="vLLM does not score what was trained"):
        gap_of(over_base, stage, loop, str(stage / "adapter"))
