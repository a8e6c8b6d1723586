"""Task tokens in training: added to tokenizer and embeddings, trained, and part of what is exported."""

from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from itune_ray.config.train import TrainJob
from itune_ray.data.records import Record
from itune_ray.engine.token_rows import servable_adapter
from itune_ray.errors import ModelError, TrainError
from itune_ray.model.added_tokens import add_tokens, embed_new_tokens
from itune_ray.train.loop import train_local
from itune_ray.train.prepare import prepare_locally
from itune_ray.train.renderer import load_renderer

TOKENS = ["<|task:sum|>", "<|task:sort|>"]


def rows(count: int = 8) -> list[Record]:
    return [
        tiny.chat(
            f"{TOKENS[i % 2]}\n{tiny.WORDS[i]}", tiny.WORDS[-i], position=i, meta={"task_tokens": [TOKENS[i % 2]]}
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 16])
def test_new_rows_are_the_mean_of_the_others_and_no_other_row_changes(tmp_path, tied, spare):
    words = tiny.tokenizer()
    known = len(words)
    folder = tiny.llama(tmp_path, tie_word_embeddings=tied, vocab_size=known + spare)
    before = AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    add_tokens(words, TOKENS)
    embed_new_tokens(model, words, TOKENS)
    size = max(known + spare, known + len(TOKENS))
    assert model.config.vocab_size == size
    for name in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(m, name)().weight.detach() for m in (before, model))
        assert new.shape[0] == size
        assert torch.equal(new[:known], old[:known])
        mean = old[:known].double().mean(dim=0)
        for token in TOKENS:
            torch.testing.assert_close(new[words.get_vocab()[token]].double(), mean, rtol=0, atol=1e-6)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def job(folder, **more) -> TrainJob:
    return tiny.job(folder, **{"model.added_tokens": TOKENS, "steps": 2, "batch": 4, "optimizer.lr": 1e-2, **more})


LORA = {"type": "lora", "rank": 4, "train_tokens": TOKENS}


@pytest.mark.parametrize("peft", [{"type": "full"}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_export_holds_the_tokens_and_their_trained_rows(tmp_path, peft, tied):
    folder = tiny.llama(tmp_path / "base", tie_word_embeddings=tied)
    outcome = train_local(job(folder, **{"model.peft": peft}), rows(), str(tmp_path / "stage"))
    words = AutoTokenizer.from_pretrained(outcome.model_path)
    model = AutoModelForCausalLM.from_pretrained(outcome.model_path)
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == len(words) == base.config.vocab_size + len(TOKENS)
    for token in TOKENS:
        ids = words(token, add_special_tokens=False)["input_ids"]
        assert (len(ids), words.decode(ids)) == (1, token)
    old, new = (m.get_input_embeddings().weight.detach() for m in (base, model))
    mean = old.mean(dim=0)
    moved = [float((new[words.get_vocab()[token]] - mean).abs().max()) for token in TOKENS]
    assert min(moved) > 1e-3, "each new row was trained"
    assert not torch.equal(new[-1], new[-2])
    if peft is LORA:
        assert torch.equal(new[: len(old)], old)
    prompt = words.apply_chat_template(list(rows()[0].prompt), add_generation_prompt=True, return_tensors="pt")
    assert torch.isfinite(model(**prompt).logits).all()
    if peft is LORA:
        with pytest.raises(ModelError, match="no embeddings for"):
            servable_adapter(Path(outcome.adapter_path), folder, tmp_path / "scratch", max_rank=8)
    again = tiny.job(outcome.model_path, **{"model.added_tokens": TOKENS})
    assert len(load_renderer(again.model).tokenizer) == len(words), "a model that has them gets no second ones"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_run_goes_on_from_a_checkpoint_with_the_same_tokens(tmp_path, folder, strategy):
    made = job(folder, **{"model.peft": LORA, "strategy.type": strategy})
    whole = train_local(made, rows(), str(tmp_path / "whole"))
    train_local(made, rows(), str(tmp_path / "parts"), stop_at=1)
    parts = train_local(made, rows(), str(tmp_path / "parts"))
    a, b = (AutoModelForCausalLM.from_pretrained(o.model_path).state_dict() for o in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        ({"type": "lora", "rank": 4}, "add <|task:sum|>, <|task:sort|> to model.peft.train_tokens"),
        ({"type": "lora", "rank": 4, "train_tokens": TOKENS[:1]}, "add <|task:sort|> to model.peft.train_tokens"),
        ({"type": "bitfit"}, "bitfit would leave the embeddings of model.added_tokens as they start"),
    ],
)
def test_embeddings_that_would_stay_untrained_are_refused(folder, peft, message):
    with pytest.raises(ValueError, match="as they start") as error:
        job(folder, **{"model.peft": peft})
    assert message in str(error.value)


def test_rows_whose_tokens_were_not_added_are_rejected(folder, tmp_path):
    with pytest.raises(TrainError, match="token_not_added"):
        prepare_locally(tiny.job(folder), rows(), str(tmp_path / "a"))
    assert prepare_locally(job(folder), rows(), str(tmp_path / "b")).accepted == 8
    assert "added_tokens" not in tiny.job(folder).identity()["model"]
