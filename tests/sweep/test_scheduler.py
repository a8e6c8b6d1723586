"""Successive halving over synthetic learning curves: it keeps the best, and a replayed ledger decides as before."""

import heapq
import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from itune_ray.config.sweep import AshaConfig, FifoConfig
from itune_ray.data.storage import Folder
from itune_ray.sweep.ledger import Entry, SweepLedger
from itune_ray.sweep.scheduler import Rule, SweepScheduler

ASHA, STEPS = AshaConfig(grace=10, reduction=3), 270
RUNGS = ASHA.rungs(STEPS)


@dataclass
class Curve:
    """Power law loss(t) = floor + scale * t ** -power, with a little noise, trained at its own speed."""

    floor: float
    scale: float
    power: float
    speed: float
    noise: random.Random

    def at(self, steps: int) -> float:
        return self.floor + self.scale * steps**-self.power + self.noise.gauss(0, 0.002)

    @property
    def final(self) -> float:
        return self.floor + self.scale * STEPS**-self.power


def curves(seed: int, count: int = 27) -> dict[str, Curve]:
    rng = random.Random(seed)
    return {
        f"t{i}": Curve(
            rng.uniform(1.0, 2.0),
            rng.uniform(0.8, 1.2),
            rng.uniform(0.4, 0.6),
            rng.uniform(0.5, 1.5),
            random.Random(seed * 1000 + i),
        )
        for i in range(count)
    }


def arrivals(trials: dict[str, Curve], judge, slots: int) -> int:
    """Run trials on some slots, each result judged when it arrives; returns the steps that were spent."""
    waiting = list(trials)
    running = [(0.0, waiting.pop(0), 0) for _ in range(slots)]
    spent = 0
    while running:
        now, trial, rung = heapq.heappop(running)
        if rung:
            spent += RUNGS[rung - 1] - (RUNGS[rung - 2] if rung > 1 else 0)
            if judge(trial, RUNGS[rung - 1], trials[trial].at(RUNGS[rung - 1])):
                if waiting:
                    heapq.heappush(running, (now, waiting.pop(0), 0))
                continue
        more = RUNGS[rung] - (RUNGS[rung - 1] if rung else 0)
        heapq.heappush(running, (now + more / trials[trial].speed, trial, rung + 1))
    return spent


def test_the_best_curve_is_kept():
    kept, spent, regrets = 0, 0, []
    for seed in range(200):
        trials, ends, last = curves(seed), {}, {}
        rule = Rule(ASHA, STEPS, higher_is_better=False)

        def judge(trial, steps, score, rule=rule, ends=ends, last=last):
            last[trial] = score
            ends[trial] = rule.judge(trial, steps, score)
            return ends[trial]

        spent += arrivals(trials, judge, slots=4)
        best = min(trials, key=lambda t: trials[t].final)
        chosen = min((t for t in trials if ends[t] == "completed"), key=last.__getitem__)
        kept += ends[best] == "completed"
        regrets.append(trials[chosen].final - trials[best].final)
        assert set(ends.values()) == {"completed", "stopped"}
    assert kept >= 190, f"the true best ran to its end for {kept} of 200 seeds"
    assert sum(regrets) / 200 < 0.002
    assert spent < 0.5 * 200 * 27 * STEPS, "halving must spare more than half of the steps"


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("cut", [0, 1, 7, 20, 10_000])
def test_a_replayed_ledger_goes_on_as_the_live_rule_did(tmp_path, slots, cut):
    live, entries = Rule(ASHA, STEPS, higher_is_better=False), []

    def judge(trial, steps, score):
        ended = live.judge(trial, steps, score)
        entries.append(Entry(trial=trial, steps=steps, score=score, ended=ended))
        return ended

    arrivals(curves(5), judge, slots)
    ledger = SweepLedger(Folder.at(tmp_path))
    for entry in entries[:cut]:
        ledger.add(entry)
    with open(tmp_path / "ledger.jsonl", "a") as torn:
        torn.write('{"trial": "t9", "steps"')
    again = SweepLedger(Folder.at(tmp_path))
    assert again.entries == entries[:cut]
    scheduler = SweepScheduler(Rule(ASHA, STEPS, higher_is_better=False), again)
    for entry in entries[cut:]:
        trial = SimpleNamespace(config={"trial": entry.trial})
        decision = scheduler.on_trial_result(None, trial, {"steps": entry.steps, "score": entry.score})
        assert decision == ("CONTINUE" if entry.ended is None else "STOP")
    assert SweepLedger(Folder.at(tmp_path)).entries == entries


def test_a_result_that_comes_again_is_decided_once(tmp_path):
    seen, ledger = [], SweepLedger(Folder.at(tmp_path))
    scheduler = SweepScheduler(Rule(ASHA, STEPS, higher_is_better=True), ledger, seen.append)
    trial = SimpleNamespace(config={"trial": "a"})
    for score in (0.5, 0.1):
        assert scheduler.on_trial_result(None, trial, {"steps": 10, "score": score}) == "CONTINUE"
    assert [(entry.steps, entry.score) for entry in ledger.entries] == [(10, 0.5)] == [(e.steps, e.score) for e in seen]


def test_higher_scores_go_on_where_higher_is_better():
    rule = Rule(ASHA, STEPS, higher_is_better=True)
    assert [rule.judge(name, 10, score) for name, score in (("a", 0.5), ("b", 0.4), ("c", 0.6))] == [
        None,
        "stopped",
        None,
    ]
    assert rule.judge("a", 270, 0.1) == "completed"


def test_without_halving_every_trial_is_completed():
    rule = Rule(FifoConfig(), STEPS, higher_is_better=True)
    assert [rule.judge(name, STEPS, score) for name, score in (("a", 0.5), ("b", 0.1))] == ["completed"] * 2


def test_a_trial_that_failed_ends_once_and_is_told_why(tmp_path):
    ledger = SweepLedger(Folder.at(tmp_path))
    scheduler = SweepScheduler(Rule(ASHA, STEPS, higher_is_better=True), ledger)
    trial = SimpleNamespace(config={"trial": "a"})
    result = {"steps": 10, "score": float("nan"), "failed": "the loss is not finite"}
    assert scheduler.on_trial_result(None, trial, result) == "STOP"
    assert ledger.ends()["a"] == Entry(trial="a", steps=10, score=None, ended="failed", cause="the loss is not finite")
    assert SweepScheduler(Rule(ASHA, STEPS, higher_is_better=True), SweepLedger(Folder.at(tmp_path)))
