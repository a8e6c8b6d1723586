"""A replica's own count of what its engine read and wrote."""

import asyncio

from engine_contract import GREEDY, chat

from itune_ray.config.shared import FakeEngineConfig, ModelRef
from itune_ray.engine.fake import FakeEngine
from itune_ray.engine.mailbox import Mailbox
from itune_ray.engine.replica import Replica
from itune_ray.engine.usage import Usage

TEXTS = ["one two", "three", "four five six"]


def asked(*, twice: bool = False) -> tuple[Usage, Usage]:
    """A new replica's count, and the same after two samples of a prompt and three embedded texts."""

    async def count() -> tuple[Usage, Usage]:
        replica = Replica(FakeEngineConfig(latency_s=0.05), ModelRef(path="m"), 1)
        before, request = await replica.usage(), chat("one two three")
        box = Mailbox()
        await asyncio.gather(*(replica._answer(box, ticket, request) for ticket in range(1 + twice)))
        await asyncio.gather(*(replica.embed([text]) for text in TEXTS))
        return before, await replica.usage()

    return asyncio.run(count())


def test_prompts_samples_and_embedded_texts_are_counted():
    (completion,) = asyncio.run(FakeEngine().generate([chat("one two three")]))
    before, after = asked()
    assert (before.prompt, before.generated) == (0, 0)
    assert after.life == before.life
    assert after.prompt == len(completion.prompt_token_ids) + 6
    assert after.generated == sum(len(sample.token_ids) for sample in completion.samples) > 0


def test_a_request_that_two_share_is_counted_once():
    once, shared = asked()[1], asked(twice=True)[1]
    assert (shared.prompt, shared.generated) == (once.prompt, once.generated)
    assert shared.life != once.life, "another process"


def test_a_prompt_that_was_refused_costs_nothing():
    async def refused() -> Usage:
        replica = Replica(FakeEngineConfig(), ModelRef(path="m"), 1)
        await replica._answer(Mailbox(), 0, chat("long " * 600, GREEDY))
        return await replica.usage()

    usage = asyncio.run(refused())
    assert (usage.prompt, usage.generated) == (0, 0)
