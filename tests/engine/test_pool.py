"""The pool on real Ray with fake engines: sharing, counting, deadlines, deaths, and asks that cannot be met."""

import asyncio
import os
import pickle
import signal
import time

import pytest

from itune_ray.config.shared import FakeEngineConfig, ModelRef, PoolConfig, ServedModel, VllmEngineConfig
from itune_ray.engine.base import Request, Sampling
from itune_ray.engine.host import EngineHost
from itune_ray.engine.pool import pool_key, resources_of
from itune_ray.errors import ClusterError, ConfigError, GenerationError, ModelError

FAKE = ModelRef(path="any")


def served(engine=None, adapter: str | None = None, **pool) -> ServedModel:
    model = FAKE.model_copy(update={"adapter": adapter})
    return ServedModel(model=model, engine=engine or FakeEngineConfig(), pool=PoolConfig(**{"cpus_each": 0.1, **pool}))


def requests(count: int) -> list[Request]:
    return [
        Request(
            id=f"r{i}",
            sampling=Sampling(seed=i, temperature=1.0),
            messages=({"role": "user", "content": f"question {i}"},),
        )
        for i in range(count)
    ]


def test_models_that_differ_only_in_the_adapter_share_a_pool():
    assert pool_key(served()) == pool_key(served(adapter="/some/adapter"))
    assert pool_key(served()) == pool_key(served(replicas=3))
    assert pool_key(served()) != pool_key(served(FakeEngineConfig(fail_rate=0.5)))


def test_a_replica_over_several_devices_takes_one_bundle_each():
    wide = ServedModel(
        model=FAKE,
        engine=VllmEngineConfig(tensor_parallel=2, pipeline_parallel=2),
        pool=PoolConfig(replicas=3, cpus_each=2, gpus_each=1, resources_each={"gpu-infer": 0.5}),
    )
    assert wide.pool.each == {"CPU": 2, "GPU": 1, "gpu-infer": 0.5}
    assert resources_of(wide) == {"CPU": 24, "GPU": 12, "gpu-infer": 6}


