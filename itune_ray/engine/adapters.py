"""Which LoRA adapters are loaded: at most `capacity`, the least recently used unloaded first, none while it answers."""

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from itune_ray.errors import ModelError


@dataclass
class _Slot:
    number: int
    users: int = 0


class AdapterSlots:
    """Loads adapters on first use.

    vLLM would evict by itself, but it answers base-model rows with the last adapter once all its slots are taken, so
    the engine has one slot more than `capacity` and this class keeps that one empty.

    Args:
        capacity: Adapters loaded at once.
        load: Loads an adapter (its number, its folder) into the engine.
        unload: Takes one out.
    """

    def __init__(
        self, capacity: int, load: Callable[[int, str], Awaitable[object]], unload: Callable[[int], Awaitable[object]]
    ):
        self._capacity, self._load, self._unload = capacity, load, unload
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        self._numbers = itertools.count(1)
        # One arrival at a time looks for a slot, so that a busy adapter cannot keep the others out for ever.
        self._gate = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def hold(self, folder: str) -> AsyncIterator[int]:
        """The number of the adapter, which stays loaded inside the context."""
        async with self._gate:
            slot = await self._slot(folder)
            slot.users += 1
        try:
            yield slot.number
        finally:
            slot.users -= 1
            self._freed.set()

    async def _slot(self, folder: str) -> _Slot:
        if folder in self._slots:
            self._slots.move_to_end(folder)
            return self._slots[folder]
        if self._capacity == 0:
            raise ModelError(
                "the engine was started without room for LoRA adapters",
                got=folder,
                allowed="1 or more",
                knob="engine.max_adapters",
            )
        if len(self._slots) >= self._capacity:
            await self._evict()
        slot = _Slot(next(self._numbers))
        await self._load(slot.number, folder)
        self._slots[folder] = slot
        return slot

    async def _evict(self) -> None:
        while True:
            self._freed.clear()
            idle = next((folder for folder, slot in self._slots.items() if slot.users == 0), None)
            if idle is not None:
                await self._unload(self._slots.pop(idle).number)
                return
            await self._freed.wait()
