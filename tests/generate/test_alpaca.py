"""Alpaca's triples: the published parse, each item's end, and rounds that show seeds only."""

import asyncio
import json
import random

import pytest
from pydantic import TypeAdapter, ValidationError
from scripted import Scripted as Engine
from scripted import answered, llm, prompt, run
from testdata import public_data

from itune_ray.config.generate import GenerateJob
from itune_ray.config.recipes import AlpacaConfig, RecipeConfig
from itune_ray.data.storage import Folder
from itune_ray.errors import DataError
from itune_ray.generate.novelty import tokens_of
from itune_ray.generate.recipes.alpaca import Alpaca, Triple, split_items, triple_of
from itune_ray.generate.rounds import SelfInstruct
from itune_ray.generate.worker import outcomes_of
from itune_ray.observe.progress import Progress

SEEDS = [answered(f"Explain seed topic number {i}.\n\ninput {i}", f"Answer {i}.", i) for i in range(6)]
WORDS = ["river", "stone", "cloud", "maple", "tiger", "lemon", "piano", "rocket"]


def item(number: int, instruction: str, input: str = "<noinput>", output: str = "An answer.") -> str:
    return f"{number}. Instruction: {instruction}\n{number}. Input:\n{input}\n{number}. Output:\n{output}"


def triples(outcomes):
    found = (triple_of(o.record) for o in outcomes if o.status == "accepted")
    return [{"instruction": t.instruction, "input": t.input, "output": t.output} for t in found]


def test_the_published_reply_gives_the_published_triples():
    case = json.loads(public_data("methods/data_fixtures.json").read_text())["D09"]
    recipe, reply = Alpaca(AlpacaConfig(examples=case["n_prompt"])), case["completion"]
    outcomes = run(recipe, prompt(), lambda *_: reply)
    assert triples(outcomes) == case["stop"]
    assert [o.reason for o in outcomes] == [None, None, "misnumbered", "blocked_word"]
    assert outcomes[2].raw.startswith("7. Instruction: Misnumbered")
    two = "###".join(reply.split("###")[:2])
    assert triples(run(recipe, prompt(), lambda *_: two)) == case["stop"]
    cut = run(recipe, prompt(), lambda *_: (two, "length"))
    assert triples(cut) == case["length_first_two"]
    assert [o.reason for o in cut] == [None, "truncated"]


def test_an_input_follows_its_instruction_after_a_blank_line():
    (outcome,) = run(Alpaca(AlpacaConfig()), prompt(), lambda *_: item(4, "Name  the\nlarger number.", "a\n\nb", "c"))
    assert [m["content"] for m in outcome.record.messages] == ["Name the larger number.\n\na\n\nb", "c"]
    assert triple_of(outcome.record) == Triple("Name the larger number.", "a\n\nb", "c")


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (item(4, "Too few words."), "too_short"),
        (item(4, "word " * 151), "too_long"),
        (item(4, "Describe this flowchart in your words."), "blocked_word"),
        (item(4, "Write a program that sorts numbers."), "blocked_start"),
        (item(4, "...and now tell a story."), "odd_start"),
        (item(4, "Tell a story about rain.", output=""), "empty_output"),
        (item(4, "", "x"), "empty"),
        (item(5, "Tell a story about rain."), "misnumbered"),
        ("Tell a story about rain.", "misnumbered"),
        ("4. Instruction: Tell a story.\n4. Output:\nx\n4. Input:\ny", "misnumbered"),
        ("  ", "unparsable"),
    ],
)
def test_each_rule_rejects_its_item(reply, reason):
    outcomes = run(Alpaca(AlpacaConfig()), prompt(), lambda *_: reply)
    assert [(o.status, o.reason) for o in outcomes] == [("rejected", reason)]


