"""Every parameter-efficient method's way to vLLM, as `SUPPORT` states it: the adapter, the adapter as embeddings, the
merged model, or a refusal.

Adapters share one engine, and so do those that are embeddings. Every merged model has its own, since `reload_weights`
on CPU did not give the new one (docs/decisions.md): two are in `make test`, the others in `make soak`.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from engine_contract import on_loop
from methods import METHODS, rows
from methods import settings as of_method
from safetensors.torch import load_file, save_file

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
EMBEDDED = [method for method in METHODS if SUPPORT[method].route == "prompt embeds"]
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


def started(folder, adapters: int, embeds: bool = False):
    from itune_ray.engine.vllm import VllmEngine

    config = VllmEngineConfig(max_adapters=adapters, max_adapter_rank=8, prompt_embeds=embeds, kv_cache_gb=0.05)
    return VllmEngine(config, ModelRef(path=str(folder), dtype="float32"))


@pytest.fixture(scope="module")
def over_base(base):
    """An engine on the base that takes adapters."""
    engine = started(base, adapters=1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def taking_embeddings(base):
    """An engine on the base that takes prompts as embeddings."""
    engine = started(base, adapters=0, embeds=True)
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


@pytest.mark.parametrize("method", EMBEDDED)
def test_virtual_tokens_say_what_was_trained(trained, taking_embeddings, loop, method):
    stage = trained(method)
    assert gap_of(taking_embeddings, stage, loop, str(stage / "adapter")) < TOLERANCE
    assert gap_of(taking_embeddings, stage, loop) > 10 * TOLERANCE, "the base alone says the same"


@pytest.mark.parametrize("method", EMBEDDED)
def test_virtual_tokens_generate_what_transformers_does(base, trained, taking_embeddings, loop, method):
    """Greedy, two prompts at once and one without the adapter; what is told of the prompt is the text's alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = str(trained(method) / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    sampling = replace(Sampling(), temperature=0.0, max_tokens=8, ignore_end=True, prompt_logprobs=0)
    prompts = [(5, 6, 7), (9, 8, 7, 6, 5)]
    asked = [Request(id=str(i), token_ids=ids, sampling=sampling, adapter=folder) for i, ids in enumerate(prompts)]
    *answers, plain = on_loop(loop, taking_embeddings.generate([*asked, replace(asked[0], id="plain", adapter=None)]))
    for ids, answer in zip(prompts, answers, strict=True):
        theirs = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert answer.samples[0].token_ids == tuple(theirs[0, len(ids) :].tolist())
        assert answer.prompt_token_ids == ids
        assert [entry is None for entry in answer.prompt_logprobs] == [True] + [False] * (len(ids) - 1)
    assert plain.samples[0].token_ids != answers[0].samples[0].token_ids


def test_virtual_tokens_written_anew_are_read_anew(trained, taking_embeddings, loop, tmp_path):
    shutil.copytree(trained("prompt_tuning") / "adapter", tmp_path / "adapter")
    sampling = replace(Sampling(), temperature=0.0, max_tokens=1, logprobs=0)
    one = Request(id="x", token_ids=(5, 6, 7), sampling=sampling, adapter=str(tmp_path / "adapter"))
    (before,) = on_loop(loop, taking_embeddings.generate([one]))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({"prompt_embeddings": load_file(file)["prompt_embeddings"] * 3}, file)
    (after,) = on_loop(loop, taking_embeddings.generate([one]))
    assert before.samples[0].logprobs != after.samples[0].logprobs


def test_virtual_tokens_that_do_not_fit_fail_their_requests_alone(trained, taking_embeddings, loop, tmp_path):
    """Of another base, without weights, of LoRA, with a text that fills the context or holds no token of the model's:
    vLLM itself would die of the first and the last."""
    good = trained("prompt_tuning") / "adapter"
    for name in ("narrow", "empty"):
        shutil.copytree(good, tmp_path / name)
    narrow = {"prompt_embeddings": load_file(good / "adapter_model.safetensors")["prompt_embeddings"][:, :-8].clone()}
    save_file(narrow, tmp_path / "narrow" / "adapter_model.safetensors")
    (tmp_path / "empty" / "adapter_model.safetensors").unlink()
    one = Request(id="x", token_ids=(5, 6, 7), sampling=replace(Sampling(), max_tokens=1), adapter=str(good))
    longest = taking_embeddings._backend.max_model_len - 1
    bad = [replace(one, adapter=str(tmp_path / name)) for name in ("narrow", "empty")]
    bad += [replace(one, adapter=str(trained("lora") / "adapter"))]
    bad += [replace(one, token_ids=ids) for ids in ((5,) * longest, (5, 10**6), (5, -1))]
    found = on_loop(loop, taking_embeddings.generate([*bad, one]))
    reasons = ("not embeddings of this base", "cannot be read", "takes no other adapter", "prompt_too_long")
    for answer, reason in zip(found, (*reasons, *["a token id outside"] * 2), strict=False):
        assert reason in answer.error
        assert not answer.retryable
    assert found[-1].error is None


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
