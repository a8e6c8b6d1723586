"""A thinking budget on real vLLM: thoughts end after so many tokens, and the answer follows."""

import pytest
import tiny
from engine_contract import on_loop
from transformers import AutoModelForCausalLM, AutoTokenizer

from itune_ray.config.shared import ModelRef, VllmEngineConfig
from itune_ray.data.thinking import CLOSE, OPEN, answer_of
from itune_ray.engine.base import Request, Sampling
from itune_ray.engine.vllm import VllmEngine
from itune_ray.model.added_tokens import add_tokens, embed_new_tokens

pytestmark = pytest.mark.real
BUDGET = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose chat template opens a thought."""
    made = tiny.llama(tmp_path_factory.mktemp("thinker"))
    model, words = AutoModelForCausalLM.from_pretrained(made), AutoTokenizer.from_pretrained(made)
    add_tokens(words, [OPEN, CLOSE])
    embed_new_tokens(model, words, [OPEN, CLOSE])
    words.chat_template = tiny.CHATML.replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}"
    )
    model.save_pretrained(made)
    words.save_pretrained(made)
    return made


def test_chats_think_for_so_many_tokens_and_texts_as_they_like(folder, loop):
    config = VllmEngineConfig(kv_cache_gb=0.1, max_model_len=128)
    engine = VllmEngine(config, ModelRef(path=str(folder), dtype="float32", thinking={"budget": BUDGET}))
    close = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(CLOSE)
    sampling = [Sampling(temperature=1.0, max_tokens=20, ignore_end=True, seed=seed) for seed in range(4)]
    chats = [
        Request(id=f"c{i}", sampling=s, messages=({"role": "user", "content": "apple?"},))
        for i, s in enumerate(sampling)
    ]
    texts = [Request(id=f"t{i}", sampling=s, text="apple") for i, s in enumerate(sampling)]
    try:
        done = on_loop(loop, engine.generate([*chats, *texts]))
    finally:
        engine.close()
    assert not any(completion.error for completion in done)
    for completion in done[:4]:
        (sample,) = completion.samples
        assert close in sample.token_ids[: BUDGET + 1]
        assert answer_of(sample.text) == sample.text.rpartition(CLOSE)[2].lstrip("\n") != ""
    assert all(close not in completion.samples[0].token_ids for completion in done[4:])
