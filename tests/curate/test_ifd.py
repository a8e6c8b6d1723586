"""Instruction-following difficulty: both definitions by known answers, the same tokens in both passes, reasons."""

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from itune_ray.config.base import validate
from itune_ray.config.curate import CurateJob
from itune_ray.config.shared import ModelRef
from itune_ray.curate import run as stage
from itune_ray.curate.filters import load_filter
from itune_ray.curate.filters.base import Seen
from itune_ray.curate.filters.ifd import Ifd, loss_of
from itune_ray.curate.judging import rate_all, ratings
from itune_ray.data.artifact import RunStore
from itune_ray.data.chat import AnswerTokens, ChatRenderer
from itune_ray.data.ledger import Ledger, Outcome
from itune_ray.data.records import Record
from itune_ray.data.storage import Folder
from itune_ray.engine.base import Completion, Llm, Sample
from itune_ray.engine.difficulty import AnswerLoss, context
from itune_ray.observe.progress import Progress

PLAIN = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
"""A template that writes nothing before an answer, as Superfiltering renders for GPT-2."""
Loss = Callable[[Sequence[int], int], float]
"""(tokens, position) -> -log P of the token there."""


def ifd(**more: Any) -> Ifd:
    config = {"type": "ifd", "model": {"model": {"path": "some/model"}, "engine": {"type": "fake"}}, **more}
    job = {"name": "x", "inputs": [{"source": {"type": "file", "path": "x"}}], "filters": [config]}
    made = load_filter(validate(CurateJob, job, "x").filters[0])
    assert isinstance(made, Ifd)
    return made


class Scoring:
    """A model whose log-probabilities a test plans."""

    def __init__(self, folder: Path, loss: Loss, template: str | None = None, error: str | None = None):
        self.ref = ModelRef(path=str(folder), chat_template=template)
        self._loss, self._error = loss, error
        self.scored: dict[str, tuple[int, ...]] = {}

    async def score(self, token_ids: Sequence[int], *, key: str, top: int) -> Completion:
        self.scored[key.rpartition("/")[2]] = tuple(token_ids)
        if self._error is not None:
            return Completion(id=key, error=self._error, retryable=not self._error.startswith("prompt_too_long"))
        entries: list[dict[int, float] | None] = [None]
        entries += [{token: -self._loss(token_ids, i)} for i, token in enumerate(token_ids) if i > 0]
        samples = (Sample(text="", token_ids=(0,), finish_reason="length"),)
        return Completion(id=key, samples=samples, prompt_logprobs=tuple(entries))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("model"))


ROW = tiny.chat("apple river", "stone cloud maple tiger")


def rated(model: Scoring, row: Record = ROW, **more: Any) -> Outcome:
    return asyncio.run(ifd(**more).rate(row, cast(Llm, model), 1))


# --- definitions ---------------------------------------------------------------------------------------------------


def test_the_two_definitions():
    loss = AnswerLoss(conditioned=1.5, direct=2.0, tokens=7)
    assert loss.loss_ratio == 0.75
    assert loss.perplexity_ratio == pytest.approx(math.exp(-0.5))
    assert math.isnan(AnswerLoss(0.5, 0.0, 7).loss_ratio)
    assert AnswerLoss(800.0, 1.0, 7).perplexity_ratio == math.inf


def test_they_rank_rows_differently():
    high, low = AnswerLoss(4.0, 5.0, 7), AnswerLoss(0.35, 0.5, 7)
    assert high.loss_ratio > low.loss_ratio
    assert high.perplexity_ratio < low.perplexity_ratio


# --- the two passes ------------------------------------------------------------------------------------------------


def test_a_model_that_ignores_the_prompt_gives_one(folder):
    """P(w_i | w_{i-1}) alone: what stands further back decides nothing, so IFD = 1 by both definitions."""
    outcome = rated(Scoring(folder, lambda ids, i: 1 + (ids[i] * 7 + ids[i - 1] * 3) % 11))
    assert loss_of(outcome).loss_ratio == 1.0
    assert loss_of(outcome).perplexity_ratio == 1.0


