"""What training refuses with one clear error before a step is taken: templates and vocabularies that do not fit."""

import dataclasses
import json
import shutil

import pytest
import tiny

from itune_ray.errors import ConfigError, ITuneError, ModelError, TrainError
from itune_ray.train.loop import train_local
from itune_ray.train.prepare import prepare_locally

LORA = {"type": "lora", "rank": 2}


def one_line(told: "pytest.ExceptionInfo[ITuneError]") -> str:
    assert "\n" not in str(told.value)
    return str(told.value)


def other_words(folder, out):
    """The same model with a tokenizer that has the ids of two tokens the other way round."""
    shutil.copytree(folder, out)
    tree = json.loads((out / "tokenizer.json").read_text())
    words = tree["model"]["vocab"]
    words["!"], words["?"] = words["?"], words["!"]
    (out / "tokenizer.json").write_text(json.dumps(tree))
    return out


def test_chats_without_a_chat_template(folder, tmp_path):
    bare = shutil.copytree(folder, tmp_path / "bare")
    tiny.tokenizer(template=None).save_pretrained(bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ConfigError) as told:
        train_local(tiny.job(bare), tiny.chats(4), str(tmp_path / "run"))
    assert "no chat template" in one_line(told)
    assert "set by `model.chat_template`" in one_line(told)
    assert not (tmp_path / "run/checkpoint").exists()
    given = tiny.job(bare, steps=1, **{"model.chat_template": tiny.CHATML})
    assert prepare_locally(given, tiny.chats(4), str(tmp_path / "given")).accepted == 4


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings(folder, tmp_path):
    words = tiny.tokenizer()
    words.add_tokens(["<more>", "<tokens>"])
    words.save_pretrained(tmp_path / "words")
    job = tiny.job(folder, **{"model.tokenizer": str(tmp_path / "words")})
    with pytest.raises(ModelError) as told:
        train_local(job, tiny.chats(4), str(tmp_path / "run"))
    size = len(words) - 2
    assert f"more tokens than the model has embeddings; got {size + 2}; allowed: at most {size}" in one_line(told)


def test_an_adapter_of_another_vocabulary_is_not_continued(folder, tmp_path):
    """Of the same size, so that nothing but the tokens tells."""
    train_local(tiny.job(folder, steps=1, **{"model.peft": LORA}), tiny.chats(4), str(tmp_path / "first"))
    adapter = str(tmp_path / "first/adapter")
    again = {"model.peft": LORA, "model.adapter": adapter, "steps": 1}
    train_local(tiny.job(folder, **again), tiny.chats(4), str(tmp_path / "same"))
    other = other_words(folder, tmp_path / "other")
    with pytest.raises(ModelError) as told:
        train_local(tiny.job(other, **again), tiny.chats(4), str(tmp_path / "run"))
    assert "trained with another tokenizer than the job's; got " in one_line(told)
    assert "`model.tokenizer`" in one_line(told)


def test_distributions_of_two_teachers_that_do_not_share_a_vocabulary(folder, tmp_path):
    one, two = tiny.distributions(2)
    assert two.teacher is not None
    mixed = [one, dataclasses.replace(two, teacher=dataclasses.replace(two.teacher, tokenizer="0123456789abcdef"))]
    job = tiny.job(folder, objective={"type": "kd", "k": 4})
    with pytest.raises(TrainError) as told:
        train_local(job, mixed, str(tmp_path))
    assert "another tokenizer than the student; got 'vocabulary 0123456789abcdef in row tiny:1:0'" in one_line(told)
    assert "`data`" in one_line(told)
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"strategy": {"type": "fsdp2", "shard_over": 2}, "workers": {"num": [2, 4]}},
            "needs a fixed number of workers",
        ),
        ({"objective": {"type": "reward"}, "gate": {"vllm": {}}}, "gate.vllm compares log-probabilities of text"),
    ],
)
def test_what_does_not_go_together(folder, settings, match):
    with pytest.raises(ValueError, match=match):
        tiny.job(folder, **settings)
