"""Decontamination: rows that hold a benchmark's text go, with its key (methods D37)."""

import gzip
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from testdata import public_data

from itune_ray.config.base import validate
from itune_ray.config.curate import CurateJob
from itune_ray.config.shared import FileSource
from itune_ray.curate.filters import load_filter
from itune_ray.data.fingerprint import content_identity
from itune_ray.data.records import Record
from itune_ray.data.sources import read_source
from itune_ray.errors import DataError

QUESTION = "A farmer keeps 12 hens, 3 goats and one very old dog; how many legs are in the yard at noon?"
ANSWER = "There are forty legs in the yard because hens have two legs each and the others have four"


def bench(file: Path, rows: list[dict[str, Any]], layout: str = "fields") -> dict[str, Any]:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"type": "file", "path": str(file), "format": layout}


def config_of(against: list[dict[str, Any]], **config: Any) -> Any:
    section = {"type": "decontaminate", "against": against, **config}
    job = {"name": "x", "inputs": [{"source": {"type": "file", "path": "x"}}], "filters": [section]}
    return validate(CurateJob, job, "x").filters[0]


def made(against: list[dict[str, Any]], **config: Any) -> Any:
    return load_filter(config_of(against, **config))


def row(*turns: str, **fields: Any) -> Record:
    messages = tuple(
        {"role": role, "content": text}
        for role, text in zip(itertools.cycle(["user", "assistant"]), turns, strict=False)
    )
    return Record(source="s", position=0, messages=messages, **fields)


def test_a_leak_in_any_part_of_a_row_names_the_benchmarks_row(tmp_path):
    found = made(
        [bench(tmp_path / "b.jsonl", [{"question": "Something else that nobody asks here"}, {"question": QUESTION}])]
    )
    clean = row("Hello there, how are you?", "Fine.")
    leaks = [
        row(QUESTION, "40"),
        row("Solve: " + QUESTION.upper(), "40"),
        row("hi", QUESTION),
        row("hi", "hello", "and " + QUESTION, "40"),
        row("hi", "hello", rejected=QUESTION),
        Record(source="s", position=0, text=f"once {QUESTION} twice"),
        Record(source="s", position=0, meta={"stem": QUESTION}),
    ]
    assert found.keep(clean).keep
    for leak in leaks:
        verdict = found.keep(leak)
        assert (verdict.keep, verdict.reason, verdict.score, verdict.of) == (False, "contaminated", 1.0, "b:1:0")


def test_a_part_below_the_threshold_stays_and_is_told(tmp_path):
    words = [f"t{i}" for i in range(20)]
    against = [bench(tmp_path / "b.jsonl", [{"question": " ".join(words)}])]
    part = row(" ".join(words[:10]), "a")
    verdict = made(against).keep(part)
    assert (verdict.keep, verdict.meta) == (True, {"overlap": {"row": "b:0:0", "score": 0.5}})
    assert made(against, threshold=0.49).keep(part).score == pytest.approx(0.5)
    assert made(against, threshold=0).keep(row(" ".join(words[:8]), "a")).reason == "contaminated"
    assert made(against, threshold=0).keep(row(" ".join(words[:7]), "a")).keep


def test_which_columns_are_compared(tmp_path):
    other = "What is the tallest mountain that one can see from here on a clear day?"
    against = [
        bench(tmp_path / "b.jsonl", [{"QUESTION": QUESTION, "hint": other, "choices": [ANSWER, 3], "empty": None}])
    ]
    assert not made(against).keep(row(QUESTION)).keep
    assert made(against).keep(row(other)).keep
    assert not made(against, fields=["hint"]).keep(row(other)).keep
    assert made(against, fields=["hint"]).keep(row(QUESTION)).keep
    assert made(against, fields=["QUESTION", "hint"], threshold=0.4).keep(row(other)).score == pytest.approx(0.5)
    assert not made(against, fields=["choices"]).keep(row("q", ANSWER)).keep
    unusual = [bench(tmp_path / "c.jsonl", [{"stem": QUESTION, "options": {"A": "yes", "B": "no"}}])]
    assert not made(unusual, threshold=0).keep(row(QUESTION)).keep


