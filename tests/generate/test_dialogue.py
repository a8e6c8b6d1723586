"""Dialogues: each answer sees the turns before it and no others, and a simulated user ends where it should."""

import asyncio

import pytest
from scripted import Scripted, llm, prompt

from itune_ray.config.recipes import DialogueConfig
from itune_ray.data.records import Record
from itune_ray.generate.recipes.dialogue import Dialogue, read_user_turn


def turns(*texts: str, first: str = "user") -> tuple[dict[str, str], ...]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))


HUMAN = turns("Hi.", "Hello!", "How are you?", "Well.", "Bye.", "Goodbye.")
SYSTEM = {"role": "system", "content": "Be brief."}


def is_for_user(turn: str) -> bool:
    return "You are the user." in turn


def script(user="And {n}?", answer=None):
    """A teacher that says after which turn it speaks, and a user that counts the answers it has seen."""

    def reply(turn, index):
        if is_for_user(turn):
            said = turn.split("Conversation so far:")[1].count("Assistant:")
            return user(said) if callable(user) else user.format(n=said)
        return answer(turn) if callable(answer) else f"re: {turn}"

    return reply


def talk(row: Record, engine: Scripted, simulator: Scripted | None = None, **config):
    recipe = Dialogue(DialogueConfig(**config))
    recipe = recipe.bind({"user": llm(simulator, "user@1")}) if simulator else recipe
    (outcome,) = asyncio.run(recipe(row, llm(engine)))
    assert outcome.input_key == row.key
    return outcome


def test_replay_with_the_author_gives_the_dialogue_back():
    author = dict(zip((m["content"] for m in HUMAN[::2]), (m["content"] for m in HUMAN[1::2]), strict=True))
    for messages in (HUMAN, (SYSTEM, *HUMAN)):
        outcome = talk(prompt(messages=messages), Scripted(lambda turn, index: author[turn]))
        assert outcome.status == "accepted"
        assert outcome.record.messages == messages
        assert outcome.record.meta["dialogue"] == {"mode": "replay", "turns": 3}


@pytest.mark.parametrize("mode", ["replay", "self_chat"])
def test_each_request_holds_exactly_the_turns_before_its_answer(mode):
    engine = Scripted(script())
    row = prompt(messages=(SYSTEM, *HUMAN) if mode == "replay" else (SYSTEM, HUMAN[0]))
    messages = talk(row, engine, mode=mode, turns=3).record.messages
    requests = [r.messages for r in engine.asked if not is_for_user(r.messages[-1]["content"])]
    places = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    assert len(places) == 3
    assert requests == [messages[:place] for place in places]


def test_replay_answers_with_its_own_history_and_not_the_old_answers():
    engine = Scripted(script())
    outcome = talk(prompt(messages=HUMAN), engine)
    assert [m["content"] for m in outcome.record.messages[1::2]] == ["re: Hi.", "re: How are you?", "re: Bye."]
    assert not any(m["content"] in ("Hello!", "Well.") for r in engine.asked for m in r.messages)
    assert outcome.record.num_tokens == 2 + 4 + 2


def test_replay_answers_a_last_user_turn():
    outcome = talk(prompt(messages=HUMAN[:3]), Scripted(script()))
    assert [m["role"] for m in outcome.record.messages] == ["user", "assistant"] * 2


@pytest.mark.parametrize(
    ("reason", "messages"),
    [
        ("no_prompt", ()),
        ("no_prompt", (SYSTEM,)),
        ("no_prompt", turns("Hi.", "Hello!", " ", "Well.", "Bye.")),
        ("answer_without_question", turns("Hello!", "Hi.", "Well?", first="assistant")),
        ("answer_without_question", (*HUMAN[:2], HUMAN[1], HUMAN[2])),
    ],
)
def test_dialogues_that_cannot_be_replayed_are_rejected_unasked(reason, messages):
    engine = Scripted(script())
    outcome = talk(prompt(messages=messages), engine)
    assert (outcome.status, outcome.reason) == ("rejected", reason)
    assert not engine.asked