def test_an_answer_may_hold_years_and_headings():
    reply = "\n###\n".join([item(4, "When were the games held?", output="In 2020.\n### Later\nIn 2024."), item(5, "x")])
    (first, _), (second, _) = split_items(reply, 4)
    assert first == Triple("When were the games held?", "", "In 2020.\n### Later\nIn 2024.")
    assert second == Triple("x", "", "An answer.")


def test_novelty_looks_at_the_instruction_alone():
    pool = [tokens_of("Explain how photosynthesis works.")]
    near = item(4, "Explain how photosynthesis works to a child.", "an input of many other words " * 5)
    (outcome,) = run(Alpaca(AlpacaConfig(), pool), prompt(), lambda *_: near)
    assert outcome.reason == "not_novel"
    assert outcome.score == pytest.approx(0.727273, abs=1e-6)


def test_the_prompt_opens_the_next_item_under_its_number():
    asked = Alpaca(AlpacaConfig()).asked([*SEEDS[:2], answered("Tell a joke about rain.", "Drip.")])
    assert asked.endswith("\n3. Output:\nDrip.\n###\n4. Instruction:")
    assert "1. Instruction: Explain seed topic number 0.\n1. Input:\ninput 0\n1. Output:\nAnswer 0.\n###\n" in asked
    assert "3. Input:\n<noinput>\n" in asked
    assert "up to number 20" in asked


def job(**recipe):
    return GenerateJob.model_validate(
        {
            "name": "alpaca",
            "prompts": [{"type": "playground", "split": "chat", "rows": 1}],
            "teacher": {"model": {"path": "any"}, "engine": {"type": "fake"}},
            "recipe": {"type": "alpaca", "calls": 6, **recipe},
        }
    )


def loop(folder, **recipe):
    rng = random.Random(0)
    drawn = [" ".join(rng.sample(WORDS, 5)) for _ in range(99)]
    engine = Engine(lambda turn, index: "\n###\n".join(item(k, f"Task {drawn.pop()}") for k in (4, 5)))

    def stream_of(bound, sampling, ledger):
        return lambda pending: (asyncio.run(outcomes_of(bound, record, llm(engine))) for record in pending)

    rounds = SelfInstruct(job(**recipe), SEEDS, Folder.at(folder), stream_of, Progress(quiet=True))
    return rounds, rounds.run(), engine


def test_rounds_ask_for_no_answers_and_show_seeds_only(tmp_path):
    rounds, outcomes, engine = loop(tmp_path, rounds=3, novelty=0.9)
    accepted = [o for o in outcomes if o.status == "accepted"]
    assert len(engine.turns) == 18, "one call makes whole rows"
    assert len(accepted) == sum(r.accepted for r in rounds.rounds) > 10
    assert len({o.record.key for o in outcomes}) == len(outcomes) == 36
    assert {o.record.round for o in accepted} == {1, 2, 3}
    assert {parent for o in outcomes for parent in o.record.parents} <= {seed.key for seed in SEEDS}
    assert all(o.record.response == "An answer." and o.record.recipe == "alpaca" for o in accepted)
    shown = [line for turn in engine.turns for line in turn.splitlines() if ". Instruction: " in line]
    assert len(shown) == 54
    assert all("Explain seed topic" in line for line in shown)


def test_accepted_triples_are_new_to_each_other_and_to_the_seeds(tmp_path):
    _, outcomes, _ = loop(tmp_path, rounds=2, novelty=0.4)
    reasons = {o.reason for o in outcomes}
    assert reasons == {None, "not_novel"}


def test_bad_input_is_one_line(tmp_path):
    with pytest.raises(ValidationError, match="list_length 3 leaves no task to write after 3 examples"):
        TypeAdapter(RecipeConfig).validate_python({"type": "alpaca", "list_length": 3})
    with pytest.raises(DataError, match=r"alpaca has no seed instruction.*user turn and an answer"):
        SelfInstruct(job(), [prompt()], Folder.at(tmp_path), lambda *_: None, Progress(quiet=True))
