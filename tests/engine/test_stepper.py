"""The stepping task on a scripted engine: batching, refusals, cancellation, death."""

import asyncio
import threading
from dataclasses import dataclass

import pytest

from itune_ray.engine.base import EngineDiedError
from itune_ray.engine.stepper import Stepper
from itune_ray.errors import GenerationError


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

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def add_request(self, name, prompt, params, lora_request=None) -> None:
        self.threads.add(threading.current_thread().name)
        if prompt < 0:
            self.left[name] = 10**9  # noted before it is refused, as vLLM does
            raise ValueError("negative prompt")
        self.left[name] = prompt

    def abort_request(self, names) -> None:
        for name in names:
            self.left.pop(name, None)

    def step(self) -> list[Output]:
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
        first = asyncio.ensure_future(stepper.complete(100, None))
        while stepper.steps < 10:
            await asyncio.sleep(0)
        outputs = await asyncio.gather(first, *(stepper.complete(3 + i, None) for i in range(4)))
        assert len({output.request_id for output in outputs}) == 5

    run(main())
    assert engine.batches[:10] == [1] * 10
    assert max(engine.batches) == 5
    assert len(engine.batches) == stepper.steps == 100, "it steps only while there is something to do"
    assert len(engine.threads) == 1, "the engine is not thread-safe"


def test_an_answer_and_what_its_caller_asks_next_take_one_step_each(scripted):
    engine, stepper = scripted

    async def ask(times: int) -> None:
        for _ in range(times):
            await asyncio.shield(asyncio.ensure_future(asyncio.wait_for(stepper.complete(1, None), 5)))

    run(ask(4))
    assert engine.batches == [1] * 4
    run(ask(4))  # on another loop
    assert len(engine.batches) == 8


def test_an_answer_that_comes_with_its_cancellation_is_nobodys(scripted, monkeypatch):
    engine, stepper = scripted
    step = engine.step

    async def main():
        tasks = [asyncio.ensure_future(stepper.complete(2, None)) for _ in range(2)]

        def cancelled_while_stepping():
            if engine.batches:
                tasks[0].cancel()
            return step()

        monkeypatch.setattr(engine, "step", cancelled_while_stepping)
        return await asyncio.gather(*tasks, return_exceptions=True)

    cancelled, finished = run(main())
    assert isinstance(cancelled, asyncio.CancelledError)
    assert finished.finished


def test_closing_waits_for_the_step_it_is_in(scripted):
    engine, stepper = scripted
    step, closer, waited = engine.step, threading.Thread(target=stepper.close), []

    def closed_while_stepping():
        closer.start()
        closer.join(0.05)
        waited.append(closer.is_alive())
        return step()

    async def main():
        engine.step = closed_while_stepping
        asked = asyncio.ensure_future(stepper.complete(10**9, None))
        while not waited:
            await asyncio.sleep(0)
        with pytest.raises(GenerationError, match="was closed"):
            await asked
        for later in (stepper.complete(1, None), stepper.call(lambda it: it)):
            with pytest.raises(GenerationError, match="was closed"):
                await later

    run(main())
    closer.join(5)
    assert (waited, closer.is_alive(), stepper.steps) == ([True], False, 1)


def test_a_refused_request_fails_alone(scripted):
    engine, stepper = scripted

    async def main():
        bad, good = await asyncio.gather(stepper.complete(-1, None), stepper.complete(1, None), return_exceptions=True)
        assert (type(bad), str(bad)) == (ValueError, "negative prompt")
        assert good.finished

    run(main())
    assert not engine.left, "it would step for ever"


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
