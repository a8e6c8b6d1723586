"""The judge: each content rated once, resumed without asking again, thresholds free of charge."""

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from runs import rated_answer

from itune_ray.config.base import validate
from itune_ray.config.curate import CurateJob
from itune_ray.curate.filters import load_filter
from itune_ray.curate.filters.base import MAX_ATTEMPTS
from itune_ray.curate.filters.judge import JudgeFilter, prompt_text
from itune_ray.curate.judging import Spent, rate_all, ratings
from itune_ray.data.ledger import Ledger
from itune_ray.data.records import Message, Record
from itune_ray.data.storage import Folder
from itune_ray.engine.base import Completion, Sample
from itune_ray.errors import GenerationError


def judge(**more: Any) -> JudgeFilter:
    config = {"type": "judge", "judge": {"model": {"path": "some/judge"}, "engine": {"type": "fake"}}, **more}
    job = {"name": "x", "inputs": [{"source": {"type": "file", "path": "x"}}], "filters": [config]}
    made = load_filter(validate(CurateJob, job, "x").filters[0])
    assert isinstance(made, JudgeFilter)
    return made


def row(answer: str, position: int = 0) -> Record:
    messages = ({"role": "user", "content": "q"}, {"role": "assistant", "content": answer})
    return Record(source="s", position=position, messages=messages)


class ScriptedLlm:
    """Replies with what stands after `say ` in the answer; `die N` fails N times first."""

    def __init__(self, stop_after: int | None = None):
        self.asked: Counter[str] = Counter()
        self.stop_after = stop_after
        self.under_way = self.most_under_way = 0

    async def generate(self, messages: Sequence[Message], *, key: str, sampling: Any = None, n: int = 1) -> Completion:
        if self.stop_after is not None and sum(self.asked.values()) >= self.stop_after:
            raise GenerationError("every replica of the pool is dead")
        self.asked[key] += 1
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await asyncio.sleep(0)
        self.under_way -= 1
        text = rated_answer(messages).split("\n")[0]
        if text == "too long":
            return Completion(id=key, error="prompt_too_long: 9", retryable=False)
        if text.startswith("die") and self.asked[key] <= int(text.split()[1]):
            return Completion(id=key, error="dead", retryable=True)
        said = text.removeprefix("say ")
        return Completion(id=key, samples=(Sample(text=said, token_ids=(1, 2), finish_reason="stop"),))


def rate(records: list[Record], made: JudgeFilter, llm: ScriptedLlm, folder: Any, in_flight: int = 4) -> Spent:
    return rate_all(records, made, lambda: llm, Ledger(Folder.at(folder)), in_flight)


def verdicts(records: list[Record], made: JudgeFilter, folder: Any) -> list[tuple[Any, ...]]:
    known = ratings(Ledger(Folder.at(folder)))
    found = [made.verdict(known[record.content_hash]) for record in records]
    return [(v.keep, v.reason, v.failure, None if math.isnan(v.score) else v.score) for v in found]


def test_scores_become_verdicts(tmp_path):
    answers = ["say 5", "say 4.5", "say Score: 4", "say The score is 5", "too long", "die 1", "die 99", "say 4.5/5"]
    records = [row(answer, i) for i, answer in enumerate(answers)]
    llm = ScriptedLlm()
    tokens = rate(records, judge(), llm, tmp_path)
    assert verdicts(records, judge(), tmp_path) == [
        (True, None, None, 5.0),
        (True, None, None, 4.5),
        (False, "low_score", None, 4.0),
        (False, "no_score", None, None),
        (False, None, "prompt_too_long: 9", None),
        (False, "no_score", None, None),
        (False, None, "dead", None),
        (True, None, None, 4.5),
    ]
    assert tokens.generated == 2 * 6
    assert llm.asked[records[6].content_hash] == MAX_ATTEMPTS
    assert llm.asked[records[4].content_hash] == 1, "what asking again cannot mend is asked once"


def test_equal_contents_are_rated_once(tmp_path):
    llm = ScriptedLlm()
    rate([row("say 5", i) for i in range(20)], judge(), llm, tmp_path)
    assert sum(llm.asked.values()) == 1


def test_a_killed_pass_is_resumed_without_asking_again(tmp_path):
    records = [row(f"say {i % 6}", i) for i in range(40)]
    records = [row(f"say {i % 6}\nextra {i}", i) for i in range(40)]
    made = judge(commit={"rows": 4, "seconds": 60})
    broken = ScriptedLlm(stop_after=21)
    with pytest.raises(ExceptionGroup):
        rate(records, made, broken, tmp_path)
    durable = ratings(Ledger(Folder.at(tmp_path)))
    assert 17 <= len(durable) <= 21
    second = ScriptedLlm()
    rate(records, made, second, tmp_path)
    assert not set(second.asked) & set(durable)
    assert set(ratings(Ledger(Folder.at(tmp_path)))) == {record.content_hash for record in records}
    third = ScriptedLlm()
    assert rate(records, made, third, tmp_path) == Spent()
    assert not third.asked


def test_no_more_is_under_way_than_allowed(tmp_path):
    llm = ScriptedLlm()
    rate([row(f"say 1\n{i}", i) for i in range(50)], judge(), llm, tmp_path, in_flight=3)
    assert llm.most_under_way == 3


def test_what_selects_among_ratings_does_not_name_them(tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ prompt }} {{ response }} {{ dimension }} {{ low }} {{ high }}")
    base = judge().ratings_id(0)
    assert judge(threshold=3.0, max_parse_fail=0.5, commit={"rows": 1}).ratings_id(0) == base
    changed = [
        judge(dimension="helpfulness"),
        judge(scale=[1, 10]),
        judge(sampling={"temperature": 1.0}),
        judge(template=str(template)),
        judge(judge={"model": {"path": "other/judge"}, "engine": {"type": "fake"}}),
    ]
    ids = {made.ratings_id(0) for made in changed} | {judge().ratings_id(1), base}
    assert len(ids) == len(changed) + 2
    before = judge(template=str(template)).ratings_id(0)
    template.write_text(template.read_text() + " !")
    assert judge(template=str(template)).ratings_id(0) != before


def test_too_many_replies_without_a_score_stop_the_job():
    made = judge(max_parse_fail=0.2)
    made.check(10, 2)
    made.check(0, 0)
    with pytest.raises(GenerationError, match=r"3 of 10 replies.*max_parse_fail"):
        made.check(10, 3)


def test_the_judge_reads_the_whole_talk():
    assert prompt_text(row("a")) == "q"
    talk = Record(source="s", position=0, messages=(*row("a").messages, {"role": "user", "content": "more"}))
    assert prompt_text(talk) == "user: q\n\nassistant: a\n\nuser: more"
