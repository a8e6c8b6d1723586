"""Filters that ask a model for tags, or for its own uncertainty: what they make of scripted models."""

import asyncio
import json
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tiny
from scripted import Scripted, llm, prompt

from itune_ray.config.base import validate
from itune_ray.config.curate import CurateJob
from itune_ray.config.shared import ModelRef
from itune_ray.curate import run as stage
from itune_ray.curate.filters import load_filter
from itune_ray.curate.filters.base import Seen
from itune_ray.curate.tags import merged_tags
from itune_ray.data.artifact import Artifact, RunStore
from itune_ray.data.ledger import Outcome
from itune_ray.engine.base import Completion, Llm, Sample, Sampling
from itune_ray.errors import GenerationError
from itune_ray.observe.progress import Progress

MODEL = {"model": {"path": "some/model"}, "engine": {"type": "fake"}}


def made(type: str, **config: Any) -> Any:
    filters = [{"type": type, "model": MODEL, **config}]
    job = {"name": "x", "inputs": [{"source": {"type": "file", "path": "x"}}], "filters": filters}
    return load_filter(validate(CurateJob, job, "x").filters[0])


def curated(root, monkeypatch, model: Llm, rows: list[dict], *filters: dict) -> Artifact:
    """The stage over rows, with this model behind every filter."""
    monkeypatch.setattr(stage.cluster, "connect", lambda *_: None)
    client = SimpleNamespace(llm=lambda *_: model)
    host: Any = SimpleNamespace(pool=lambda _: SimpleNamespace(client=client), leave=lambda *_: None)
    file = root / "in.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = [{"source": {"type": "file", "path": str(file)}}]
    job = validate(CurateJob, {"name": "run", "inputs": inputs, "filters": filters}, "x")
    return stage.run(job, RunStore(str(root), "run"), "curate", host, Progress(quiet=True))


# --- tags ----------------------------------------------------------------------------------------------------------

TAGS = {
    "alpha": ["Data-Analysis", "Python code"],
    "beta": ["data analysis", "code in Python", "rare thing"],
    "gamma": ["Data analyses", "code: Python"],
    "delta": [],
}


def tagger(turn: str, _: int) -> str:
    name = next((name for name in TAGS if name in turn), None)
    if name is None:
        return "I would say it is about data."
    return "Here it is:\n" + json.dumps([{"tag": tag, "why": "so"} for tag in TAGS[name]])


def tagged(root, monkeypatch, *more: dict, **config: Any) -> tuple[Artifact, Scripted]:
    engine = Scripted(tagger)
    rows = [{"instruction": f"do {name}", "output": "x"} for name in TAGS]
    filters = [{"type": "tags", "model": MODEL, **config}, *more]
    return curated(root, monkeypatch, llm(engine), rows, *filters), engine


def metas(artifact: Artifact) -> dict[str, dict[str, Any]]:
    rows = artifact.folder.read_table("kept").to_pylist()
    return {row["messages"][0]["content"].removeprefix("do "): json.loads(row["meta"]) for row in rows}


def test_tags_are_normalised_merged_and_cut_over_all_rows(tmp_path, monkeypatch):
    artifact, engine = tagged(tmp_path, monkeypatch, min_count=2, merge=0.8)
    assert {name: meta["tags"] for name, meta in metas(artifact).items()} == {
        "alpha": ["code in python", "data analysis"],
        "beta": ["code in python", "data analysis"],
        "gamma": ["code in python"],
        "delta": [],
    }
    assert [metas(artifact)[name]["num_tags"] for name in TAGS] == [2, 2, 1, 0]
    assert sorted(name for turn in engine.turns for name in TAGS if f"do {name}\n" in turn) == sorted(TAGS)
    (facts,) = artifact.manifest["filters"]
    assert facts["tags"] == 2
    assert (facts["merged_tags"], facts["rare_tags"], facts["untagged"]) == (2, 2, 1)
    assert facts["most_frequent"] == {"code in python": 3, "data analysis": 2}


def test_a_changed_normalisation_asks_nothing_again(tmp_path):
    base = made("tags").ratings_id(0)
    assert {made("tags", **more).ratings_id(0) for more in ({"min_count": 5}, {"merge": 0.5})} == {base}
    file = tmp_path / "own.jinja"
    file.write_text("{{ prompt }} {{ fence }}")
    assert made("tags", template=str(file)).ratings_id(0) != base


