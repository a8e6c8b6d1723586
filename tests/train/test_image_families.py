"""A second family of image-text models, whose pictures differ in tokens, from LoRA to an export that transformers
opens; and the families that the loop would train wrongly, refused."""

import architectures
import pytest
import tiny
import torch
from peft import PeftModel
from pictures import encoded, first_step, inputs_of, plain_loss, write_rows
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from itune_ray.errors import ModelError
from itune_ray.model.images import check_positions
from itune_ray.train.gate import read_report
from itune_ray.train.loop import train_local
from itune_ray.train.metrics import read_metrics

SIZES = ((40, 30), (20, 60), (50, 50))
"""Rows × columns: 2 × 2 tiles, 1 × 2, 2 × 2."""


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return architectures.idefics3(tmp_path_factory.mktemp("idefics3"))


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"), sizes=SIZES)


def job_of(folder, **overrides):
    settings = {"steps": 3, "batch": 6, "micro_batch": 2, "images": {"trained": "joint"}, "max_length": 160}
    return tiny.job(folder, **{**settings, "optimizer": {"type": "adamw", "lr": 0.01}, **overrides})


def test_pictures_of_other_sizes_are_other_numbers_of_tokens(seeing, records):
    processor = AutoProcessor.from_pretrained(seeing)
    tokens = {
        int((inputs_of(processor, r, encoded(r)[:1])[0]["input_ids"] == processor.image_token_id).sum())
        for r in records
    }
    assert tokens == {4 * 3, 4 * 5}


@pytest.mark.parametrize("peft", [{"type": "full"}, {"type": "lora", "rank": 4}], ids=lambda p: p["type"])
def test_what_is_written_says_what_was_trained(seeing, records, tmp_path, peft):
    """The first step's loss is that of transformers, and the exports opened by transformers and PEFT give one model,
    whose loss on the first step's rows is what one more step of it reports."""
    job = job_of(seeing, **{"model.peft": peft, "gate": {"prompts": 3}})
    train_local(job, records, str(tmp_path / "stage"))
    gaps = read_report(str(tmp_path / "stage")).gaps
    assert gaps.keys() == ({"merged"} if peft["type"] == "full" else {"adapter", "merged"})
    assert max(gaps.values()) < 1e-5
    first = first_step(job, records)
    base = AutoModelForImageTextToText.from_pretrained(seeing, attn_implementation="eager").eval()
    before = plain_loss(base, seeing, first).item()
    assert read_metrics(str(tmp_path / "stage"))[0]["loss"] == pytest.approx(before, rel=1e-5)
    written = tmp_path / "stage" / "model"
    again = AutoModelForImageTextToText.from_pretrained(written, attn_implementation="eager").eval()
    after = plain_loss(again, written, first).item()
    assert after < before - 0.05
    more = tmp_path / "more"
    train_local(job_of(written, steps=1), records, str(more))
    assert read_metrics(str(more))[0]["loss"] == pytest.approx(after, rel=1e-5)
    if peft["type"] == "lora":
        adapted = PeftModel.from_pretrained(base, tmp_path / "stage" / "adapter").eval()
        processor = AutoProcessor.from_pretrained(tmp_path / "stage" / "adapter")
        for record in first:
            inputs, _ = inputs_of(processor, record, encoded(record))
            with torch.no_grad():
                torch.testing.assert_close(again(**inputs).logits, adapted(**inputs).logits, rtol=1e-4, atol=1e-5)


TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        (
            "qwen2_5_vl",
            {
                "text_config": {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
                "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2},
            },
            "numbers image tokens by height and width.*got 'qwen2_5_vl'",
        ),
        (
            "gemma3",
            {
                "text_config": TEXT,
                "vision_config": {
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                },
            },
            "in both directions.*got 'gemma3'",
        ),
    ],
)
def test_a_family_that_the_loop_would_train_wrongly_is_refused(family, fields, message):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **fields))
    with pytest.raises(ModelError, match=message):
        check_positions(model)
