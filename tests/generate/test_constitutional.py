"""Constitutional revisions: each step takes harm away, principles are drawn evenly, and what is no revision is none."""

import json
from collections import Counter

import pytest
from scripted import Scripted, llm, prompt, run

from itune_ray.config.recipes import ConstitutionalConfig
from itune_ray.errors import ConfigError
from itune_ray.generate.recipes.constitutional import Constitutional

BAD = "badly "


def conversation(turn: str) -> str:
    """The case at hand, which comes after the worked ones."""
    return turn.rsplit("### Conversation\n", 1)[1]


def kind(turn: str) -> str:
    if "### Conversation" not in turn:
        return "answer"
    return "revision" if turn.rstrip().endswith("### Revision") else "critique"


def script(revise=None, critique="There is harm in it.", answer=BAD * 6 + "done."):
    """A model that takes one bad word out of an answer per revision."""

    def reply(turn, index):
        if kind(turn) == "answer":
            return answer
        if kind(turn) == "critique":
            return critique
        old = conversation(turn).split("Assistant: ", 1)[1].split("\n\n### ", 1)[0]
        return revise(old) if revise else old.replace(BAD, "", 1)

    return reply


def made(row=None, words=None, sampling=None, **config):
    return run(
        Constitutional(ConstitutionalConfig(**config)), row or prompt("How?"), script(**words or {}), **sampling or {}
    )


def asked(**config) -> Scripted:
    import asyncio

    engine = Scripted(script())
    asyncio.run(Constitutional(ConstitutionalConfig(**config))(prompt("How?"), llm(engine, stop=("STOP",))))
    return engine


def test_harm_falls_with_every_revision_and_each_is_a_row():
    outcomes = made()
    assert [o.record.response.count(BAD) for o in outcomes] == [5, 4, 3, 2]
    assert [o.record.round for o in outcomes] == [1, 2, 3, 4]
    assert [o.record.parents[0] for o in outcomes] == ["s:0:0", *(o.record.key for o in outcomes[:-1])]
    assert len({o.record.key for o in outcomes}) == 4
    facts = [o.record.meta["constitutional"] for o in outcomes]
    assert [len(f["principles"]) for f in facts] == [1, 2, 3, 4]
    assert {(f["critique"], f["unchanged"]) for f in facts} == {("There is harm in it.", False)}


def test_four_critiques_and_four_revisions_per_prompt_and_half_without_critiques():
    assert Counter(map(kind, asked().turns)) == {"answer": 1, "critique": 4, "revision": 4}
    direct = asked(direct_revision=True)
    assert Counter(map(kind, direct.turns)) == {"answer": 1, "revision": 4}
    assert not any("### Critique" in turn for turn in direct.turns)


def test_a_revision_sees_the_critique_and_stops_at_the_next_heading():
    engine = asked(revisions=1)
    answer, _, revision = engine.asked
    assert "There is harm in it." in conversation(engine.turns[2])
    assert revision.sampling.stop == ("STOP", "\n### Conversation", "\n### Critique", "\n### Revision")
    assert answer.sampling.stop == ("STOP",)
    assert revision.sampling.temperature == 1.0


def test_a_partial_dialogue_is_shown_whole_and_kept():
    turns = tuple(
        {"role": role, "content": f"{role} {number}"}
        for number, role in enumerate(("system", "user", "assistant", "user"))
    )
    (outcome,) = made(prompt(messages=turns), {"revise": lambda old: "Better."}, revisions=1)
    assert outcome.record.messages == (*turns, {"role": "assistant", "content": "Better."})