def test_tags_are_what_selection_samples_by(tmp_path, monkeypatch):
    select = {"type": "select", "strategy": "tags", "by": "meta.tags", "rows": 1}
    artifact, _ = tagged(tmp_path, monkeypatch, select)
    assert set(metas(artifact)) == {"beta"}, "the most tags first"
    assert artifact.manifest["funnel"]["rejected"] == {"no_tags": 1, "not_selected": 2}


def test_replies_without_a_list_are_rejected_and_too_many_stop_the_job(tmp_path, monkeypatch):
    rating = asyncio.run(made("tags").rate(prompt("do omega"), llm(Scripted(tagger)), 1))
    assert (rating.status, rating.reason) == ("rejected", "unreadable_tags")
    assert rating.raw == "I would say it is about data."
    rows = [{"instruction": text, "output": "x"} for text in ("do alpha", "do omega")]
    with pytest.raises(GenerationError, match=r"1 of 2 replies.*max_parse_fail"):
        curated(tmp_path, monkeypatch, llm(Scripted(tagger)), rows, {"type": "tags", "model": MODEL})
    assert made("tags").unfit(prompt(" ")) == "no_prompt"


def test_near_tags_are_merged_into_the_most_frequent():
    counts = {"review code": 5, "code review": 2, "poem": 2, "code": 1}
    assert merged_tags(counts, 0.9) == {"code review": "review code"}
    assert merged_tags(counts, 0.6) == {"code review": "review code", "code": "review code"}
    assert merged_tags(dict.fromkeys(counts, 1), 1.0) == {"review code": "code review"}, "of equals the smaller name"
    assert merged_tags({}, 0.5) == {}


# --- uncertainty ---------------------------------------------------------------------------------------------------


class Unsure:
    """Answers with two tokens; P of them under the prompt as it is and under each perturbed one as planned."""

    def __init__(self, folder, planned=(0.62, 0.60, 0.41, 0.66, 0.58), entries=None, replies=("yes",), error=None):
        self.ref = ModelRef(path=str(folder))
        self._planned, self._entries, self._replies, self._error = planned, entries, replies, error
        self.scored: dict[str, str] = {}
        self.sampled: list[Sampling] = []

    def seed(self, key: str) -> int:
        return len(key) + sum(map(ord, key))

    async def generate(self, messages, *, key: str, sampling: Sampling, n: int = 1) -> Completion:
        self.sampled.append(sampling)
        if self._error is not None:
            return Completion(id=key, error=self._error, retryable=True)
        texts = [self._replies[i % len(self._replies)] for i in range(n)]
        return Completion(
            id=key,
            prompt_token_ids=(1, 2, 3),
            samples=tuple(
                Sample(text=t, token_ids=(5, 6) if t else (), finish_reason="stop", logprobs=self._entries)
                for t in texts
            ),
        )

    async def score(self, token_ids, *, key: str, top: int) -> Completion:
        name = key.rpartition("/")[2]
        self.scored[name] = tiny.tokenizer().decode(list(token_ids[:-2]))
        loss = math.log(self._planned[int(name)])
        entries = (None, *({token: -1.0} for token in token_ids[1:-2]), {5: loss * 0.5}, {6: loss * 1.5})
        return Completion(id=key, prompt_token_ids=tuple(token_ids), prompt_logprobs=entries)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("model"))


QUESTION = prompt("apple river stone cloud maple tiger lemon piano rocket garden")


def measured(model: Unsure, row=QUESTION, **config: Any) -> Outcome:
    return asyncio.run(made("uncertainty", **config).rate(row, cast(Llm, model), 1))


def test_prompt_uncertainty_of_the_specification(folder):
    model = Unsure(folder)
    rating = measured(model, samples=4)
    assert rating.score == pytest.approx(0.0775)
    assert made("uncertainty").measures(rating) == {"probability": pytest.approx(0.62)}
    assert sorted(model.scored) == ["0", "1", "2", "3", "4"]
    words = QUESTION.messages[0]["content"].split()
    whole = model.scored.pop("0")
    assert " ".join(words) in whole
    for changed in model.scored.values():
        kept = [word for word in words if word in changed]
        assert 0 < len(kept) < len(words)
        assert changed.replace(" ".join(kept), "") == whole.replace(" ".join(words), ""), "only words went"
    assert len(set(model.scored.values())) > 1
    assert model.sampled[0].temperature == 0
    assert rating.record.num_tokens == 2


