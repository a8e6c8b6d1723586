"""Roles: every process of a job asks for a share of its role's nodes, and nothing of that decides what is made."""

import pytest

from itune_ray.config.base import load_job, mapped, sections
from itune_ray.config.generate import GenerateJob
from itune_ray.config.roles import SHARE, Holder, Roles, placed
from itune_ray.config.shared import PoolConfig, ServedModel
from itune_ray.config.sweep import SweepJob
from itune_ray.config.train import TrainJob

ROLES = Roles(data="cpu-data", infer="gpu-infer", train="gpu-train")


@pytest.fixture
def job():
    return load_job(GenerateJob, "jobs/generate/distill-qwen3.yaml")


def test_each_holder_asks_for_its_role(job):
    made = placed(job, ROLES)
    assert made.teacher.pool.resources_each == {"gpu-infer": SHARE}
    assert made.workers.resources_each == {"cpu-data": SHARE}
    assert made.teacher.pool.each == {**job.teacher.pool.each, "gpu-infer": SHARE}
    assert made.identity() == job.identity()
    train = placed(load_job(TrainJob, "jobs/train/sft-qwen3-0.6b.yaml"), ROLES)
    assert train.workers.resources_each == {"gpu-train": SHARE}


def test_what_a_job_says_itself_stays(job):
    own = {"gpu-infer": 1.0, "rack-7": 1.0}
    pool = job.teacher.pool.model_copy(update={"resources_each": own})
    changed = job.model_copy(update={"teacher": job.teacher.model_copy(update={"pool": pool})})
    assert placed(changed, ROLES).teacher.pool.resources_each == own
    assert placed(job, Roles()) is job


def test_points_of_a_sweep_inherit_the_roles():
    job = placed(load_job(SweepJob, "jobs/sweep/qwen3-0.6b.yaml"), ROLES)
    assert job.evaluate.pool.resources_each == {"gpu-infer": SHARE}
    for point in job.points():
        assert point.train.workers.resources_each == {"gpu-train": SHARE}
        assert point.compress.workers.resources_each == {"gpu-train": SHARE}


def test_every_kind_of_process_has_a_role():
    def subclasses(kind):
        return [kind, *(below for child in kind.__subclasses__() for below in subclasses(child))]

    roles = {kind.__name__: kind.role for kind in subclasses(Holder)[1:]}
    assert roles["PoolConfig"] == "infer"
    assert set(roles.values()) <= set(Roles.model_fields)


def test_sections_finds_models_in_lists_and_unions(job):
    assert sections(job, ServedModel) == [job.teacher]
    assert PoolConfig in {type(found) for found in sections(job, Holder)}
    assert mapped(job, lambda section: section) is job
