"""The fake engine keeps the engine contract, and injects the faults it is told to."""

import asyncio

import pytest
from engine_contract import Contract, chat

from itune_ray.config.shared import FakeEngineConfig
from itune_ray.engine.fake import REFUSAL, FakeEngine


class TestFakeContract(Contract):
    """The contract, without a model."""

    def ask(self, requests):
        """A new engine for every call: nothing may depend on what came before."""
        return asyncio.run(FakeEngine().generate(requests))

    def adapters(self):
        """Any two names."""
        return ["/adapters/one", "/adapters/two"]


def shares(**config) -> list:
    engine = FakeEngine(FakeEngineConfig(**config))
    return asyncio.run(engine.generate([chat(f"prompt {i}") for i in range(400)]))


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_failures_come_at_their_rate_and_on_every_attempt(rate):
    failed = [c.id for c in shares(fail_rate=rate) if c.error]
    assert abs(len(failed) / 400 - rate) < 0.07
    assert failed == [c.id for c in shares(fail_rate=rate) if c.error]


def test_flaky_requests_fail_once():
    engine = FakeEngine(FakeEngineConfig(flaky_rate=0.5))
    requests = [chat(f"prompt {i}") for i in range(100)]
    first, second = (asyncio.run(engine.generate(requests)) for _ in range(2))
    assert 20 < sum(c.retryable for c in first) < 80
    assert not any(c.error for c in second)


def test_refusals_empty_answers_and_cuts():
    assert {s.text for c in shares(refuse_rate=1.0) for s in c.samples} == {REFUSAL}
    assert {s.text for c in shares(empty_rate=1.0) for s in c.samples} == {""}
    assert {s.finish_reason for c in shares(truncate_rate=1.0) for s in c.samples} == {"length"}
