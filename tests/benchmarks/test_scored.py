"""IF-score and perplexity: references grade themselves as right, sums make the values, bad rows are counted."""

import json
import math

import numpy as np
import pytest

from itune_ray.benchmarks import BENCHMARKS, benchmark, benchmarks, rows
from itune_ray.benchmarks.base import Reply
from itune_ray.config.evaluate import IfScoreBenchmark, PerplexityBenchmark, PlaygroundBenchmark
from itune_ray.config.shared import FileSource
from itune_ray.data.records import Record
from itune_ray.data.sources import SourceTable
from itune_ray.errors import ConfigError

SOURCE = FileSource(path="rows.jsonl")
METRICS = ("bleu", "rouge1", "rouge2", "rougeL", "chrf", "em")


def chat(position, question, answer, **meta):
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Record(source="t", position=position, messages=turns, meta=meta)


RECORDS = [
    chat(0, "Where does the cat sit?", "The cat is on the mat today"),
    chat(1, "Traduisez", "Le chat est sur le tapis", language="fr"),
    chat(2, "猫は?", "猫はマットの上に座った"),
    chat(3, "no answer", "  "),
    Record(source="t", position=4, messages=({"role": "user", "content": "prompt only"},)),
    Record(source="t", position=5, text="A text to model whole."),
]


@pytest.fixture
def source(monkeypatch):
    monkeypatch.setattr(rows, "read_source", lambda source: SourceTable("t", RECORDS, []))


def test_the_registry_has_every_config():
    import typing

    from itune_ray.config.evaluate import BenchmarkConfig

    union = typing.get_args(typing.get_args(BenchmarkConfig)[0])
    assert {kind.model_fields["type"].default for kind in union} == set(BENCHMARKS)


def test_references_grade_themselves_as_right(source):
    measure = benchmark(IfScoreBenchmark(source=SOURCE, metrics=METRICS))
    items = measure.items()
    assert len(items) == 3
    totals = {m.name: 0.0 for m in measure.metrics}
    for item in items:
        grade = measure.grade(item, Reply(text=item.reference))
        assert grade.ok
        for metric in measure.metrics:
            top = 100 if metric.unit == "points" else 1
            value = float(metric.value(np.array(grade.sums[metric.name])))
            assert value == pytest.approx(top), metric.name
            totals[metric.name] += 1
    assert set(totals) == {"bleu", "sentence_bleu", "rouge1", "rouge2", "rougeL", "chrf", "em"}
    wrong = measure.grade(items[0], Reply(text="nothing in common whatsoever here"))
    assert not wrong.ok
    assert all(wrong.sums[name][0] == 0 for name in ("rouge1", "rouge2", "em"))


def test_rows_without_a_question_or_an_answer_are_counted(source):
    measure = benchmark(IfScoreBenchmark(source=SOURCE))
    measure.items()
    assert measure.rejected == {"no_answer": 2, "no_prompt": 1}
    scored = benchmark(PerplexityBenchmark(source=SOURCE))
    assert len(scored.items()) == 4
    assert scored.rejected == {"no_answer": 2}


def test_settings_say_how_it_was_measured(source):
    measure = benchmark(IfScoreBenchmark(source=SOURCE, metrics=("bleu", "rougeL")))
    measure.items()
    settings = measure.settings()
    assert settings["languages"] == ["en", "fr", "ja"]
    assert "smooth:exp" in settings["bleu_signature"]
    assert "stemmer" in settings["rouge"]


def test_perplexity_is_over_tokens_and_not_over_rows(source):
    measure = benchmark(PerplexityBenchmark(source=SOURCE))
    first, second = measure.items()[:2]
    sums = [
        measure.grade(first, Reply(logprobs=(-1.0,) * 9)).sums["perplexity"],
        measure.grade(second, Reply(logprobs=(-3.0,))).sums["perplexity"],
    ]
    value = float(measure.metrics[0].value(np.sum(sums, axis=0)))
    assert value == pytest.approx(math.exp(12 / 10))


def test_names_follow_type_and_variant():
    configs = [
        PlaygroundBenchmark(),
        PlaygroundBenchmark(shots=4),
        PlaygroundBenchmark(split="test_paraphrase"),
        PerplexityBenchmark(source=FileSource(path="a", name="alpaca")),
        IfScoreBenchmark(source=SOURCE, name="mine"),
    ]
    names = [made.name for made in benchmarks(configs)]
    assert names == ["playground", "playground_4shot", "playground_paraphrase", "perplexity-alpaca", "mine"]


def test_two_benchmarks_of_one_name_are_refused():
    with pytest.raises(ConfigError, match=r"benchmarks\.N\.name"):
        benchmarks([PlaygroundBenchmark(seed=1), PlaygroundBenchmark(seed=2)])


def test_real_files_with_broken_lines(tmp_path):
    file = tmp_path / "alpaca.jsonl"
    good = {"instruction": "Name a colour.", "input": "", "output": "Blue."}
    file.write_text("\n".join([json.dumps(good), "{broken", json.dumps({**good, "output": ""})]))
    measure = benchmark(IfScoreBenchmark(source=FileSource(path=str(file))))
    (item,) = measure.items()
    assert (item.prompt, item.reference, item.category) == ("Name a colour.", "Blue.", "en")
    assert sum(measure.rejected.values()) == 2
    assert measure.settings()["source"] == "alpaca"