def test_an_answer_that_the_prompt_holds_is_easy(folder):
    """A model that copies: a token seen before costs 0.1, a new one 3."""
    copied = tiny.chat("say stone cloud maple tiger", " stone cloud maple tiger")
    model = Scoring(folder, lambda ids, i: 0.1 if ids[i] in ids[:i] else 3.0)
    assert loss_of(rated(model, copied)).loss_ratio < 0.5
    assert loss_of(rated(model, tiny.chat("say", " piano rocket garden violet copper"))).loss_ratio > 0.8


@pytest.mark.parametrize("template", [tiny.CHATML, tiny.MARKED, tiny.REWRITING, PLAIN])
def test_the_answer_has_the_same_tokens_in_both_passes(folder, template):
    model = Scoring(folder, lambda ids, i: 1.0, template)
    outcome = rated(model)
    tokens = ChatRenderer(tiny.tokenizer(), template).answer_tokens(ROW.messages)
    size = len(tokens.answer)
    whole, alone = model.scored["conditioned"], model.scored["direct"]
    assert whole == (*tokens.prompt, *tokens.answer)
    assert alone == (*tokens.opening, *tokens.answer)
    assert whole[-size:] == alone[-size:]
    text = str(tiny.tokenizer().decode(list(alone)))
    assert text.startswith("stone" if template == PLAIN else "<|im_start|>assistant\n")
    assert "river" not in text
    assert loss_of(outcome).tokens == size - (template == PLAIN), "without a context its first token counts in neither"


def test_planned_losses_of_a_plain_template(folder):
    """The first token, which the answer alone cannot predict, is left out of both means."""
    tokens = ChatRenderer(tiny.tokenizer(), PLAIN).answer_tokens(ROW.messages)
    start, size = len(tokens.prompt), len(tokens.answer)

    def loss(ids: Sequence[int], i: int) -> float:
        if len(ids) == size:
            return 2.0 * i
        return 1e6 if i == start else 1.5 * (i - start)

    mean = sum(range(1, size)) / (size - 1)
    found = loss_of(rated(Scoring(folder, loss, PLAIN)))
    assert (found.conditioned, found.direct, found.tokens) == (
        pytest.approx(1.5 * mean),
        pytest.approx(2 * mean),
        size - 1,
    )
    assert found.loss_ratio == pytest.approx(0.75)
    assert found.perplexity_ratio == pytest.approx(math.exp(-0.5 * mean))


def test_the_first_token_of_a_model_stands_before_the_answer_alone():
    tokens = AnswerTokens(prompt=[1, 20, 21, 8, 9], opening=[8, 9], answer=[30])
    assert context(tokens, bos=1) == [1, 8, 9]
    assert context(tokens, bos=None) == [8, 9]
    assert context(tokens._replace(opening=[]), bos=1) == [1]
    assert context(AnswerTokens([1], [1], [30]), bos=1) == [1]


def test_only_the_last_turn_is_the_answer(folder):
    talk = Record(source="s", position=0, messages=(*ROW.messages, *tiny.chat("lemon", "piano rocket").messages))
    model = Scoring(folder, lambda ids, i: 1.0)
    rated(model, talk)
    alone = tiny.tokenizer().decode(list(model.scored["direct"]))
    assert "piano rocket" in alone
    assert "stone" not in alone
    assert "stone" in tiny.tokenizer().decode(list(model.scored["conditioned"]))


