"""LoRA slots: loaded once, evicted least recently used, never under a request, and fair."""

import asyncio

import pytest

from itune_ray.engine.adapters import AdapterSlots
from itune_ray.errors import ModelError


class Engine:
    """Remembers what is loaded."""

    def __init__(self, capacity: int):
        self.loaded: dict[int, str] = {}
        self.loads: list[str] = []
        self.most = 0
        self.slots = AdapterSlots(capacity, self._load, self._unload)

    async def _load(self, number: int, folder: str) -> None:
        await asyncio.sleep(0)
        if folder == "broken":
            raise ModelError("cannot load")
        self.loaded[number] = folder
        self.loads.append(folder)
        self.most = max(self.most, len(self.loaded))

    async def _unload(self, number: int) -> None:
        del self.loaded[number]

    async def use(self, folder: str, pause: float = 0.0) -> None:
        async with self.slots.hold(folder) as number:
            await asyncio.sleep(pause)
            assert self.loaded[number] == folder, "taken out under a request"


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 10))


def test_an_adapter_is_loaded_once():
    engine = Engine(2)
    run(asyncio.wait_for(all_of(engine, ["a", "b", "a", "b", "a"]), 5))
    assert engine.loads == ["a", "b"]


async def all_of(engine: Engine, folders: list[str], pause: float = 0.001) -> None:
    await asyncio.gather(*(engine.use(folder, pause) for folder in folders))


def test_the_least_recently_used_goes_first():
    async def main():
        engine = Engine(2)
        for folder in ("a", "b", "a", "c"):
            await engine.use(folder)
        assert set(engine.loaded.values()) == {"a", "c"}

    run(main())


def test_never_more_than_the_capacity_and_never_under_a_request():
    engine = Engine(2)
    run(all_of(engine, [f"adapter-{i % 5}" for i in range(60)]))
    assert engine.most == 2


def test_a_busy_adapter_does_not_keep_another_out_for_ever():
    async def main():
        engine, order = Engine(1), list[str]()

        async def use(folder: str) -> None:
            await engine.use(folder, 0.01)
            order.append(folder)

        tasks = [asyncio.ensure_future(use("hot")) for _ in range(3)]
        await asyncio.sleep(0.005)
        tasks.append(asyncio.ensure_future(use("cold")))
        await asyncio.sleep(0)
        tasks += [asyncio.ensure_future(use("hot")) for _ in range(20)]
        await asyncio.gather(*tasks)
        assert order.index("cold") == 3

    run(main())


def test_one_that_cannot_be_loaded_takes_no_slot():
    async def main():
        engine = Engine(1)
        with pytest.raises(ModelError, match="cannot load"):
            await engine.use("broken")
        await engine.use("a")
        assert engine.loads == ["a"]

    run(main())


def test_without_room_for_adapters_the_knob_is_named():
    with pytest.raises(ModelError, match=r"engine\.max_adapters"):
        run(Engine(0).use("a"))
