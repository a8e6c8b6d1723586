"""Magpie: what is continued is the opening of a user's turn, and each instruction ends by itself."""

import tiny
from scripted import Scripted, llm, prompt, run

from itune_ray.config.recipes import MagpieConfig
from itune_ray.data.chat import ChatRenderer
from itune_ray.engine.base import Request
from itune_ray.generate.recipes.magpie import Magpie

INSTRUCTIONS = ["Name three rivers of Europe.", "", "Hi there.", "word " * 301, "Why is the sea salt?"]


def script(turn: str, index: int):
    """Instructions where no turn is given, else an answer."""
    if turn:
        return "cut off", "length" if turn == INSTRUCTIONS[4] else "stop"
    return INSTRUCTIONS[index]


def test_the_opening_ends_where_a_user_speaks():
    tokenizer = tiny.tokenizer()
    renderer = ChatRenderer(tokenizer)
    for system in ((), ({"role": "system", "content": "apple"},)):
        opening = renderer.user_opening_ids(system)
        whole = renderer.prompt_ids([*system, {"role": "user", "content": "river"}])
        assert whole[: len(opening)] == opening
        assert "river" in tokenizer.decode(whole[len(opening) :])
        assert "user" in tokenizer.decode(opening)


def test_every_instruction_drawn_ends_by_itself():
    outcomes = run(Magpie(MagpieConfig(samples=5)), prompt("left out"), script)
    assert [o.reason for o in outcomes] == [None, "empty", "too_short", "too_long", "truncated"]
    first = outcomes[0].record
    assert [m["content"] for m in first.messages] == [INSTRUCTIONS[0], "cut off"]
    assert len({o.record.key for o in outcomes}) == 5


def test_an_instruction_that_was_cut_is_none():
    (outcome,) = run(Magpie(MagpieConfig()), prompt(), lambda turn, index: ("What is", "length"))
    assert outcome.reason == "truncated"
    assert outcome.raw == "What is"


def test_a_system_message_steers_and_stays():
    import asyncio

    engine = Scripted(lambda turn, index: "Name three rivers of Europe.")
    chat = ({"role": "system", "content": "You know geography."}, {"role": "user", "content": "left out"})
    (outcome,) = asyncio.run(Magpie(MagpieConfig())(prompt(messages=chat), llm(engine)))
    assert [m["role"] for m in outcome.record.messages] == ["system", "user", "assistant"]
    first: Request = engine.asked[0]
    assert first.messages is None
    assert first.token_ids