@pytest.fixture(scope="module")
def ray_session():
    import ray

    ray.init(num_cpus=8, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def host(ray_session):
    engines = EngineHost()
    yield engines
    engines.close()


@pytest.mark.real
def test_answers_come_in_order_and_are_counted_at_the_engine(host):
    pool = host.pool(served(replicas=2))
    first = asyncio.run(pool.client.generate(requests(50)))
    assert [c.id for c in first] == [f"r{i}" for i in range(50)]
    assert pool.requests == 50
    again = host.pool(served(replicas=2, adapter="/another/adapter"))
    second = asyncio.run(pickle.loads(pickle.dumps(again.client)).generate(requests(50)))
    assert second == first
    assert (again.requests, host.starts) == (100, 2)


@pytest.mark.real
def test_a_replica_killed_in_flight_loses_no_request(host):
    pool = host.pool(served(FakeEngineConfig(latency_s=0.5), replicas=2))
    undisturbed = asyncio.run(pool.client.generate(requests(60)))

    async def kill_one_meanwhile():
        task = asyncio.ensure_future(pool.client.generate(requests(60)))
        await asyncio.sleep(0.3)
        os.kill(pool.infos[0].pid, signal.SIGKILL)
        return await task

    assert asyncio.run(kill_one_meanwhile()) == undisturbed


@pytest.mark.real
def test_vectors_come_from_another_replica_where_one_dies(host):
    pool, texts = host.pool(served(FakeEngineConfig(latency_s=1.0), replicas=2)), [f"text {i}" for i in range(5)]
    client = pool.client
    undisturbed = asyncio.run(client.embed(texts))

    async def kill(pids: list[int]):
        asked = [asyncio.ensure_future(client.embed(texts)) for _ in range(4)]  # some on either replica
        await asyncio.sleep(0.4)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return await asyncio.gather(*asked)

    assert asyncio.run(kill([pool.infos[0].pid])) == [undisturbed] * 4


@pytest.mark.real
def test_vectors_have_a_deadline_and_a_bound_on_deaths(host):
    late = host.pool(served(FakeEngineConfig(latency_s=30.0), request_timeout_s=0.3)).client
    with pytest.raises(GenerationError, match=r"no answer within 0\.3 s .*; fake engine, alive"):
        asyncio.run(late.embed(["a"]))
    mortal = host.pool(served(FakeEngineConfig(latency_s=2.0), max_restarts=0))

    async def killed():
        asked = asyncio.ensure_future(mortal.client.embed(["a"]))
        await asyncio.sleep(0.4)
        os.kill(mortal.infos[0].pid, signal.SIGKILL)
        await asked

    with pytest.raises(GenerationError, match="1 replicas died under the same request"):
        asyncio.run(killed())


@pytest.mark.real
def test_a_single_replica_is_started_again(host):
    pool = host.pool(served(FakeEngineConfig(latency_s=0.3), replicas=1, max_restarts=1))
    client = pool.client

    async def kill(times: int):
        for _ in range(times):
            task = asyncio.ensure_future(client.generate(requests(3)))
            await asyncio.sleep(0.15)
            pid = (await pool.replicas[0].ready.remote()).pid
            os.kill(pid, signal.SIGKILL)
            answers = await task
        return answers

    assert [c.error for c in asyncio.run(kill(1))] == [None] * 3
    with pytest.raises(GenerationError, match=r"dead|died"):
        asyncio.run(kill(1))


@pytest.mark.real
def test_a_deadline_is_a_completion_that_says_what_the_replica_does(host):
    pool = host.pool(served(FakeEngineConfig(latency_s=5.0), request_timeout_s=0.2))
    started = time.monotonic()
    (completion,) = asyncio.run(pool.client.generate(requests(1)))
    assert time.monotonic() - started < 3
    assert completion.error == "no answer within 0.2 s (pool.request_timeout_s); fake engine, alive"
    assert completion.retryable


@pytest.mark.real
def test_a_request_that_was_given_up_leaves_the_engine(host):
    """With room for one at a time the next would else wait for five seconds."""
    pool = host.pool(served(FakeEngineConfig(latency_s=5.0), request_timeout_s=0.3, max_outstanding=1))
    client = pool.client

    async def one_by_one():
        return [(await client.generate([request]))[0] for request in requests(4)]

    started = time.monotonic()
    assert all(completion.error.startswith("no answer within 0.3 s") for completion in asyncio.run(one_by_one()))
    assert pool.requests == 4
    assert time.monotonic() - started < 5


@pytest.mark.real
def test_equal_requests_of_two_senders_reach_the_engine_once(host):
    """As when a crashed worker's rows are driven again while its first requests still run."""
    pool = host.pool(served(FakeEngineConfig(latency_s=0.5)))

    async def both():
        return await asyncio.gather(*(sender.generate(requests(10)) for sender in (pool.client, pool.client)))

    first, second = asyncio.run(both())
    assert first == second
    assert pool.requests == 10


@pytest.mark.real
def test_an_ask_the_cluster_cannot_meet_fails_at_once(host):
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"3 engine replicas of any needs 12 CPU, and the cluster has 8"):
        host.pool(served(replicas=3, cpus_each=4))
    host.pool(served(replicas=1, cpus_each=6))
    with pytest.raises(ClusterError, match=r"beside 1 running pools needs 10 CPU, and the cluster has 8"):
        host.pool(served(FakeEngineConfig(fail_rate=0.1), replicas=1, cpus_each=4))
    assert time.monotonic() - started < 20


@pytest.mark.real
def test_an_ask_that_others_stand_in_the_way_of_names_what_is_missing(ray_session):
    import ray

    @ray.remote(num_cpus=6)
    class Occupant:
        def here(self) -> bool:
            return True

    occupant = Occupant.remote()
    ray.get(occupant.here.remote())
    engines = EngineHost()
    try:
        with pytest.raises(ClusterError, match=r"1 of 1 engine .* each needs 4 CPU \(cluster has 2 free of 8\)"):
            engines.pool(served(cpus_each=4, start_timeout_s=2))
    finally:
        engines.close()
        ray.kill(occupant)


@pytest.mark.real
def test_an_engine_that_loads_too_long_names_the_knob_and_another_stage_may_wait_longer(host):
    slow = FakeEngineConfig(load_s=3.0)
    with pytest.raises(ClusterError, match=r"1 of 1 engine replicas were not ready within 1 s; .*0\.1 CPU") as caught:
        host.pool(served(slow, start_timeout_s=1))
    assert caught.value.knob.startswith("pool.start_timeout_s")
    assert host.starts == 0, "nothing is left of it"
    pool = host.pool(served(slow, start_timeout_s=60))
    assert pool.infos[0].load_s >= 3
    assert [c.error for c in asyncio.run(pool.client.generate(requests(2)))] == [None] * 2


@pytest.mark.real
def test_a_path_that_is_no_model_is_one_line(host, tmp_path):
    no_model = ServedModel(model=ModelRef(path=str(tmp_path)), pool=PoolConfig(cpus_each=0.1))
    with pytest.raises(ModelError, match=r"holds no config\.json") as caught:
        host.pool(no_model)
    assert "\n" not in str(caught.value)


