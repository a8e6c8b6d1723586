"""Every decoder family: load, LoRA over packed rows in the one loop, export; written, merged and served model agree.

The sweep through vLLM starts two engines per family; all but two families are in `make soak`.
"""

import asyncio
import threading
from types import SimpleNamespace

import architectures
import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from itune_ray.config.shared import VllmEngineConfig
from itune_ray.data.batches import collate, model_inputs
from itune_ray.data.order import PackedRow
from itune_ray.engine.base import Sampling
from itune_ray.engine.llm import EngineLlm
from itune_ray.model.gate import gap, scores_of
from itune_ray.model.load import load_model, masking_for
from itune_ray.model.logprobs import install_fused_head
from itune_ray.train.gate import read_report
from itune_ray.train.loop import train_local
from itune_ray.train.metrics import read_metrics
from itune_ray.train.served import routes_of, served_scores

FAMILIES = list(architectures.FAMILIES)
IN_MAKE_TEST = ("gemma3", "qwen3_moe")
"""Families whose engines `make test` starts: windowed layers, and experts."""
TOLERANCE = 1e-4
"""Nats per token between routes, in fp32."""


def job_of(folder, **overrides):
    settings = {"steps": 3, "batch": 12, "packing": True, "pack_length": 128, "micro_batch": 2}
    settings |= {"model.peft": {"type": "lora", "rank": 4}, "optimizer": {"type": "adamw", "lr": 0.01}}
    return tiny.job(folder, **{**settings, "gate": {"prompts": 4}, **overrides})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Family -> its folder, the job, the outcome and the stage of one packed LoRA training; made when first asked."""
    made = {}

    def of(name):
        if name not in made:
            torch.set_num_threads(1)
            folder = architectures.family(name, tmp_path_factory.mktemp(name))
            stage, job = str(tmp_path_factory.mktemp(f"{name}-stage")), job_of(folder)
            outcome = train_local(job, tiny.chats(24), stage)
            made[name] = SimpleNamespace(folder=folder, job=job, outcome=outcome, stage=stage)
        return made[name]

    return of


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_says_what_was_trained(trained, name):
    done = trained(name)
    report = read_report(done.stage)
    assert report.gaps.keys() == {"adapter", "merged"}
    assert max(report.gaps.values()) < 1e-5
    base = load_model(str(done.folder), dtype=torch.float32, attention="eager")
    assert gap(scores_of(base, report.documents), report.trained) > 100 * TOLERANCE, "training moved nothing"


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_rows_train_as_single_ones(trained, name, tmp_path):
    """Documents do not see each other, by masks or by windows: same losses and gradient norms."""
    done = trained(name)
    job = job_of(done.folder, packing=False, pack_length=None, micro_batch=12, gate=None)
    train_local(job, tiny.chats(24), str(tmp_path))
    packed, single = (
        [(row["loss"], row["grad_norm"]) for row in read_metrics(str(stage))] for stage in (done.stage, tmp_path)
    )
    torch.testing.assert_close(packed, single, rtol=2e-5, atol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_document_is_scored_as_alone(trained, name, attention):
    """Behind a document that fills several windows, scores are those of plain transformers on the document itself."""
    folder = trained(name).folder
    model = load_model(str(folder), dtype=torch.float32, attention=attention)
    documents = [np.random.default_rng(seed).integers(4, 330, size=length) for seed, length in ((0, 50), (1, 40))]
    plain = scores_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), documents)
    install_fused_head(model)
    ids, lengths = np.concatenate(documents), np.array([50, 40], np.int32)
    batch = collate([PackedRow(ids.astype(np.int32), np.ones(90, np.bool_), lengths, ("a", "b"))], pad_id=0)
    with torch.no_grad():
        inputs = model_inputs(batch, masking_for(model), torch.float32)
        scores = model(**inputs, labels=batch.labels, token_scores=True).log_probs.tolist()
    assert gap(plain, [scores[:49], scores[49:]]) < 1e-5
    leaking = {**inputs, "attention_mask": torch.ones_like(batch.input_ids)}  # the trap: a 2-D mask of ones
    with torch.no_grad():
        wrong = model(**leaking, labels=batch.labels, token_scores=True).log_probs.tolist()
    assert gap(plain, [wrong[:49], wrong[49:]]) > 100 * TOLERANCE


@pytest.fixture(scope="module")
def loop():
    running = asyncio.new_event_loop()
    threading.Thread(target=running.run_forever, daemon=True).start()
    yield running
    running.call_soon_threadsafe(running.stop)


def served_gap(ref, report, loop):
    """vLLM in this process, on a model and perhaps an adapter over it, against the trained model."""
    from itune_ray.engine.vllm import VllmEngine

    config = VllmEngineConfig(max_adapters=int(ref.adapter is not None), max_adapter_rank=8, kv_cache_gb=0.05)
    engine = VllmEngine(config, ref.model_copy(update={"dtype": "float32"}))
    try:
        llm = EngineLlm(engine, model=ref.path, sampling=Sampling(), adapter=ref.adapter, stage="gate")
        asked = asyncio.run_coroutine_threadsafe(served_scores(llm, report.documents), loop)
        return gap(report.trained, asked.result(120))
    finally:
        engine.close()


CELLS = [
    pytest.param(name, route, marks=pytest.mark.real if name in IN_MAKE_TEST else pytest.mark.soak)
    for name in FAMILIES
    for route in ("vllm adapter", "vllm merged")
]


@pytest.mark.parametrize(("name", "route"), CELLS)
def test_vllm_says_what_was_trained(trained, loop, name, route):
    done = trained(name)
    ref = dict(routes_of(done.job, done.outcome))[route]
    assert served_gap(ref, read_report(done.stage), loop) < TOLERANCE
