import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from itune_ray.data.batches import IGNORED, collate, model_inputs
from itune_ray.data.order import PackedRow


def row(*documents: list[int]) -> PackedRow:
    ids = np.array([i for d in documents for i in d], dtype=np.int32)
    lengths = np.array([len(d) for d in documents], dtype=np.int32)
    return PackedRow(ids, np.ones(len(ids), dtype=bool), lengths, tuple(f"d:{i}:0" for i in range(len(documents))))


def test_labels_positions_and_documents():
    batch = collate([row([5, 6, 7], [8], [9, 4])], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, 6, 7, IGNORED, IGNORED, 4, IGNORED, IGNORED]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 0, 1]]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 2, 2, -1, -1]]
    assert batch.num_supervised == 3


@pytest.mark.parametrize("flat", [True, False])
def test_no_rows_make_a_dummy_without_targets(flat):
    batch = collate([], pad_id=0, flat=flat)
    assert batch.input_ids.shape[0] == 1
    assert batch.position_ids.max() == 1
    assert batch.num_supervised == 0


def test_flat_layout_describes_documents_for_varlen_attention():
    batch = collate([row([5, 6, 7], [8]), row([9, 4])], pad_id=0, flat=True)
    inputs = model_inputs(batch, "varlen", torch.float32)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, *[0] * 26]]
    assert batch.labels[0, 6:].eq(-100).all()
    assert batch.segments.tolist() == [[0, 0, 0, 1, 2, 2, *[-1] * 26]]
    assert inputs["cu_seq_lens_q"].tolist() == [0, 3, 4, 32]
    assert inputs["max_length_q"] == 28
    assert inputs["cu_seq_lens_q"].dtype == torch.int32


@pytest.mark.parametrize("last", [[9, 4, 8], [9]])
def test_padding_of_a_flat_row_begins_no_document_and_takes_no_new_position(last):
    batch = collate([row([5, 6], last)], pad_id=0, flat=True)
    padding = batch.position_ids[0, 2 + len(last) :]
    assert len(padding) == 32 - 2 - len(last)
    assert set(padding.tolist()) == {max(1, len(last) - 1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("model"))


DOCUMENTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [14, 15], [16, 17, 18, 19, 20, 21, 22]]


def alone(model, document: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([document]), use_cache=False).logits[0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("masking", ["mask_4d", "mask_4d_if_packed", "positions"])
def test_packed_logits_equal_those_of_each_document_alone(folder, attention, masking):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).train()
    batch = collate([row(*DOCUMENTS[:3]), row(*DOCUMENTS[3:])], pad_id=0)
    with torch.no_grad():
        logits = model(**model_inputs(batch, masking, torch.float32)).logits
        separate = [alone(model, d) for d in DOCUMENTS]
    packed = torch.cat([logits[0, :9], logits[1, :9]])
    assert (packed - torch.cat(separate)).abs().max() <= 1e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_changing_one_document_leaves_the_next_bit_identical(folder, attention):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    with torch.no_grad():
        one, other = (
            model(**model_inputs(collate([row(first, DOCUMENTS[4])], 0), "mask_4d", torch.float32)).logits[0, 5:12]
            for first in ([5, 6, 7, 8, 9], [30, 31, 32, 33, 34])
        )
    assert torch.equal(one, other)


def test_the_cache_trap_is_real_and_avoided(folder):
    """transformers isolates packed documents from position ids only without a KV cache, which is on by default."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    batch = collate([row(*DOCUMENTS)], pad_id=0)
    with torch.no_grad():
        expected = torch.cat([alone(model, d) for d in DOCUMENTS])
        inputs = model_inputs(batch, "positions", torch.float32)
        trapped = model(**{**inputs, "use_cache": True}).logits[0, :18]
        immune = model(**{**model_inputs(batch, "mask_4d", torch.float32), "use_cache": True}).logits[0, :18]
    assert inputs["use_cache"] is False
    assert (trapped - expected).abs().max() > 0.01
    assert (immune - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("masking", ["mask_4d", "mask_4d_if_packed", "positions"])
def test_rows_of_one_document_are_padded_without_effect(folder, masking):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    batch = collate([row(DOCUMENTS[4]), row(DOCUMENTS[2])], pad_id=0)
    inputs = model_inputs(batch, masking, torch.float32)
    assert ("attention_mask" in inputs) == (masking == "mask_4d")
    with torch.no_grad():
        logits = model(**inputs).logits
        for index, document in enumerate((DOCUMENTS[4], DOCUMENTS[2])):
            assert (logits[index, : len(document)] - alone(model, document)).abs().max() <= 1e-5


def test_the_mask_has_the_compute_dtype():
    batch = collate([row([5, 6], [7])], pad_id=0)
    mask = model_inputs(batch, "mask_4d", torch.bfloat16)["attention_mask"]
    assert mask.dtype == torch.bfloat16
    assert torch.isfinite(mask).all()