# --- engines and trainers on the same devices -------------------------------------------------------------------------

REST = {"GPU": 0.45}
HALF = {"GPU": 0.5}
"""What a training worker asks of a device that an engine holds the other half of."""


@pytest.fixture
def placed_host(ray_session):
    hosts = []

    def make(placement):
        hosts.append(EngineHost(placement))
        return hosts[-1]

    yield make
    for engines in hosts:
        engines.close()


def statuses(pool) -> list[str]:
    import ray

    return ray.get([replica.status.remote() for replica in pool.replicas.values()])


def free_gpus() -> float:
    import ray

    return ray.available_resources().get("GPU", 0.0)


@pytest.mark.real
def test_timeshare_puts_the_engine_to_sleep_and_wakes_the_same_replica(placed_host, wait_until):
    """With real vLLM, which on CPU is closed and built anew inside its actor."""
    host = placed_host("timeshare")
    model = ServedModel(model=ModelRef(path="playground://base"), pool=PoolConfig(gpus_each=0.55))
    greedy = [Request(id="a", sampling=Sampling(max_tokens=8), text="flip the word")]
    pool = host.pool(model)
    before = asyncio.run(pool.client.generate(greedy))
    host.make_room(REST, REST, 1, "one worker", "workers.gpus_each")
    assert statuses(pool) == ["asleep"]
    wait_until(lambda: free_gpus() == 0.45, "the replica keeps its share of the device")
    with pytest.raises(GenerationError, match="asleep"):
        asyncio.run(pool.client.generate(greedy))
    assert host.pool(model) is pool
    assert asyncio.run(pool.client.generate(greedy)) == before
    assert host.starts == 1


@pytest.mark.real
def test_timeshare_with_fractions_above_a_device_is_refused(placed_host):
    host = placed_host("timeshare")
    host.pool(served(gpus_each=0.8))
    with pytest.raises(ConfigError, match=r"pool\.gpus_each=0\.8, workers\.gpus_each=0\.5"):
        host.make_room(HALF, HALF, 1, "one worker", "workers.gpus_each")


@pytest.mark.real
def test_separate_refuses_what_does_not_fit_beside_running_engines(placed_host):
    host = placed_host("separate")
    pool = host.pool(served(gpus_each=0.5))
    host.make_room(HALF, HALF, 1, "one worker", "workers.gpus_each")
    assert statuses(pool) == ["fake engine, alive"]
    with pytest.raises(ClusterError, match=r"beside the engines needs 1\.5 GPU"):
        host.make_room({"GPU": 1.0}, {"GPU": 1.0}, 1, "one worker", "workers.gpus_each")


@pytest.mark.real
@pytest.mark.parametrize(
    ("placement", "needs", "stays"), [("restart", 0.5, False), ("auto", 0.5, True), ("auto", 1, False)]
)
def test_engines_are_given_back_where_they_must(placed_host, wait_until, placement, needs, stays):
    host, said = placed_host(placement), []
    pool = host.pool(served(gpus_each=0.5))
    host.make_room({"GPU": needs}, {"GPU": needs}, 1, "one worker", "workers.gpus_each", said.append)
    assert bool(host.held) == stays
    assert bool(said) != stays
    wait_until(lambda: free_gpus() == (0.5 if stays else 1.0), "the device is free again")
    assert (host.pool(served(gpus_each=0.5)) is pool) == stays


@pytest.mark.real
def test_only_pools_that_later_work_asks_for_are_kept(placed_host, wait_until):
    host = placed_host("auto")
    kept, gone = served(gpus_each=0.25), served(FakeEngineConfig(fail_rate=0.5), gpus_each=0.25)
    pool = host.pool(kept)
    host.pool(gone)
    host.keep([kept])
    wait_until(lambda: free_gpus() == 0.75, "the other pool's share is free")
    assert host.pool(kept) is pool
    assert host.starts == 2


@pytest.mark.real
def test_room_is_awaited_for_all_together_and_given_back(ray_session, wait_until):
    from itune_ray import room

    host = EngineHost()
    host.pool(served(gpus_each=0.5))
    try:
        with pytest.raises(
            ClusterError, match=r"two workers were not placed within 0.3 s; together they need 1 GPU .free: 0.5"
        ):
            room.await_room([HALF, HALF], 0.3, "two workers", "workers.start_timeout_s")
        room.await_room([HALF], 10, "one worker", "workers.start_timeout_s")
    finally:
        host.close()
    wait_until(lambda: free_gpus() == 1.0, "all room is free again")
    room.await_room([HALF, HALF], 10, "two workers", "workers.start_timeout_s")