def test_a_revision_with_headings_is_rejected_and_the_next_starts_from_before():
    replies = iter(["Fine.\n### Critique request\nMore", "Good."])
    first, second = made(None, {"revise": lambda old: next(replies)}, revisions=2)
    assert (first.status, first.reason) == ("rejected", "scaffold")
    assert first.raw.startswith("Fine.")
    assert second.record.response == "Good."
    assert second.record.parents == ("s:0:0",)
    assert len(second.record.meta["constitutional"]["principles"]) == 1


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("empty", {"critique": "  "}),
        ("truncated", {"critique": ("There is", "length")}),
        ("empty", {"revise": lambda old: ""}),
        ("truncated", {"revise": lambda old: ("Do", "length")}),
        ("truncated", {"answer": ("Do", "length")}),
        ("empty", {"answer": ""}),
    ],
)
def test_what_is_cut_or_empty_is_rejected(reason, words):
    assert {(o.status, o.reason) for o in made(None, words)} == {("rejected", reason)}


def test_an_unchanged_revision_is_kept_and_marked():
    outcomes = made(None, {"revise": lambda old: old}, revisions=2)
    assert [o.status for o in outcomes] == ["accepted"] * 2
    assert all(o.record.meta["constitutional"]["unchanged"] for o in outcomes)


def test_only_a_revised_answer_stops_being_unsafe():
    row = prompt("How?", meta={"unsafe": True, "topic": "x"})
    assert [o.record.meta.get("unsafe") for o in made(row)] == [None] * 4
    assert {o.record.meta.get("unsafe") for o in made(row, {"revise": lambda old: old})} == {True}
    assert {o.record.meta.get("unsafe") for o in made(row, {"revise": lambda old: ""})} == {True}
    assert made(row)[0].record.meta["topic"] == "x"


def test_a_failed_call_fails_the_whole_input():
    outcomes = made(None, {"critique": OSError("gone")})
    assert [(o.status, o.cause) for o in outcomes] == [("failed", "gone")] * 4


def drawn(rows: int) -> list[str]:
    return [made(prompt("How?", i))[-1].record.meta["constitutional"]["principles"] for i in range(rows)]


def test_principles_are_drawn_evenly_and_by_row_and_step():
    per_row = drawn(300)
    for step in range(4):
        counts = Counter(row[step] for row in per_row)
        assert len(counts) == 16
        assert sum((n - 300 / 16) ** 2 / (300 / 16) for n in counts.values()) < 37.7  # χ², 15 degrees, p = 0.001
    assert len({tuple(row) for row in per_row}) > 290, "steps are drawn apart"
    assert per_row == drawn(300)


def test_the_built_in_principles_are_at_least_sixteen_and_distinct():
    principles = Constitutional(ConstitutionalConfig())._principles
    assert len(principles) >= 16
    assert len({p.critique for p in principles}) == len({p.revision for p in principles}) == len(principles)


def test_principles_of_the_user(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("principles:\n- {id: short, critique: 'Is it long?', revision: Make it short.}\n")
    outcomes = made(principles=str(file), revisions=2)
    assert outcomes[1].record.meta["constitutional"]["principles"] == ["short", "short"]
    recipe = Constitutional(ConstitutionalConfig(principles=str(file)))
    assert "Make it short." in recipe.prompts["principles"]
    assert "raisins" in recipe.prompts["examples"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("principles: []", "wrong at principles: .*at least 1"),
        ("[1", "is no YAML"),
        ('{"principles": [{"id": "a", "critique": "x"}]}', r"principles\.0\.revision: Field required"),
        (json.dumps({"principles": [{"id": "a", "critique": "x", "revision": "y"}] * 2}), "have the same id"),
    ],
)
def test_wrong_principles_are_told_before_anything_runs(text, message, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Constitutional(ConstitutionalConfig(principles=str(file)))


def test_a_missing_file_of_principles_is_told():
    with pytest.raises(ConfigError, match="no such file of principles"):
        Constitutional(ConstitutionalConfig(principles="/none.yaml"))


def test_principles_decide_the_identity_by_what_they_say(tmp_path):
    from itune_ray.data.fingerprint import content_identity

    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.write_text("principles: []")
    other.write_text("principles: []")
    first, second = (content_identity({"principles": str(file)}) for file in (one, other))
    assert first == second
    other.write_text("principles: [1]")
    assert content_identity({"principles": str(other)}) != first
