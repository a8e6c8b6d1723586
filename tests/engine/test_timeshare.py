"""Devices under `timeshare`: which shares are refused, and that the others put one engine and one trainer on each."""

from collections import Counter

import pytest
from test_pool import served

from itune_ray.config.pipeline import PipelineJob
from itune_ray.engine.host import EngineHost
from itune_ray.engine.timeshare import check_counts, check_shares
from itune_ray.errors import ConfigError
from itune_ray.observe.progress import Progress
from itune_ray.pipeline import run as session


@pytest.mark.parametrize(("engine", "worker"), [(0.55, 0.45), (0.7, 0.3), (0.55, 0.3), (0, 1), (1, 0), (0, 0)])
def test_shares_that_pair(engine, worker):
    check_shares(engine, worker)


@pytest.mark.parametrize(
    ("engine", "worker"),
    [(0.5, 0.5), (0.45, 0.55), (0.55, 0.5), (1, 1), (0.6, 0.2)],
    ids=["two engines fit", "two engines fit beside", "they do not fit", "whole devices", "two workers fit"],
)
def test_shares_that_do_not(engine, worker):
    with pytest.raises(ConfigError, match=rf"pool\.gpus_each={engine:g}, workers\.gpus_each={worker:g}"):
        check_shares(engine, worker)


@pytest.mark.parametrize("counts", [(2, 2, 2), (1, 1, 8), (4, 2, 4)])
def test_every_worker_finds_an_engine(counts):
    check_counts(*counts)


@pytest.mark.parametrize("counts", [(1, 2, 2), (2, 2, 3)])
def test_two_workers_would_share_a_device_without_an_engine(counts):
    with pytest.raises(ConfigError, match=f"{counts[1]} workers and {counts[0]} engines on {counts[2]} devices"):
        check_counts(*counts)


def test_a_pipeline_is_refused_before_its_first_step(tmp_path):
    model = {"path": "playground://base"}
    rows = {"type": "playground", "split": "chat", "rows": 1}
    job = PipelineJob.model_validate(
        {
            "name": "shared",
            "run": {"output": str(tmp_path / "out"), "placement": "timeshare"},
            "steps": {
                "ask": {
                    "job": "generate",
                    "prompts": [rows],
                    "recipe": {"type": "respond"},
                    "teacher": {"model": model, "pool": {"gpus_each": 0.5}},
                },
                "sft": {
                    "job": "train",
                    "model": model,
                    "data": [{"source": rows}],
                    "steps": 1,
                    "workers": {"gpus_each": 0.5},
                },
            },
        }
    )
    with pytest.raises(ConfigError, match=r"pool\.gpus_each=0\.5, workers\.gpus_each=0\.5"):
        session.run("pipeline", job, Progress(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def two_devices():
    import ray

    ray.init(num_cpus=8, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def devices(actors) -> list[str]:
    """The device that each actor has a share of."""
    import ray

    def own(actor) -> str:
        return ray.get_runtime_context().get_accelerator_ids()["GPU"][0]

    return ray.get([actor.__ray_call__.remote(own) for actor in actors])


@pytest.mark.real
def test_engines_and_bundles_land_pairwise_on_both_devices(two_devices):
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    class Trainer:
        pass

    def trainer(index: int):
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        return ray.remote(Trainer).options(num_cpus=0, num_gpus=0.45, scheduling_strategy=strategy).remote()

    share, host = {"GPU": 0.45}, EngineHost("timeshare")
    try:
        pool = host.pool(served(replicas=2, gpus_each=0.55))
        host.make_room({"GPU": 0.9}, share, 2, "two workers", "workers.gpus_each")
        group = placement_group([share, share], strategy="PACK")
        assert group.wait(30)
        trainers = [trainer(0), trainer(1)]
        assert Counter(devices(pool.replicas.values())) == Counter(devices(trainers)) == {"0": 1, "1": 1}
        remove_placement_group(group)
        with pytest.raises(ConfigError, match="3 workers and 2 engines on 2 devices"):
            host.make_room({"GPU": 1.35}, share, 3, "three workers", "workers.gpus_each")
    finally:
        host.close()


@pytest.mark.real
def test_smaller_engines_share_a_device(two_devices, wait_until):
    """Why `check_shares` asks for more than a half."""
    import ray

    wait_until(lambda: ray.available_resources().get("GPU", 0.0) == 2, "both devices are free")
    host = EngineHost()
    try:
        assert len(set(devices(host.pool(served(replicas=2, gpus_each=0.45)).replicas.values()))) == 1
    finally:
        host.close()
