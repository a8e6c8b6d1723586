"""Options of one token and of several: both ways of scoring agree on a real engine, and one reads the prefix cache."""

import asyncio
import math

import pytest
import tiny

from itune_ray.config.shared import ModelRef, VllmEngineConfig
from itune_ray.engine.base import Sampling
from itune_ray.engine.choice import choose, continued
from itune_ray.engine.fake import FakeEngine
from itune_ray.engine.llm import EngineLlm

PROMPT = [5 + i % 40 for i in range(200)]
SINGLES = ((7,), (8,), (9,), (7,))
SEVERAL = ((7, 8), (9, 10, 11))


def test_an_engine_that_gives_none_has_no_value():
    model = EngineLlm(FakeEngine(), model="fake@1", sampling=Sampling())
    choice = asyncio.run(choose(model, PROMPT, [(7,), (7, 8)], key="k"))
    assert choice.log_probs[0] < 0
    assert math.isnan(choice.log_probs[1]), "the fake's prompt tokens are words, not these"
    with pytest.raises(ValueError, match="no token"):
        asyncio.run(choose(model, PROMPT, [(7,), ()], key="k"))


@pytest.mark.real
def test_both_ways_agree_and_single_tokens_read_the_cache(tmp_path):
    from itune_ray.engine.vllm import VllmEngine

    ref = ModelRef(path=str(tiny.llama(tmp_path / "m", max_position_embeddings=512)), dtype="float32")
    engine = VllmEngine(VllmEngineConfig(max_model_len=512), ref)
    model = EngineLlm(engine, model="m@1", sampling=Sampling(temperature=0.7))

    async def asked():
        first = await choose(model, PROMPT, [*SINGLES, *SEVERAL], key="a")
        again = await choose(model, PROMPT, SINGLES, key="b")
        return first, again, [(await continued(model, PROMPT, o, key="c"))[0] for o in (*SINGLES, *SEVERAL)]

    try:
        first, again, slowly = asyncio.run(asked())
    finally:
        engine.close()
    assert first.log_probs == pytest.approx(slowly, abs=1e-4)
    assert again.log_probs == pytest.approx(slowly[:4], abs=1e-4)
    assert [len(first.completions), len(again.completions)] == [1 + len(SEVERAL), 1]
    assert again.completions[0].num_cached_tokens >= 100
