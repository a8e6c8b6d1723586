"""Recipes that read log-probabilities, on one real vLLM engine of a tiny model."""

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
import tiny
import torch
from test_preference_label import ROW, facts
from test_teacher_topk import capture
from transformers import AutoModelForCausalLM

from itune_ray.config.recipes import PreferenceLabelConfig
from itune_ray.config.shared import ModelRef, VllmEngineConfig
from itune_ray.engine.base import Sampling
from itune_ray.engine.llm import EngineLlm
from itune_ray.engine.vllm import VllmEngine
from itune_ray.generate.recipes import preference_label
from itune_ray.generate.recipes.preference_label import PreferenceLabel
from itune_ray.model.render import model_renderer

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def ref(tmp_path_factory) -> ModelRef:
    folder = tiny.llama(tmp_path_factory.mktemp("model"), max_position_embeddings=2048)
    return ModelRef(path=str(folder), dtype="float32")


@pytest.fixture(scope="module")
def vocabulary(ref) -> int:
    return len(model_renderer(ref).tokenizer)


@pytest.fixture(scope="module")
def engine(ref, vocabulary) -> Iterator[VllmEngine]:
    started = VllmEngine(VllmEngineConfig(max_model_len=2048, max_logprobs=vocabulary), ref)
    yield started
    started.close()


def test_captured_log_probs_are_those_of_a_forward_pass(engine, ref):
    outcomes = capture(engine, ref, tiny.chats(6))
    model = AutoModelForCausalLM.from_pretrained(ref.path, dtype=torch.float32)
    for outcome in outcomes:
        teacher = outcome.record.teacher
        with torch.no_grad():
            log_p = model(torch.tensor([teacher.input_ids])).logits[0].log_softmax(-1)
        shape = (len(teacher.positions), teacher.k)
        ids = np.frombuffer(teacher.ids, "<i4").reshape(shape)
        stored = np.frombuffer(teacher.log_probs, "<f2").astype(np.float64).reshape(shape)
        wanted = log_p[torch.tensor(teacher.positions) - 1].topk(teacher.k)
        assert (ids == wanted.indices.numpy()).all()
        assert np.abs(stored - wanted.values.numpy()).max() < 2**-10 * np.abs(stored).max(), "float16's own error"
        assert outcome.score == pytest.approx(float(wanted.values.exp().sum(-1).mean()), abs=1e-5)


def test_both_ways_of_scoring_options_agree(engine, ref, monkeypatch):
    """Options that are single tokens are read from the first one's distribution, others scored as continuations."""
    model = EngineLlm(engine, model="labeler@1", sampling=Sampling(), ref=ref)

    def labelled():
        return asyncio.run(PreferenceLabel(PreferenceLabelConfig(tie=0))(ROW, model))[0]

    read = labelled()
    monkeypatch.setattr(preference_label, "option_ids", lambda tokenizer, option: ())
    scored = labelled()
    assert [o.status for o in (read, scored)] == ["accepted"] * 2
    for order, log_probs in facts(read)["orders"].items():
        assert facts(scored)["orders"][order] == pytest.approx(log_probs, abs=1e-4)
    assert scored.record.num_prompt_tokens > read.record.num_prompt_tokens, "the second way scores both options"
