import asyncio
import threading
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One running event loop for a module's engines, as in their actor; see `engine_contract.on_loop`."""
    running = asyncio.new_event_loop()
    threading.Thread(target=running.run_forever, daemon=True).start()
    yield running
    running.call_soon_threadsafe(running.stop)