@pytest.mark.parametrize("mode", ["replay", "self_chat"])
@pytest.mark.parametrize(("reason", "reply"), [("truncated", ("No", "length")), ("empty", " ")])
def test_an_answer_that_is_cut_or_empty_rejects_the_dialogue(mode, reason, reply):
    def second_fails(turn):
        return f"re: {turn}" if turn == "Hi." else reply

    opening = HUMAN if mode == "replay" else HUMAN[:1]
    outcome = talk(prompt(messages=opening), Scripted(script(answer=second_fails)), mode=mode)
    assert (outcome.status, outcome.reason) == ("rejected", reason)
    assert outcome.raw


@pytest.mark.parametrize("mode", ["replay", "self_chat"])
def test_a_failed_call_fails_the_row(mode):
    outcome = talk(prompt(messages=HUMAN), Scripted(script(answer=lambda turn: OSError("gone"))), mode=mode)
    assert (outcome.status, outcome.cause) == ("failed", "gone")


def chatted(user, turns=4):
    outcome = talk(prompt("Hi."), Scripted(script(user)), mode="self_chat", turns=turns)
    assert outcome.status == "accepted"
    assert outcome.record.messages[-1]["role"] == "assistant"
    return outcome.record.meta["dialogue"], [m["content"] for m in outcome.record.messages[::2]]


def test_self_chat_runs_to_the_cap_of_turns():
    assert chatted("And {n}?") == (
        {"mode": "self_chat", "turns": 4, "ended": "turn_cap"},
        ["Hi.", "And 1?", "And 2?", "And 3?"],
    )
    assert chatted("And {n}?", turns=1)[1] == ["Hi."]


@pytest.mark.parametrize(
    ("ended", "second"),
    [
        ("end_marker", "[END]"),
        ("end_marker", "Thanks! [END]"),
        ("repeated", " HI. "),
        ("repeated", "and  1?"),
        ("empty_user", "  "),
        ("empty_user", "Assistant: I am fine."),
        ("user_truncated", ("And then", "length")),
    ],
)
def test_self_chat_ends_when_the_user_has_done(ended, second):
    about, said = chatted(lambda seen: "And 1?" if seen == 1 else second)
    assert about == {"mode": "self_chat", "turns": 2, "ended": ended}
    assert said == ["Hi.", "And 1?"]


def test_a_user_that_writes_both_roles_is_cut_at_the_role():
    _, said = chatted("User: And {n}?\n\n**Assistant**: It is so.\nUser: Why?", turns=2)
    assert said == ["Hi.", "And 1?"]
    assert read_user_turn("And?\nAssistant: It is", [], "[END]", is_cut=True).text == "And?"
    assert read_user_turn("Ask the user: is it so?", [], "[END]").text == "Ask the user: is it so?"


def test_the_user_sees_the_goal_and_stops_before_the_assistant_speaks():
    engine = Scripted(script())
    talk(prompt("Hi.", meta={"goal": "a cheap flight"}), engine, mode="self_chat", turns=2)
    (asked,) = [r for r in engine.asked if is_for_user(r.messages[-1]["content"])]
    assert "a cheap flight" in asked.messages[-1]["content"]
    assert "Assistant: re: Hi." in asked.messages[-1]["content"]
    assert asked.sampling.stop == ("\nAssistant:",)
    assert asked.sampling.max_tokens == 256


def test_a_user_model_of_its_own_is_asked_for_user_turns_alone():
    engine, simulator = Scripted(script()), Scripted(script())
    outcome = talk(prompt("Hi."), engine, simulator, mode="self_chat", turns=3)
    assert len(simulator.asked) == 2
    assert all(map(is_for_user, simulator.turns))
    assert not any(map(is_for_user, engine.turns))
    assert outcome.record.model == "teacher@1"


def test_a_row_that_asks_nothing_opens_no_chat():
    assert talk(prompt(" "), Scripted(script()), mode="self_chat").reason == "no_prompt"
