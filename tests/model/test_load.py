import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from itune_ray.config.shared import ModelRef
from itune_ray.config.train import InitConfig
from itune_ray.errors import ModelError
from itune_ray.model.load import (
    count_parameters,
    load_model,
    masking_for,
    model_from_config,
    new_model,
    parameters_on_meta,
)
from itune_ray.model.shards import covers, fill_from_folder
from itune_ray.model.tokenizer import load_tokenizer
from itune_ray.train.strategies.base import materialise

FP32 = {"dtype": torch.float32, "attention": "eager"}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    return str(tiny.llama(tmp_path_factory.mktemp("model"), tie_word_embeddings=request.param))


def test_an_empty_model_holds_nothing_and_is_filled_from_the_files(folder):
    with parameters_on_meta():
        model = model_from_config(folder, **FP32)
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert covers(folder, model)
    materialise(model, torch.device("cpu"))
    fill_from_folder(model, folder, seed=0)
    expected = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, expected(ids).logits)


def test_files_that_lack_a_weight_do_not_cover_the_model(folder, tmp_path):
    deeper = tiny.llama(tmp_path, num_hidden_layers=3)
    with parameters_on_meta():
        assert not covers(folder, model_from_config(str(deeper), **FP32))


def test_parameters_are_counted_without_weights(folder, tmp_path):
    import shutil

    shutil.copy(f"{folder}/config.json", tmp_path)
    expected = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert count_parameters(ModelRef(path=str(tmp_path))) == expected


def test_a_fresh_model_is_a_function_of_its_seed_and_takes_its_vocabulary_from_the_tokenizer():
    words = tiny.tokenizer()
    init = InitConfig(
        config={
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        tokenizer="unused",
    )
    state = torch.get_rng_state()
    one, same, other = (new_model(init, words, seed=s, **FP32) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert (one.config.vocab_size, one.config.eos_token_id) == (len(words), words.eos_token_id)
    with pytest.raises(ModelError, match="makes no model"):
        new_model(InitConfig(config={"model_type": "lama"}, tokenizer="unused"), words, seed=0, **FP32)


def test_broken_folders_are_one_clear_line(folder, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(tmp_path), **FP32)
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ModelError, match="config is unusable"):
        model_from_config(str(tmp_path), **FP32)


def test_how_documents_are_kept_apart(folder):
    assert masking_for(load_model(folder, **FP32)) == "mask_4d"
    assert masking_for(load_model(folder, dtype=torch.float32, attention="sdpa")) == "mask_4d_if_packed"