@pytest.mark.parametrize("layout", ["fields", "alpaca"])
def test_answers_and_the_border_of_question_and_answer(tmp_path, layout):
    rows = [{"instruction": QUESTION, "output": ANSWER}]
    against = [bench(tmp_path / "b.jsonl", rows, layout)]
    border = " ".join([*QUESTION.split()[-4:], *ANSWER.split()[:4]])
    by_query, by_label, by_both = (made(against, threshold=0, compare=c) for c in ("query", "label", "both"))
    assert [f.keep(row("q", ANSWER)).keep for f in (by_query, by_label, by_both)] == [True, False, False]
    assert [f.keep(row(QUESTION, "a")).keep for f in (by_query, by_label, by_both)] == [False, True, False]
    assert [f.keep(row(border)).keep for f in (by_query, by_label, by_both)] == [True, False, False]
    split = row(" ".join(QUESTION.split()[-4:]), " ".join(ANSWER.split()[:4]))
    assert [f.keep(split).keep for f in (by_query, by_label, by_both)] == [True, False, False]


def test_filtering_again_changes_nothing_and_the_index_travels(tmp_path):
    found = made([bench(tmp_path / "b.jsonl", [{"question": QUESTION}])])
    (tmp_path / "b.jsonl").rename(tmp_path / "moved.jsonl")
    with pytest.raises(DataError, match="no such file"):
        found.prepare()
    (tmp_path / "moved.jsonl").rename(tmp_path / "b.jsonl")
    found.prepare()
    (tmp_path / "b.jsonl").unlink()
    again = pickle.loads(pickle.dumps(found))
    assert again.keep(row(QUESTION)) == found.keep(row(QUESTION))
    assert (
        again.facts()
        == found.facts()
        == {
            "against": {"b": 1},
            "unreadable": 0,
            "comparable": 1,
            "too_short": 0,
            "ngrams": len(QUESTION.split()) - 7,
        }
    )


def test_a_changed_benchmark_is_another_artifact(tmp_path):
    config = config_of([bench(tmp_path / "b.jsonl", [{"question": QUESTION}])])
    before = content_identity(config.identity())
    bench(tmp_path / "b.jsonl", [{"question": ANSWER}])
    assert content_identity(config.identity()) != before


def test_a_benchmark_with_nothing_to_compare_is_one_clear_error(tmp_path):
    against = [bench(tmp_path / "b.jsonl", [{"question": "Too short"}])]
    with pytest.raises(DataError, match=r"no benchmark row has a text.*`filters\.N\.fields`"):
        made(against).prepare()
    with pytest.raises(DataError, match="no benchmark row"):
        made([bench(tmp_path / "c.jsonl", [{"question": QUESTION}])], fields=["stem"]).prepare()


def test_planted_benchmark_rows_are_found_among_real_instructions():
    sets = {"mmlu": "mmlu/test", "gsm8k": "gsm8k/test", "ifeval": "ifeval/ifeval_input_data"}
    against = [
        {"type": "file", "name": name, "path": str(public_data(f"data/{path}.jsonl.gz")), "format": "fields"}
        for name, path in sets.items()
    ]
    found = made(against)
    found.prepare()
    with gzip.open(public_data("data/gsm8k/test.jsonl.gz"), "rt") as lines:
        questions = [json.loads(line)["question"] for line in itertools.islice(lines, 100)]
    alpaca = FileSource(path=str(public_data("data/alpaca_52k/alpaca_data.jsonl.gz")), limit=2000)
    records = read_source(alpaca).records
    planted = [
        row(f"{record.prompt[0]['content']} {question}") for record, question in zip(records, questions, strict=False)
    ]
    named = [found.keep(one).of for one in planted]
    assert named == [f"gsm8k:{i}:0" for i in range(100)]
    rejected = [record for record in records if not found.keep(record).keep]
    assert len(rejected) < 10, "what overlaps by chance is rare"
