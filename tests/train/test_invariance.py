import math

import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from itune_ray.config.shared import ModelRef
from itune_ray.data import batches
from itune_ray.train import invariance
from itune_ray.train.invariance import check_invariance


def test_a_llama_holds(folder):
    report = check_invariance(ModelRef(path=str(folder)))
    assert report.ok
    assert max(report.head, report.packing, report.accumulation) < 1e-5
    assert report.summary().startswith("holds: ")


def test_a_public_model_holds():
    assert check_invariance(ModelRef(path=str(tiny.public_model("stories260K")))).ok


def test_sliding_windows_hold(tmp_path):
    config = AutoConfig.for_model(
        "mistral",
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=8,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert check_invariance(ModelRef(path=str(tmp_path))).ok


def test_a_leak_between_packed_documents_is_found(folder, monkeypatch):
    def plain_causal(batch, dtype):
        width = batch.input_ids.shape[1]
        return torch.full((1, 1, width, width), torch.finfo(dtype).min, dtype=dtype).triu(1)

    monkeypatch.setattr(batches, "block_causal_mask", plain_causal)
    report = check_invariance(ModelRef(path=str(folder)))
    assert not report.ok
    assert report.packing > 1e-2
    assert report.summary().startswith("BROKEN")


def test_recurrent_layers_cannot_be_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(invariance, "can_pack", lambda model: False)
    report = check_invariance(ModelRef(path=str(tiny.llama(tmp_path))))
    assert math.isnan(report.packing)
    assert report.ok
    assert torch.isfinite(torch.tensor([report.head, report.accumulation])).all()
