"""vLLM on the trained families: adapter over base, and merged model, say what the training said.

Two engines per family: two families are in `make test`, the others in `make soak`. All engines run in this process,
which no test may take the process group from.
"""

import architectures
import pytest
from engine_contract import on_loop

from itune_ray.config.shared import VllmEngineConfig
from itune_ray.engine.base import Sampling
from itune_ray.engine.llm import EngineLlm
from itune_ray.errors import ModelError
from itune_ray.model.gate import gap
from itune_ray.train.gate import read_report
from itune_ray.train.served import routes_of, served_scores

IN_MAKE_TEST = ("gemma3", "qwen3_moe")
"""Windowed layers with a global one, and experts."""
TOLERANCE = 1e-4
"""Nats per token between vLLM and the trained model, in fp32."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Family -> one packed LoRA training of it, made when first asked."""
    return architectures.Trainings(tmp_path_factory.mktemp)


def served_gap(ref, report, loop):
    """vLLM in this process, on a model and perhaps an adapter over it, against the trained model.

    vLLM makes its group of expert ranks with the first engine of a process, and for a dense one none: begin anew.
    """
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from itune_ray.engine.vllm import VllmEngine

    cleanup_dist_env_and_memory()
    config = VllmEngineConfig(max_adapters=int(ref.adapter is not None), max_adapter_rank=8, kv_cache_gb=0.05)
    engine = VllmEngine(config, ref.model_copy(update={"dtype": "float32"}))
    try:
        llm = EngineLlm(engine, model=ref.path, sampling=Sampling(), adapter=ref.adapter, stage="gate")
        return gap(report.trained, on_loop(loop, served_scores(llm, report.documents)))
    finally:
        engine.close()


CELLS = [
    pytest.param(name, route, marks=pytest.mark.real if name in IN_MAKE_TEST else pytest.mark.soak)
    for name in architectures.FAMILIES
    for route in ("vllm adapter", "vllm merged")
    if (name, route) != ("qwen3_moe", "vllm adapter")
]


@pytest.mark.parametrize(("name", "route"), CELLS)
def test_vllm_says_what_was_trained(trained, loop, name, route):
    done = trained(name)
    ref = dict(routes_of(done.job, done.outcome))[route]
    assert served_gap(ref, read_report(done.stage), loop) < TOLERANCE


def test_adapters_over_experts_are_refused_on_cpu_before_the_engine_dies(trained):
    from itune_ray.engine.vllm import check_experts

    folder = str(trained("qwen3_moe").folder)
    with pytest.raises(ModelError, match="no adapters over a mixture of experts") as caught:
        check_experts(VllmEngineConfig(max_adapters=1), folder, folder)
    assert caught.value.knob == "engine.max_adapters"
    check_experts(VllmEngineConfig(), folder, folder)
    check_experts(VllmEngineConfig(max_adapters=1), str(trained("qwen3").folder), "dense")
