"""Pools with a range of replicas on a real cluster of several nodes, with fake engines."""

import asyncio

import pytest
from pydantic import ValidationError
from test_pool import requests, served

from itune_ray import room
from itune_ray.config.shared import FakeEngineConfig, PoolConfig
from itune_ray.engine.host import EngineHost
from itune_ray.nodes import NodeKind

SLOT = {"slot": 1}
NODE = {"num_cpus": 2, "resources": {"slot": 2}}
MAY_BECOME_TWO = [NodeKind("any", {"CPU": 2, "slot": 2}, 2)]


@pytest.mark.parametrize(("given", "message"), [([4, 2], r"min at most max, got \[4, 2\]"), ([0, 2], "greater than 0")])
def test_a_range_that_is_none_is_refused(given, message):
    with pytest.raises(ValidationError, match=message):
        PoolConfig(replicas=given)


@pytest.fixture(scope="module")
def nodes():
    """A cluster of one node with room for two replicas."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def said():
    return []


@pytest.fixture
def host(nodes, said, wait_until):
    engines = EngineHost(say=said.append)
    yield engines
    engines.close()
    room.may_grow_to([])
    wait_until(lambda: free("slot") == total("slot"), "all replicas are gone")


def free(name: str) -> float:
    import ray

    return ray.available_resources().get(name, 0.0)


def total(name: str) -> float:
    import ray

    return ray.cluster_resources().get(name, 0.0)


def ranged(least: int, most: int, latency_s: float = 0.0, **pool):
    return served(FakeEngineConfig(latency_s=latency_s), replicas=(least, most), resources_each=SLOT, **pool)


@pytest.mark.real
def test_no_more_are_asked_for_than_there_is_room_for(host, said):
    pool = host.pool(ranged(1, 4))
    assert pool.size == 2
    assert said == ["engines: 2 of 4 replicas of any: no room for more beside what else it must hold"]
    assert [c.error for c in asyncio.run(pool.client.generate(requests(5)))] == [None] * 5


@pytest.mark.real
def test_the_stages_workers_and_other_models_have_their_room(host, said, wait_until):
    host.leave(SLOT)
    assert host.pool(ranged(1, 4)).size == 1
    host.close()
    host.leave({})
    pool, other = host.pool(ranged(1, 2)), ranged(1, 1, latency_s=0.1)
    wait_until(lambda: len(pool.infos) == 2, "both replicas are ready")
    client = pool.client
    host.leave({}, [other])
    assert pool.size == 1
    assert said[-1] == "engines: 1 of 2 replicas of any are kept: the rest is room for the stage's workers"
    assert host.pool(other).size == 1
    assert [c.error for c in asyncio.run(client.generate(requests(20)))] == [None] * 20


@pytest.mark.real
def test_replicas_join_when_their_node_comes(host, nodes, said, wait_until):
    import ray

    room.may_grow_to(MAY_BECOME_TWO)
    pool = host.pool(ranged(2, 4, latency_s=0.2, max_outstanding=4))
    assert (len(pool.infos), pool.size, host.starts) == (2, 4, 2)

    async def before_and_after():
        client = pool.client
        early = await client.generate(requests(4))
        node = nodes.add_node(**NODE)
        while len(client._connected()[0].up) < 4:
            await client.generate(requests(4))
        late = await client.generate(requests(32))
        return node, early, late

    node, early, late = asyncio.run(asyncio.wait_for(before_and_after(), 100))
    assert late[:4] == early
    wait_until(lambda: host.starts == 4, "the pool knows of all four")
    assert all(ray.get([replica.requests.remote() for replica in pool.replicas.values()]))
    assert not said
    host.close()
    nodes.remove_node(node)
    wait_until(lambda: total("slot") == 2, "the node is gone")


@pytest.mark.real
def test_replicas_that_never_come_are_given_up_and_hold_nothing_back(host, nodes, said, wait_until):
    room.may_grow_to(MAY_BECOME_TWO)
    pool = host.pool(ranged(2, 4, start_timeout_s=8))
    client = pool.client
    assert pool.size == 4
    wait_until(lambda: bool(said), "the others are given up", timeout=30)
    assert len(said) == 1
    assert said[0].startswith(
        "engines: 2 of 4 replicas of any are kept: 2 of 4 engine replicas were not ready within 8 s"
    )
    assert [c.error for c in asyncio.run(client.generate(requests(5)))] == [None] * 5
    node = nodes.add_node(**NODE)
    wait_until(lambda: total("slot") == 4, "the node has come")
    with pytest.raises(AssertionError):
        wait_until(lambda: free("slot") < 2, "something takes the node", timeout=2)
    assert (pool.size, host.starts) == (2, 2)
    nodes.remove_node(node)
    wait_until(lambda: total("slot") == 2, "the node is gone")
