"""The grid of a sweep: what it makes, and that everything wrong with it is said in one line before anything runs."""

import pytest
import yaml
from sweeps import tree

from itune_ray.config.base import to_yaml, validate
from itune_ray.config.sweep import AshaConfig, SweepJob
from itune_ray.data.artifact import RunStore
from itune_ray.engine.host import EngineHost
from itune_ray.errors import CompressError, ConfigError
from itune_ray.observe.progress import Progress
from itune_ray.sweep.run import run
from itune_ray.sweep.shapes import check_compressible


def job(**changes):
    return validate(SweepJob, tree(**changes), "sweep.yaml")


def test_every_combination_is_a_trial_of_valid_jobs():
    points = job(axes={"compress.method.sparsity": [0, 0.5], "train.model.peft.rank": [2, 8, 16]}).points()
    made = [(point.compress.method.sparsity, point.train.model.peft.rank) for point in points]
    assert made == [(sparsity, rank) for sparsity in (0, 0.5) for rank in (2, 8, 16)]
    assert len({point.key for point in points}) == 6
    assert {point.train.model.path for point in points} == {"{compressed}"}
    assert {point.train.seed for point in points} == {0}


def test_an_axis_leads_into_lists_left_out_sections_and_whole_sections():
    values = {"train.data.0.weight": [1, 2], "train.objective": [{"type": "sft"}], "train.clip_norm": [0.5]}
    points = job(axes=values).points()
    assert [point.train.data[0].weight for point in points] == [1, 2]
    assert points[0].train.clip_norm == 0.5


def test_the_resolved_config_loads_again():
    made = job()
    assert validate(SweepJob, yaml.safe_load(to_yaml(made)), "again") == made


def test_where_it_runs_is_no_part_of_its_identity():
    moved = job(run={"output": "/elsewhere"}, name="other", max_failures=9)
    assert moved.identity() == job().identity()
    assert job(max_concurrent=2).identity() != job().identity()


@pytest.mark.parametrize(
    ("config", "steps", "rungs"),
    [
        (AshaConfig(grace=50, reduction=2), 150, (50, 100, 150)),
        (AshaConfig(grace=50, reduction=2), 100, (50, 100)),
        (AshaConfig(), 150, (38, 150)),
        (AshaConfig(grace=1), 100, (1, 4, 16, 64, 100)),
    ],
    ids=str,
)
def test_rungs(config, steps, rungs):
    assert config.rungs(steps) == rungs


NO_COMPRESS = {"compress": None, "axes": {"train.model.peft.rank": [2]}}
ALONE = {**NO_COMPRESS, "train__model__path": "playground://base"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"axes": {"train.model.peft.rnk": [2]}}, r"axis `train.model.peft.rnk`.*did you mean 'train.model.peft.rank'"),
        ({"axes": {"rank": [2]}}, r"axis `rank` is no config path; did you mean 'train.model.peft.rank'"),
        ({"axes": {"train.data.1.weight": [2]}}, r"axis `train.data.1.weight` is no config path"),
        ({**ALONE, "axes": {"compress.method.sparsity": [0]}}, r"axis `compress.method.sparsity`"),
        ({"axes": {"train.model.peft.rank": [0, 2]}}, r"^train.model.peft.rank=0: `model.peft.rank`: .*greater than 0"),
        ({"axes": {"compress.method.sparsity": [1.5]}}, r"^compress.method.sparsity=1.5: .*less than 1"),
        ({"axes": {"train.model.peft.rank": [2, 2]}}, r"has a value twice"),
        ({"axes": {"train.model.peft.rank": []}}, r"at least 1 item"),
        ({"axes": {"train.steps": [5, 9]}}, r"axis `train.steps` would rank trials by unequal"),
        ({"axes": {"train.batch": [8, 16]}}, r"axis `train.batch`.*scheduler.type=fifo"),
        ({"axes": {"evaluate.benchmarks.0.rows": [9]}}, r"unequal questions"),
        ({"axes": {"train.model.path": ["x"]}}, r"let compress.model.path be the axis"),
        ({"train__model__path": "x"}, r"model that `compress` makes; got 'x'.*train.model.path"),
        ({"train__steps": None, "train__epochs": 2}, r"optimizer steps, not in epochs.*train.steps"),
        ({"train__model__peft": {"type": "full"}, "axes": {"train.seed": [1]}}, r"adapters of one engine.*lora"),
        ({"scheduler__grace": 50}, r"end before the grace period.*scheduler.grace"),
        ({"compress__speed": {}}, r"compress.speed"),
        ({**NO_COMPRESS}, r"`train.model`: give exactly one of model.path"),
    ],
    ids=str,
)
def test_a_sweep_that_cannot_work_is_one_clear_line(changes, told):
    with pytest.raises(ConfigError, match=told) as caught:
        job(**changes)
    assert "\n" not in str(caught.value)


def test_unequal_batches_may_be_compared_at_their_ends():
    assert len(job(axes={"train.batch": [8, 16]}, scheduler={"type": "fifo"}).points()) == 2


def test_a_metric_that_nobody_measures(tmp_path):
    made = job(metric="exact macth")
    with pytest.raises(ConfigError, match=r"no benchmark gives such a score; did you mean 'exact match'.*`metric`"):
        run(made, RunStore(str(tmp_path), "s"), "sweep", EngineHost(), Progress(quiet=True))
    assert not list(tmp_path.iterdir())


def test_a_sparsity_that_no_head_count_allows_names_the_axis():
    points = job(axes={"compress.method.sparsity": [0.25, 0.3]}).points()
    with pytest.raises(CompressError, match=r"^compress.method.sparsity=0.3: 0.3 of 4 key-value heads") as caught:
        check_compressible(points)
    assert "0, 0.25, 0.5, 0.75" in str(caught.value)
