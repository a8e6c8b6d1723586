"""The stepping thread on a scripted engine: batching, refusals, cancellation, death."""

import asyncio
import threading
from dataclasses import dataclass

import pytest

from itune_ray.engine.base import EngineDiedError
from itune_ray.engine.stepper import Stepper


@dataclass
class Output:
    request_id: str
    finished: bool = True


class Scripted:
    """Finishes a request after as many steps as its prompt says."""

    def __init__(self):
        self.left: dict[str, int] = {}
        self.batches: list[int] = []
        self.threads: set[str] = set()
        self.go = threading.Event()
        self.go.set()

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def add_request(self, name, prompt, params, lora_request=None) -> None:
        self.threads.add(threading.current_thread().name)
        if prompt < 0:
            raise ValueError("negative prompt")
        self.left[name] = prompt

    def abort_request(self, names) -> None:
        for name in names:
            self.left.pop(name, None)

    def step(self) -> list[Output]:
        self.go.wait(5)
        self.threads.add(threading.current_thread().name)
        self.batches.append(len(self.left))
        if any(steps == 666 for steps in self.left.values()):
            raise RuntimeError("the engine\nis gone")
        self.left = {name: steps - 1 for name, steps in self.left.items()}
        done = [name for name, steps in self.left.items() if steps <= 0]
        for name in done:
            del self.left[name]
        return [Output(name) for name in done]


@pytest.fixture
def scripted():
    engine = Scripted()
    stepper = Stepper(engine)
    yield engine, stepper
    stepper.close()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 10))


def test_requests_join_the_running_batch(scripted):
    engine, stepper = scripted

    async def main():
        engine.go.clear()
        tasks = [asyncio.ensure_future(stepper.complete(3 + i, None)) for i in range(5)]
        await asyncio.sleep(0.05)
        engine.go.set()
        outputs = await asyncio.gather(*tasks)
        assert len({output.request_id for output in outputs}) == 5

    run(main())
    assert max(engine.batches) == 5
    assert engine.threads == {"vllm-step"}, "the engine is not thread-safe"


def test_a_refused_request_fails_alone(scripted):
    _, stepper = scripted

    async def main():
        bad, good = await asyncio.gather(stepper.complete(-1, None), stepper.complete(1, None), return_exceptions=True)
        assert (type(bad), str(bad)) == (ValueError, "negative prompt")
        assert good.finished

    run(main())


def test_a_cancelled_request_is_aborted(scripted):
    engine, stepper = scripted

    async def main():
        task = asyncio.ensure_future(stepper.complete(10**9, None))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for _ in range(100):
            if not engine.left:
                return
            await asyncio.sleep(0.01)
        pytest.fail("still in the engine")

    run(main())


def test_calls_run_between_steps(scripted):
    engine, stepper = scripted
    assert run(stepper.call(lambda it: it is engine)) is True
    with pytest.raises(ZeroDivisionError):
        run(stepper.call(lambda it: 1 / 0))


def test_a_failed_step_tells_all_and_later_ones_at_once(scripted):
    _, stepper = scripted

    async def main():
        results = await asyncio.gather(stepper.complete(5, None), stepper.complete(666, None), return_exceptions=True)
        assert all(isinstance(result, EngineDiedError) for result in results)
        with pytest.raises(EngineDiedError, match="RuntimeError: the engine is gone"):
            await stepper.complete(1, None)
        assert stepper.status() == "RuntimeError: the engine is gone"

    run(main())
