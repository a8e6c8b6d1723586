"""Every decoder family: load, LoRA over packed rows in the one loop, export; what is written says what was trained.

tests/engine/test_served_families.py asks vLLM about the same trainings.
"""

import architectures
import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from itune_ray.data.batches import collate, model_inputs
from itune_ray.data.order import PackedRow
from itune_ray.model.gate import gap, scores_of
from itune_ray.model.load import load_model, masking_for
from itune_ray.model.logprobs import install_fused_head
from itune_ray.train.gate import read_report
from itune_ray.train.loop import train_local
from itune_ray.train.metrics import read_metrics

FAMILIES = list(architectures.FAMILIES)
MOVED = 0.01
"""Nats per token that a training, or a leak, moves a document by at least."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Family -> one packed LoRA training of it, made when first asked."""
    return architectures.Trainings(tmp_path_factory.mktemp)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_says_what_was_trained(trained, name):
    done = trained(name)
    report = read_report(done.stage)
    assert report.gaps.keys() == {"adapter", "merged"}
    assert max(report.gaps.values()) < 1e-5
    base = load_model(str(done.folder), dtype=torch.float32, attention="eager")
    assert gap(scores_of(base, report.documents), report.trained) > MOVED, "training moved nothing"


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_rows_train_as_single_ones(trained, name, tmp_path):
    """Documents do not see each other, by masks or by windows: same losses and gradient norms."""
    done = trained(name)
    job = architectures.lora_job(done.folder, packing=False, pack_length=None, micro_batch=12, gate=None)
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
    assert gap(plain, [wrong[:49], wrong[49:]]) > MOVED
