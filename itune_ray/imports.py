"""Slow imports: beside a wait for other processes, and without the garbage collector."""

import contextlib
import gc
import importlib
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def importing(*modules: str) -> Iterator[None]:
    """Import modules in a thread while the block waits; they are there when it ends without an error.

    For blocks that import nothing which imports these modules: of a cycle of imports that two threads enter, one can
    see half a module. An import that fails is left to raise where the module is used.
    """
    if not modules:
        yield
        return

    def load() -> None:
        for module in modules:
            with contextlib.suppress(Exception):
                importlib.import_module(module)

    thread = threading.Thread(target=load, name="imports", daemon=True)
    thread.start()
    yield
    thread.join()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without garbage collection in the block, and without what it made in later ones: imports make much that stays."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collected:
            gc.enable()
