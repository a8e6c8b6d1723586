"""The export gate where the written adapter does not fit its base alone, and where base or stage lie in a store."""

import pyarrow.fs as pafs
import pytest
import tiny
from stores import s3

from itune_ray.data.storage import Folder
from itune_ray.errors import ModelError
from itune_ray.train.gate import read_report
from itune_ray.train.loop import train_local

TOKENS = ["<|task:sum|>", "<|task:sort|>"]
EXACT = 1e-5
"""Nats per token between the trained model and what was written, in fp32."""


def job(folder, peft, **more):
    """Fast enough that a change which was lost is seen."""
    fast = {"type": "adamw", "lr": 0.02}
    return tiny.job(folder, **{"model.peft": peft, "batch": 8, "optimizer": fast, "gate": {"prompts": 3}, **more})


def rows():
    return [
        tiny.chat(
            f"{TOKENS[i % 2]}\n{tiny.WORDS[i]}", tiny.WORDS[-i], position=i, meta={"task_tokens": [TOKENS[i % 2]]}
        )
        for i in range(8)
    ]


@pytest.mark.parametrize(
    "peft", [{"type": "full"}, {"type": "lora", "rank": 4, "train_tokens": TOKENS}], ids=["full", "lora"]
)
@pytest.mark.parametrize("tied", [True, False])
def test_with_added_tokens_the_merged_model_is_held_and_the_adapter_alone_is_not(tmp_path, peft, tied):
    """The base has no rows for them, so that the adapter says nothing without the merge."""
    folder = tiny.llama(tmp_path / "base", tie_word_embeddings=tied)
    outcome = train_local(job(folder, peft, **{"model.added_tokens": TOKENS}), rows(), str(tmp_path / "stage"))
    report = read_report(str(tmp_path / "stage"))
    assert report.gaps.keys() == {"merged"}
    assert report.gaps["merged"] < EXACT
    assert (outcome.adapter_path is not None) == (peft["type"] == "lora")
    known = len(tiny.tokenizer())
    assert all(any(token >= known for token in ids) for ids in report.documents), "the new tokens are among the scored"


def test_a_base_given_by_a_file_uri_is_opened_for_the_adapter(folder, tmp_path):
    train_local(job(f"file://{folder}", {"type": "lora", "rank": 4}), tiny.chats(24), str(tmp_path))
    gaps = read_report(str(tmp_path)).gaps
    assert gaps.keys() == {"adapter", "merged"}
    assert max(gaps.values()) < EXACT


@pytest.fixture
def store(folder, tmp_path, monkeypatch):
    """An object store with the tiny model at s3://bucket/base, and a cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with s3():
        place = Folder.at("s3://bucket/base")
        pafs.copy_files(str(folder), place.path, destination_filesystem=place.fs)
        yield Folder.at("s3://bucket")


def test_base_and_stage_in_a_store_are_held_as_on_disk(store, folder, tmp_path):
    lora = {"type": "lora", "rank": 4}
    stages = [str(tmp_path / "stage"), (store / "stage").uri]
    for stage in stages:
        train_local(job("s3://bucket/base", lora), tiny.chats(24), stage)
    train_local(job(folder, lora), tiny.chats(24), str(tmp_path / "local"))
    local = read_report(str(tmp_path / "local"))
    for stage in stages:
        report = read_report(stage)
        assert report.gaps.keys() == {"adapter", "merged"}
        assert max(report.gaps.values()) < EXACT
        assert report.trained == local.trained


def test_what_is_refused_is_gone_from_the_store(store, monkeypatch):
    from itune_ray.model import export

    right = export.adapter_settings
    monkeypatch.setattr(export, "adapter_settings", lambda *a: {**right(*a), "lora_alpha": 1})
    stage = store / "stage"
    with pytest.raises(ModelError, match=r"export is refused: the written model \(adapter\)"):
        train_local(job("s3://bucket/base", {"type": "lora", "rank": 4}), tiny.chats(24), stage.uri)
    assert not {"model", "adapter", "gate.json"} & set(stage.names())
    assert "checkpoint" in stage.names(), "what was trained stays"