def test_no_dropped_word_and_a_constant_model_give_no_uncertainty(folder):
    same = Unsure(folder, planned=(0.5,) * 5)
    assert measured(same, samples=4).score == 0
    whole = Unsure(folder)
    measured(whole, samples=4, drop=0.0)
    assert len(set(whole.scored.values())) == 1, "p = 0 asks the same prompt, whose answer's probability is the same"


def test_measures_of_the_answers_own_tokens(folder):
    log = math.log
    entries = ({5: log(0.5), 7: log(0.25)}, {6: log(0.9), 8: log(0.1)})
    model = Unsure(folder, entries=entries)
    assert measured(model, measure="confidence").score == pytest.approx(1 - 0.7)
    assert measured(model, measure="margin").score == pytest.approx(1 - (0.25 + 0.8) / 2)
    entropies = -(0.5 * log(0.5) + 0.25 * log(0.25)), -(0.9 * log(0.9) + 0.1 * log(0.1))
    assert measured(model, measure="entropy", top=5).score == pytest.approx(sum(entropies) / 2)
    assert [s.logprobs for s in model.sampled] == [0, 20, 5]
    assert not model.scored
    assert measured(Unsure(folder, entries=()), measure="confidence").reason == "no_log_probability"


def test_disagreement_of_sampled_answers(folder):
    model = Unsure(folder, replies=("yes", "no", "yes "))
    assert measured(model, measure="disagreement", samples=3, temperature=0.9).score == pytest.approx(2 / 3)
    assert model.sampled[0].temperature == 0.9
    assert made("uncertainty").measures(measured(model, measure="disagreement")) == {}


def test_what_cannot_be_measured_has_a_reason(folder):
    assert measured(Unsure(folder, replies=("",))).reason == "empty_answer"
    dead = measured(Unsure(folder, error="dead"))
    assert (dead.status, dead.cause, dead.attempts) == ("failed", "dead", 1)
    assert made("uncertainty").unfit(tiny.chat("q", "a")) is None, "an answer in the row is left alone"
    assert made("uncertainty").unfit(prompt(" ")) == "no_prompt"


def seen(scores: list[float], tasks: str) -> Seen:
    rows = [prompt(f"q{i}", position=i, meta={"task": task}) for i, task in enumerate(tasks)]
    return Seen(rows, [True] * len(rows), scores)


def test_the_most_uncertain_rows_or_tasks_stay():
    scores = [0.1, 0.9, 0.5, 0.5, 0.2, 0.3]
    rows = made("uncertainty", share=0.5).settle(seen(scores, "aabbcc"))
    assert set(rows.dropped) == {"s:0:0", "s:4:0", "s:5:0"}
    tasks = made("uncertainty", share=0.3, by="meta.task").settle(seen(scores, "aabbcc"))
    assert set(tasks.dropped) == {"s:2:0", "s:3:0", "s:4:0", "s:5:0"}, "of equal means the smaller name"
    assert tasks.facts["tasks"] == {"a": 0.5, "b": 0.5, "c": 0.25}
    assert not made("uncertainty").settle(seen(scores, "aabbcc")).dropped


def test_the_stage_publishes_uncertainty(folder, tmp_path, monkeypatch):
    rows = [{"instruction": f"apple river stone cloud {i}", "output": "x"} for i in range(3)]
    filters = {"type": "uncertainty", "model": MODEL, "samples": 4, "share": 0.34}
    artifact = curated(tmp_path, monkeypatch, cast(Llm, Unsure(folder)), rows, filters)
    assert artifact.manifest["funnel"]["rejected"] == {"not_selected": 1}
    kept = artifact.folder.read_table("kept").to_pylist()
    assert [row["score_uncertainty"] for row in kept] == pytest.approx([0.0775] * 2)
    assert [row["score_uncertainty_probability"] for row in kept] == pytest.approx([0.62] * 2)
