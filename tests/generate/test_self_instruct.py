"""Self-Instruct: parsing, filters and novelty by known answers; rounds that nothing can change."""

import asyncio
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from testdata import public_data

from itune_ray.config.generate import GenerateJob
from itune_ray.config.recipes import SelfInstructConfig
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.data.storage import Folder
from itune_ray.engine.base import Completion, Sample, Sampling
from itune_ray.errors import ConfigError, DataError
from itune_ray.generate.novelty import lcs, nearest, tokens_of
from itune_ray.generate.recipes.propose import Propose, parse
from itune_ray.generate.rounds import SelfInstruct
from itune_ray.generate.worker import outcomes_of
from itune_ray.observe.progress import Progress

SEEDS = [f"Explain seed topic number {i} in plain words." for i in range(12)]


def row(text: str, position: int = 0, source: str = "seeds") -> Record:
    return Record(source=source, position=position, messages=({"role": "user", "content": text},))


class Scripted:
    """A model that answers by a function of (prompt, key)."""

    model, sampling = "scripted@1", Sampling()

    def __init__(self, reply: Callable[[str, str], str], finish: str = "stop"):
        self._reply, self._finish = reply, finish
        self.asked: list[tuple[str, str]] = []

    def seed(self, key: str) -> int:
        return len(key)

    async def generate(self, messages: Any, *, key: str, sampling: Any = None, n: int = 1) -> Completion:
        self.asked.append((key, messages[-1]["content"]))
        text = self._reply(messages[-1]["content"], key)
        sample = Sample(text=text, token_ids=(1, 2), finish_reason=self._finish)  # type: ignore[arg-type]
        return Completion(id=key, samples=(sample,) * n, prompt_token_ids=(1,))


def proposals(config: SelfInstructConfig, reply: str, finish: str = "stop", pool: Sequence[str] = ()) -> list[Outcome]:
    recipe = Propose(config, [tokens_of(text) for text in pool])
    return asyncio.run(recipe(row("go on"), Scripted(lambda *_: reply, finish)))


@pytest.mark.parametrize(
    ("a", "b", "score", "near"),
    [
        ("Write a short poem about autumn leaves.", "Write a short poem about spring flowers.", 5 / 7, True),
        ("Explain how photosynthesis works.", "Explain how photosynthesis works to a child.", 8 / 11, True),
        ("the cat sat on the mat", "on the mat sat the cat", 0.5, False),
        ("a b c d e f g", "a b c d e f g h i j k l m", 0.7, False),
    ],
)
def test_rouge_l_by_known_answers(a, b, score, near):
    found = nearest(tokens_of(a), [tokens_of(b)], 0.7)
    assert found.score == pytest.approx(score, abs=1e-6)
    assert found.is_near is near


