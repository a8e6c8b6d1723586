"""Thoughts kept, left out or cut: one switch for training, generation and evaluation."""

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import trl
from tokenizers import AddedToken

from itune_ray.config.base import digest, validate
from itune_ray.config.shared import HttpEngineConfig, ModelRef, ServedModel, ThinkingBudget
from itune_ray.data.chat import ChatRenderer, NoAnswer
from itune_ray.data.thinking import answer_of, within_budget
from itune_ray.engine.base import Completion, Request, Sample, Sampling
from itune_ray.engine.prompts import PromptEncoder
from itune_ray.engine.vllm import VllmEngine, without_thoughts
from itune_ray.errors import ConfigError
from itune_ray.model.render import model_renderer
from itune_ray.train.renderer import load_renderer

QWEN3 = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
ASK = {"role": "user", "content": "apple?"}
THOUGHT = {"role": "assistant", "content": "<think>\nlemon tiger piano\n</think>\n\nriver stone"}


def words():
    made = tiny.split_as_published(tiny.tokenizer(QWEN3))
    made.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    return made


def trained(renderer: ChatRenderer, *messages) -> str:
    ids, supervised = renderer.training_ids(messages)
    return renderer.tokenizer.decode([i for i, flag in zip(ids, supervised, strict=True) if flag])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("river", "river"),
        (" river\n", " river\n"),
        ("<think>a</think>river", "river"),
        ("<think>\na\n</think>\n\nriver", "river"),
        ("a\n</think>\n\nriver", "river"),
        ("<think>a", ""),
        ("<think>a</think>", ""),
        ("about <think> as a word", "about <think> as a word"),
    ],
)
def test_the_answer_is_what_follows_the_thought(text, answer):
    assert answer_of(text) == answer


def test_a_thought_is_cut_after_its_budget_and_the_answer_stays_whole():
    tokenizer = tiny.tokenizer()
    text = "<think>apple river stone</think> cloud maple tiger"
    assert within_budget(text, 99, tokenizer) == text
    count = len(tokenizer("apple river stone", add_special_tokens=False)["input_ids"])
    assert within_budget(text, count, tokenizer) == text
    for budget in range(1, count):
        cut = within_budget(text, budget, tokenizer)
        thought = cut.removeprefix("<think>").partition("</think>")[0]
        assert "apple river stone".startswith(thought)
        assert len(tokenizer(thought, add_special_tokens=False)["input_ids"]) == budget
        assert cut.endswith("</think> cloud maple tiger")
    assert within_budget("<think>apple river", 1, tokenizer) == "<think>apple river"


def test_kept_thoughts_are_trained_stripped_ones_are_not_and_budgets_cut_them():
    assert "lemon tiger piano" in trained(ChatRenderer(words()), ASK, THOUGHT)
    stripped = ChatRenderer(words(), thinking="strip")
    assert trained(stripped, ASK, THOUGHT) == "river stone<|im_end|>"
    cut = trained(ChatRenderer(words(), thinking=ThinkingBudget(budget=3)), ASK, THOUGHT)
    assert "piano" not in cut
    assert cut.endswith("</think>\n\nriver stone<|im_end|>")
    with pytest.raises(NoAnswer):
        stripped.training_ids([ASK, {"role": "assistant", "content": "<think>\nlemon"}])


def test_what_is_trained_follows_the_prompt_that_the_engine_gets():
    for thinking in ("keep", "strip", ThinkingBudget(budget=2)):
        renderer = ChatRenderer(words(), thinking=thinking)
        ids, supervised = renderer.training_ids([ASK, THOUGHT])
        asked = PromptEncoder(words(), None, 999, thinking).encode(Request(id="", sampling=Sampling(), messages=(ASK,)))
        assert ids[: supervised.index(True)] == asked
    assert renderer.tokenizer.decode(asked).endswith("assistant\n")
    closed = ChatRenderer(words(), thinking="strip").prompt_text([ASK])
    assert closed.endswith("<think>\n\n</think>\n\n")


def test_training_generation_and_evaluation_render_by_the_same_switch(tmp_path):
    words().save_pretrained(tmp_path)
    for thinking in ("keep", "strip", {"budget": 2}):
        job = tiny.job(tmp_path, **{"model.thinking": thinking})
        ours, theirs = load_renderer(job.model), model_renderer(job.model.reference())
        assert job.model.reference().thinking == job.model.thinking
        assert ours.training_ids([ASK, THOUGHT]) == theirs.training_ids([ASK, THOUGHT])
        assert ours.template_hash == theirs.template_hash
    assert len({ChatRenderer(words(), thinking=t).template_hash for t in ("keep", "strip")}) == 2


def test_a_stripped_reply_is_without_its_thought_and_keeps_its_tokens():
    sample = Sample(text="<think>lemon</think>\n\nriver", token_ids=(1, 2, 3), finish_reason="stop")
    (made,) = without_thoughts(Completion(id="a", samples=(sample,))).samples
    assert made == replace(sample, text="river")


def test_the_engine_strips_chats_only_and_passes_the_budget_on():
    async def complete(prompt, params, lora):
        seen.append(params.thinking_token_budget)
        part = SimpleNamespace(
            index=0, text="<think>lemon</think>river", token_ids=[1], finish_reason="stop", logprobs=None
        )
        return SimpleNamespace(outputs=[part], prompt_token_ids=[1], prompt_logprobs=None, num_cached_tokens=0)

    seen: list[int | None] = []
    chat = Request(id="", sampling=Sampling(), messages=(ASK,))
    text = Request(id="", sampling=Sampling(), text="apple")
    found = {}
    for name, thinking in (("keep", "keep"), ("strip", "strip"), ("cut", ThinkingBudget(budget=7))):
        engine = VllmEngine.__new__(VllmEngine)
        engine._backend = SimpleNamespace(complete=complete)
        engine._prompts, engine._thinking = PromptEncoder(words(), None, 999, thinking), thinking
        found[name] = [c.samples[0].text for c in asyncio.run(engine.generate([chat, text]))]
    whole = "<think>lemon</think>river"
    assert found == {"keep": [whole, whole], "strip": ["river", whole], "cut": [whole, whole]}
    assert seen == [None, None, None, None, 7, None]


def test_the_switch_is_part_of_the_id_only_where_it_is_set():
    plain, kept = (ModelRef(path="m", **given) for given in ({}, {"thinking": "keep"}))
    assert "thinking" not in plain.identity() == kept.identity()
    ids = {digest(ModelRef(path="m", thinking=t).identity()) for t in ("keep", "strip", {"budget": 1}, {"budget": 2})}
    assert len(ids) == 4


def test_an_endpoint_that_renders_itself_cannot_be_told():
    engine = HttpEngineConfig(url="https://example.org/v1")
    tree = {"model": {"path": "m", "thinking": "strip"}, "engine": engine.model_dump()}
    with pytest.raises(ConfigError, match=r"engine\.extra"):
        validate(ServedModel, tree, where="job")
