"""Captured distributions and rows that hold none; against a forward pass see test_on_vllm.py."""

import asyncio

import pytest
import tiny
from pydantic import ValidationError

from itune_ray.config.generate import GenerateJob
from itune_ray.config.recipes import TeacherTopkConfig
from itune_ray.config.shared import ModelRef
from itune_ray.engine.base import Sampling
from itune_ray.engine.fake import FakeEngine
from itune_ray.engine.llm import EngineLlm
from itune_ray.generate.recipes.teacher_topk import TeacherTopk, likeliest


def capture(engine, ref, rows, k=5):
    llm = EngineLlm(engine, model="teacher@1", sampling=Sampling(), ref=ref)
    recipe = TeacherTopk(TeacherTopkConfig(k=k))

    async def all_rows():
        return [outcome for row in rows for outcome in await recipe(row, llm)]

    return asyncio.run(all_rows())


def test_the_likeliest_k_and_never_fewer():
    ids, log_probs = likeliest([{7: -3.0, 1: -0.5, 2: -1.0}, {3: -2.0, 9: -1.0, 4: -2.0}], 2)
    assert ids.tolist() == [[1, 2], [9, 3]]
    assert log_probs.tolist() == [[-0.5, -1.0], [-1.0, -2.0]]
    with pytest.raises(ValueError, match="the engine gave 1 tokens per position, not 2"):
        likeliest([{1: -0.1}], 2)


def test_rows_without_an_answer_are_rejected_and_failures_are_kept_apart():
    ref = ModelRef(path="playground://base")
    rows = [tiny.chat("reverse ate please", ""), tiny.chat("reverse ate please", "eta", position=1)]
    first, second = capture(FakeEngine(), ref, rows)
    assert (first.status, first.reason) == ("rejected", "no_answer")
    assert second.status == "accepted"
    assert second.record.messages == rows[1].messages


def test_more_tokens_than_the_engine_gives_is_one_line():
    tree = {
        "name": "k",
        "prompts": [{"type": "playground", "split": "chat", "rows": 1}],
        "teacher": {"model": {"path": "playground://teacher"}},
        "recipe": {"type": "teacher_topk", "k": 50},
    }
    with pytest.raises(ValidationError, match=r"recipe.k 50 is more than the engine gives"):
        GenerateJob.model_validate(tree)