def test_lcs_equals_dynamic_programming():
    rng = random.Random(0)
    for _ in range(300):
        a, b = ([rng.choice("abcd") for _ in range(rng.randint(0, 90))] for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        assert lcs(a, b) == table[-1][-1]


def test_pruning_never_changes_the_nearest():
    rng = random.Random(1)
    pool = [tuple(rng.choice("abcdefgh") for _ in range(rng.randint(1, 12))) for _ in range(200)]
    for _ in range(100):
        candidate = tuple(rng.choice("abcdefgh") for _ in range(rng.randint(1, 12)))
        best = max(2 * lcs(candidate, other) / (len(candidate) + len(other)) for other in pool)
        assert nearest(candidate, pool, 0.7).score == pytest.approx(best)


def test_a_list_is_parsed_and_each_item_ends_with_its_reason():
    reply = (
        "name three rivers of the USA.\n10. draw a picture of a house at night\n11. Say hi\n"
        "12. ... what now is this\n13. Explain seed topic number 3 in plain words\n14. Compare two   novels\nyou like."
    )
    outcomes = proposals(SelfInstructConfig(), reply, pool=SEEDS)
    assert [(o.status, o.reason) for o in outcomes] == [
        ("accepted", None),
        ("rejected", "blocked_word"),
        ("rejected", "too_short"),
        ("rejected", "odd_start"),
        ("rejected", "not_novel"),
        ("accepted", None),
    ]
    assert outcomes[0].record.messages[-1]["content"] == "Name three rivers of the USA.", (
        "only the first letter changes"
    )
    assert outcomes[5].record.messages[-1]["content"] == "Compare two novels you like."
    assert [o.record.key for o in outcomes] == [f"seeds:0:{i}" for i in range(6)]


def test_the_published_reply_gives_the_published_instruction():
    case = json.loads(public_data("methods/data_fixtures.json").read_text())["D08"]["instruction_parse"]
    outcomes = proposals(SelfInstructConfig(), case["completion"])
    kept = [o.record.messages[-1]["content"] for o in outcomes if o.status == "accepted"]
    assert kept == case["ours_stop"]
    assert [o.reason for o in outcomes] == [
        None,
        "too_short",
        "blocked_start",
        "blocked_word",
        "odd_start",
        "blocked_word",
        "too_short",
    ]
    assert [o.reason for o in proposals(SelfInstructConfig(), case["completion"], "length")] == ["truncated"]


def test_a_cut_reply_is_discarded_whole_and_an_empty_one_is_unparsable():
    assert [o.reason for o in proposals(SelfInstructConfig(), "Name a river. 10. Na", "length")] == ["truncated"]
    assert [o.reason for o in proposals(SelfInstructConfig(), " \n ")] == ["unparsable"]
    assert parse("one\ninstruction here", "single") == ["one instruction here"]


def job(**recipe: Any) -> GenerateJob:
    return GenerateJob.model_validate(
        {
            "name": "si",
            "seed": 3,
            "prompts": [{"type": "playground", "split": "prompts", "rows": 1}],
            "teacher": {"model": {"path": "any"}, "engine": {"type": "fake"}},
            "recipe": {"type": "self_instruct", "calls": 10, "style": "single", **recipe},
        }
    )


def invention(_: str, key: str) -> str:
    """Some proposals repeat each other, most are new; answers echo."""
    number = sum(map(ord, key)) % 23
    words = random.Random(number).sample(["river", "stone", "cloud", "maple", "tiger", "lemon", "piano", "rocket"], 6)
    return " ".join([f"Task{number}", *words])


def run(folder: Folder, llm: Scripted, shuffle: int = 0, stop_after: int | None = None, **recipe: Any) -> Any:
    """Rounds over a stream that is shuffled and may die after some inputs."""
    left = [stop_after]

    def stream_of(recipe_: Any, sampling: Any, ledger: Any) -> Any:
        def stream(pending: Sequence[Record]) -> Iterator[list[Outcome]]:
            order = list(pending)
            random.Random(shuffle).shuffle(order)
            for record in order:
                if left[0] == 0:
                    raise KeyboardInterrupt
                left[0] = None if left[0] is None else left[0] - 1
                yield asyncio.run(outcomes_of(recipe_, record, llm))

        return stream

    seeds = [row(text, i) for i, text in enumerate(SEEDS)]
    loop = SelfInstruct(job(**recipe), seeds, folder, stream_of, Progress(quiet=True))
    return loop, loop.run()


def table(outcomes: list[Outcome]) -> list[str]:
    return [str(o.to_row()) for o in outcomes]


def test_rounds_do_not_depend_on_the_order_in_which_calls_end(tmp_path):
    one, first = run(Folder.at(tmp_path / "a"), Scripted(invention), 1, rounds=3)
    two, second = run(Folder.at(tmp_path / "b"), Scripted(invention), 2, rounds=3)
    assert table(first) == table(second)
    assert one.facts() == two.facts()
    assert sum(done["accepted"] for done in one.facts()) == sum(o.status == "accepted" for o in first) > 5
    assert any(o.reason == "not_novel" for o in first)


def test_every_candidate_ends_once_and_its_parents_come_from_earlier_rounds(tmp_path):
    loop, outcomes = run(Folder.at(tmp_path), Scripted(invention), rounds=3)
    keys = [o.record.key for o in outcomes]
    assert len(set(keys)) == len(keys) == sum(done.proposed for done in loop.rounds)
    made = {o.record.key: o.record.round for o in outcomes if o.status == "accepted"}
    seeds = {f"seeds:{i}:0" for i in range(len(SEEDS))}
    from_machine = 0
    for outcome in outcomes:
        for parent in outcome.record.parents:
            assert parent in seeds or made[parent] < outcome.record.round
            from_machine += parent not in seeds
    assert from_machine > 0, "later rounds show what earlier ones made"


def test_accepted_instructions_are_all_new_to_each_other(tmp_path):
    _, outcomes = run(Folder.at(tmp_path), Scripted(invention), rounds=2, novelty=0.6)
    kept = [tokens_of(o.record.prompt[-1]["content"]) for o in outcomes if o.status == "accepted"]
    for i, tokens in enumerate(kept):
        assert not nearest(tokens, kept[:i], 0.6).is_near
        assert not nearest(tokens, map(tokens_of, SEEDS), 0.6).is_near


def test_near_copies_of_the_seeds_give_nothing(tmp_path):
    llm = Scripted(lambda _, key: f"Explain seed topic number {len(key)} in plain words, please.")
    _, outcomes = run(Folder.at(tmp_path), llm, rounds=1)
    assert {o.reason for o in outcomes} == {"not_novel"}


def test_killed_anywhere_it_ends_alike_and_asks_nothing_twice(tmp_path):
    _, calm = run(Folder.at(tmp_path / "calm"), Scripted(invention), rounds=3)
    for kill in (4, 13, 24, 33):
        folder, llm = Folder.at(tmp_path / f"killed-{kill}"), Scripted(invention)
        with pytest.raises(KeyboardInterrupt):
            run(folder, llm, stop_after=kill, rounds=3)
        _, outcomes = run(folder, llm, rounds=3)
        assert table(outcomes) == table(calm)
        assert len(llm.asked) == len(set(llm.asked)), "no settled call is asked again"


def test_rounds_end_at_the_target_and_below_the_floor(tmp_path):
    loop, _ = run(Folder.at(tmp_path / "target"), Scripted(invention), rounds=5, target=4)
    assert len(loop.rounds) == 1
    copies = Scripted(lambda *_: SEEDS[0])
    loop, _ = run(Folder.at(tmp_path / "floor"), copies, rounds=5, min_acceptance=0.1)
    assert len(loop.rounds) == 1


def test_bad_input_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"no such template file; got 'nowhere\.jinja'"):
        Propose(SelfInstructConfig(template="nowhere.jinja"))
    with pytest.raises(DataError, match="self_instruct has no seed instruction"):
        SelfInstruct(job(), [], Folder.at(tmp_path), lambda *_: None, Progress(quiet=True))  # type: ignore[arg-type]
