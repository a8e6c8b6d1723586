"""Curriculum orders: what is admitted when, how evenly it is drawn, and that nothing but (seed, keys) decides it."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from scipy.stats import chisquare, kendalltau
from transformers import AutoModelForCausalLM

from itune_ray.config.course import Curriculum
from itune_ray.data.curriculum import CurriculumOrder
from itune_ray.data.order import Order, PackedTable
from itune_ray.data.records import Record
from itune_ray.errors import TrainError
from itune_ray.train.loop import train_local
from itune_ray.train.prepare import prepare_locally

COUNT, BATCH = 200, 8
KEYS = [f"d:{i}:0" for i in range(COUNT)]
DIFFICULTY = [float(v) for v in random.Random(0).sample(range(1000), COUNT)]
RANK = {i: sum(other <= DIFFICULTY[i] for other in DIFFICULTY) / COUNT for i in range(COUNT)}


def order(seed: int = 3, weights=None, difficulties=None, **settings) -> CurriculumOrder:
    curriculum = Curriculum.model_validate(settings)
    return CurriculumOrder(KEYS, weights or [1.0] * COUNT, seed, BATCH, difficulties or DIFFICULTY, curriculum)


def drawn(made: Order, epochs=4.0, steps=None) -> list[list[int]]:
    return [indices for _, indices in made.steps(epochs, steps)]


def test_shares_are_those_of_the_paper():
    made = order()
    shares = [made.share(t, 1000) for t in (100, 250, 500, 1000)]
    assert shares == pytest.approx([0.316370, 0.500075, 0.707142, 1], abs=1e-5)
    half = order(full=0.5)
    assert [half.share(t, 1000) for t in (50, 500)] == pytest.approx([0.316370, 1], abs=1e-5)
    linear = order(pacing="linear", start=0.2, full=0.8)
    assert [linear.share(t, 1000) for t in (200, 400, 800)] == pytest.approx([0.4, 0.6, 1])


@pytest.mark.parametrize("pacing", ["competence", "linear", "root", "quadratic", "exponential", "logarithmic", "step"])
def test_steps_draw_from_what_is_admitted_and_as_many_as_without_a_curriculum(pacing):
    made = order(pacing=pacing, start=0.05, full=0.7)
    steps = drawn(made)
    assert [len(step) for step in steps] == [len(step) for step in drawn(Order(KEYS, [1.0] * COUNT, 3, BATCH))]
    for number, step in enumerate(steps, start=1):
        share = max(made.share(number, len(steps)), BATCH / COUNT)
        assert all(RANK[i] <= share + 1e-12 for i in step)
        assert len(set(step)) == BATCH, "no document twice in a step"
    assert {i for step in steps for i in step} == set(range(COUNT)), "every row is seen"


def test_draws_are_even_within_what_is_admitted_and_follow_weights():
    weights = [1.0 + i % 3 for i in range(COUNT)]
    steps = drawn(order(weights=weights, pacing="step", start=0.5, full=0.5), epochs=None, steps=1000)
    easy = [i for i in range(COUNT) if RANK[i] <= 0.5]
    first = Counter(i for step in steps[:499] for i in step)
    assert set(first) == set(easy)
    total = sum(weights[i] for i in easy)
    expected = [499 * BATCH * weights[i] / total for i in easy]
    assert chisquare([first[i] for i in easy], expected).pvalue > 0.01
    assert all(abs(first[i] - e) < 2 for i, e in zip(easy, expected, strict=True))
    pairs = Counter(frozenset((a, b)) for step in steps for a in step for b in step if a < b)
    assert max(pairs.values()) < 25, "the same documents do not keep meeting"


def test_easy_first_hard_first_and_by_hash():
    taus = {}
    for mode in ("curriculum", "anti", "random"):
        seen: dict[int, int] = {}
        for number, step in enumerate(drawn(order(mode=mode, full=0.7))):
            for i in step:
                seen.setdefault(i, number)
        taus[mode] = kendalltau([seen[i] for i in range(COUNT)], DIFFICULTY).statistic
    assert taus["curriculum"] > 0.9
    assert taus["anti"] < -0.9
    assert abs(taus["random"]) < 0.15


def test_rows_without_a_difficulty_come_last():
    unknown = set(range(0, COUNT, 10))
    values = [math.nan if i in unknown else DIFFICULTY[i] for i in range(COUNT)]
    for mode in ("curriculum", "anti", "random"):
        steps = drawn(order(difficulties=values, mode=mode))
        assert unknown.isdisjoint(i for step in steps[:-1] for i in step)


def test_the_order_depends_on_keys_and_seed_alone():
    steps = [[KEYS[i] for i in step] for step in drawn(order())]
    shuffled = random.Random(1).sample(range(COUNT), COUNT)
    keys = [KEYS[i] for i in shuffled]
    other = CurriculumOrder(keys, [1.0] * COUNT, 3, BATCH, [DIFFICULTY[i] for i in shuffled], Curriculum())
    assert [[keys[i] for i in step] for step in drawn(other)] == steps
    assert drawn(order(seed=4)) != drawn(order())


def test_fewer_rows_than_a_batch_are_drawn_again():
    made = CurriculumOrder(KEYS[:3], [1.0] * 3, 0, BATCH, DIFFICULTY[:3], Curriculum())
    (step,) = drawn(made, epochs=None, steps=1)
    assert sorted(Counter(step).values()) == [2, 3, 3]


def rows(count: int = 24) -> list[Record]:
    return [
        tiny.chat("apple?", " ".join(tiny.WORDS[: 1 + i % 12]), position=i, meta={"curriculum": {"difficulty": i % 12}})
        for i in range(count)
    ]


def test_the_trainer_reads_what_the_filter_wrote(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    job = tiny.job(tmp_path / "m", curriculum={"start": 0.1}, batch=4, steps=6, packing=True)
    prepared = prepare_locally(job, rows(), str(tmp_path / "stage"))
    table = PackedTable(prepared.folder)
    positions = [[int(k.split(":")[1]) % 12 for r in table.rows(t) for k in r.keys] for t in range(6)]
    assert max(positions[0]) <= 12 * 0.42
    assert max(map(max, positions)) == 11
    drawn_keys = {key for t in range(6) for r in table.rows(t) for key in r.keys}
    assert prepared.plan.unused == 24 - len(drawn_keys) > 0
    assert prepare_locally(job, [], str(tmp_path / "stage")) == prepared
    plain = tiny.job(tmp_path / "m", batch=4, steps=6, packing=True)
    assert prepare_locally(plain, rows(), str(tmp_path / "stage")).plan.digest != prepared.plan.digest
    assert "curriculum" not in plain.identity()
    with pytest.raises(TrainError, match="how difficult"):
        prepare_locally(job, tiny.chats(4), str(tmp_path / "other"))


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path):
    folder = tiny.llama(tmp_path / "model")
    job = tiny.job(folder, curriculum={"mode": "anti"}, batch=4, steps=4)
    whole = train_local(job, rows(), str(tmp_path / "whole"))
    train_local(job, rows(), str(tmp_path / "parts"), stop_at=2)
    parts = train_local(job, rows(), str(tmp_path / "parts"))
    a, b = (AutoModelForCausalLM.from_pretrained(o.model_path).state_dict() for o in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert np.isfinite(parts.metrics["loss"])
