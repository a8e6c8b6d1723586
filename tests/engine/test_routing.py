"""Routing: balance, the bound that is the backpressure, replicas that go and come."""

import asyncio

import pytest

from itune_ray.engine.routing import Router
from itune_ray.errors import GenerationError


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 10))


async def hold(router: Router, done: asyncio.Event, taken: list[int]) -> None:
    async with router.slot() as index:
        taken.append(index)
        await done.wait()


def test_load_is_spread_and_never_above_the_bound():
    async def main():
        router, done, taken = Router(4, 10), asyncio.Event(), list[int]()
        tasks = [asyncio.ensure_future(hold(router, done, taken)) for _ in range(60)]
        await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert router.outstanding == [10, 10, 10, 10], "20 of 60 wait at the sender"
        done.set()
        await asyncio.gather(*tasks)
        assert len(taken) == 60
        assert router.outstanding == [0, 0, 0, 0]

    run(main())


def test_two_choices_keep_the_longest_queue_short():
    async def main():
        router, done = Router(8, 1000), asyncio.Event()
        tasks = [asyncio.ensure_future(hold(router, done, [])) for _ in range(800)]
        await asyncio.sleep(0.01)
        assert max(router.outstanding) - min(router.outstanding) <= 8, router.outstanding
        done.set()
        await asyncio.gather(*tasks)

    run(main())


def test_a_replica_that_is_down_gets_nothing_until_it_is_up():
    async def main():
        router, done, taken = Router(2, 5), asyncio.Event(), list[int]()
        router.mark(0, up=False)
        tasks = [asyncio.ensure_future(hold(router, done, taken)) for _ in range(7)]
        await asyncio.sleep(0.01)
        assert taken == [1] * 5
        router.mark(0, up=True)
        await asyncio.sleep(0.01)
        assert taken[5:] == [0, 0]
        done.set()
        await asyncio.gather(*tasks)

    run(main())


def test_when_no_replica_is_left_all_who_wait_are_told():
    async def main():
        router = Router(1, 1)
        router.mark(0, up=False)
        waiting = [asyncio.ensure_future(hold(router, asyncio.Event(), [])) for _ in range(3)]
        await asyncio.sleep(0.01)
        router.close(GenerationError("all dead"))
        for result in await asyncio.gather(*waiting, return_exceptions=True):
            with pytest.raises(GenerationError, match="all dead"):
                raise result

    run(main())