@pytest.mark.parametrize("template", [tiny.CHATML, PLAIN])
def test_parity_with_transformers(folder, template):
    """The losses are those of a causal model over label-masked sequences, as the published scripts compute them."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def log_probs(ids: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([list(ids)])).logits[0].log_softmax(-1)

    def masked(ids: Sequence[int], answer: int) -> float:
        labels = torch.tensor([[-100] * (len(ids) - answer) + list(ids)[-answer:]])
        with torch.no_grad():
            return float(model(torch.tensor([list(ids)]), labels=labels).loss)

    cache: dict[tuple[int, ...], torch.Tensor] = {}

    def loss(ids: Sequence[int], i: int) -> float:
        whole = tuple(ids)
        if whole not in cache:
            cache[whole] = log_probs(whole)
        return -float(cache[whole][i - 1, ids[i]])

    scoring = Scoring(folder, loss, template)
    found = loss_of(rated(scoring))
    assert found.conditioned == pytest.approx(masked(scoring.scored["conditioned"], found.tokens), abs=1e-4)
    assert found.direct == pytest.approx(masked(scoring.scored["direct"], found.tokens), abs=1e-4)
    assert found.loss_ratio != pytest.approx(1.0, abs=1e-3)


# --- reasons -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_scored_has_a_reason(folder):
    calm = Scoring(folder, lambda ids, i: 1.0)
    control = tiny.chat("apple", "stone <|im_end|> cloud")
    assert rated(calm, control).reason == "control_tokens"
    assert rated(calm, max_length=5).reason == "too_long"
    endless = Scoring(folder, lambda ids, i: math.inf if i == len(ids) - 2 else 1.0)
    assert (rated(endless).reason, rated(endless).status) == ("no_log_probability", "rejected")
    assert rated(Scoring(folder, lambda ids, i: 1.0, error="prompt_too_long: 9 tokens")).reason == "too_long"
    dead = rated(Scoring(folder, lambda ids, i: 1.0, error="dead"))
    assert (dead.status, dead.cause, dead.attempts) == ("failed", "dead", 1)
    assert ifd().unfit(Record(source="s", position=0, messages=ROW.messages[:1])) == "no_answer"
    assert ifd().unfit(Record(source="s", position=0, messages=ROW.messages[1:])) == "no_prompt"
    assert ifd().unfit(Record(source="s", position=0, text="apple")) == "no_answer"
    assert ifd().unfit(ROW) is None


def test_an_engine_that_gives_no_log_probabilities_is_no_zero_loss(folder):
    class Silent(Scoring):
        async def score(self, token_ids: Sequence[int], *, key: str, top: int) -> Completion:
            return Completion(id=key)

    assert rated(Silent(folder, lambda ids, i: 1.0)).reason == "no_log_probability"


def rating(conditioned: float, direct: float, tokens: int = 9) -> Outcome:
    raw = json.dumps(AnswerLoss(conditioned, direct, tokens)._asdict())
    return Outcome(record=ROW, input_key="k", status="accepted", raw=raw)


@pytest.mark.parametrize(
    ("config", "losses", "reason"),
    [
        ({}, (1.0, 1.25), None),
        ({}, (1.25, 1.0), "high_ifd"),
        ({}, (1.0, 1.0), None),
        ({"definition": "perplexity_ratio"}, (1.0, 1.0), "high_ifd"),
        ({"definition": "perplexity_ratio"}, (0.99, 1.0), None),
        ({"high": None}, (3.0, 1.0), None),
        ({"low": 0.5}, (0.49, 1.0), "low_ifd"),
        ({"low": 0.5}, (0.5, 1.0), None),
        ({}, (0.5, 0.0), "undefined_ifd"),
        ({}, (1.0, 2.0, 4), "short_answer"),
        ({"min_tokens": 4}, (1.0, 2.0, 4), None),
    ],
)
def test_bounds(config, losses, reason):
    verdict = ifd(**config).verdict(rating(*losses))
    assert verdict.reason == reason
    assert verdict.keep == (reason is None)
    assert math.isnan(verdict.score) == (reason in ("undefined_ifd", "short_answer"))


def test_measures_hold_both_definitions():
    assert ifd().measures(rating(1.0, 2.0)) == {
        "conditioned": 1.0,
        "direct": 2.0,
        "tokens": 9,
        "loss_ratio": 0.5,
        "perplexity_ratio": pytest.approx(math.exp(-1)),
    }
    assert ifd().measures(Outcome(record=ROW, input_key="k", status="rejected", reason="too_long")) == {}


def test_the_top_share_is_of_all_rows_that_came():
    rows = [tiny.chat("q", f"a{i}", position=i) for i in range(20)]
    scores = [0.9 if i == 7 else math.nan if i < 5 else i / 100 for i in range(20)]
    seen = Seen(rows, [i >= 5 for i in range(20)], scores)
    dropped = ifd(keep=0.15).settle(seen).dropped
    assert {row.key for row in rows[5:]} - set(dropped) == {"tiny:7:0", "tiny:18:0", "tiny:19:0"}
    assert set(dropped.values()) == {"not_selected"}
    assert len(ifd(keep=0.001).settle(seen).dropped) == 14, "at least one stays"
    assert not ifd().settle(seen).dropped
    assert not ifd(keep=1.0).settle(seen).dropped


def test_equal_scores_are_kept_by_key():
    rows = [tiny.chat("q", f"a{i}", position=i) for i in range(4)]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        seen = Seen([rows[i] for i in order], [True] * 4, [0.5] * 4)
        assert set(ifd(keep=0.5).settle(seen).dropped) == {"tiny:2:0", "tiny:3:0"}


# --- asking --------------------------------------------------------------------------------------------------------


def test_a_changed_selection_scores_nothing_again(folder, tmp_path):
    base = ifd().ratings_id(0)
    same = [{"definition": "perplexity_ratio"}, {"low": 0.1}, {"high": None}, {"keep": 0.1}, {"min_tokens": 1}]
    assert {ifd(**more).ratings_id(0) for more in same} == {base}
    other = {"model": {"path": "other/model"}, "engine": {"type": "fake"}}
    assert len({ifd(max_length=9).ratings_id(0), ifd(model=other).ratings_id(0), ifd().ratings_id(1), base}) == 4
    ledger = Ledger(Folder.at(tmp_path))
    model = Scoring(folder, lambda ids, i: 1.0)
    rows = [ROW, tiny.chat("apple river", "stone cloud maple tiger", position=1)]
    assert rate_all(rows, ifd(), lambda: cast(Llm, model), ledger, 2).generated == 2, "two sequences of one token each"
    model.scored.clear()
    assert rate_all(rows, ifd(keep=0.1), lambda: cast(Llm, model), ledger, 2) == (0, 0)
    assert not model.scored
    assert set(ratings(ledger)) == {ROW.content_hash}


def test_the_stage_publishes_every_figure(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(stage.cluster, "connect", lambda *_: None)
    host: Any = SimpleNamespace(
        pool=lambda _: SimpleNamespace(client=SimpleNamespace(llm=lambda *_: model)), leave=lambda *_: None
    )
    model = Scoring(folder, lambda ids, i: 0.5 if ids[i] in ids[:i] else 3.0)
    file = tmp_path / "in.jsonl"
    talks = [
        ("say stone cloud maple tiger", " stone cloud maple tiger"),
        ("go", " piano rocket garden violet"),
        ("x", "y"),
    ]
    file.write_text("".join(json.dumps({"instruction": q, "output": a}) + "\n" for q, a in talks))
    filters = [{"type": "ifd", "model": {"model": {"path": "some/model"}}, "keep": 0.34}]
    inputs = [{"source": {"type": "file", "path": str(file)}}]
    job = validate(CurateJob, {"name": "run", "inputs": inputs, "filters": filters}, "x")
    artifact = stage.run(job, RunStore(str(tmp_path), "run"), "curate", host, Progress(quiet=True))
    assert artifact.manifest["funnel"]["rejected"] == {"not_selected": 1, "short_answer": 1}
    (kept,) = artifact.folder.read_table("kept").to_pylist()
    assert kept["key"] == "in:1:0"
    assert kept["score_ifd"] == kept["score_ifd_loss_ratio"] == kept["score_ifd_conditioned"] / kept["score_ifd_direct"]
    assert kept["score_ifd_tokens"] >= 5
    assert kept["score_ifd_perplexity_ratio"] < 1
    assert artifact.manifest["tokens"]["generated"] == 6
