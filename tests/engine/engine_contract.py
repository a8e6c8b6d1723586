"""What every engine must do, run against the fake one and against real vLLM."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from itune_ray.engine.base import Completion, Request, Sampling

SAMPLED = Sampling(temperature=0.8, max_tokens=24, n=2, seed=11)
GREEDY = Sampling(temperature=0.0, max_tokens=24)


def chat(text: str, sampling: Sampling = SAMPLED, **fields) -> Request:
    """A request of one user turn."""
    return Request(id=text, sampling=sampling, messages=({"role": "user", "content": text},), **fields)


class Contract:
    """Subclasses give `ask`: requests in, completions out, on one event loop."""

    too_long = "a b c d " * 600

    def ask(self, requests: Sequence[Request]) -> list[Completion]:
        raise NotImplementedError

    def adapters(self) -> list[str]:
        """Two adapters that answer otherwise than the base."""
        raise NotImplementedError

    def test_order_ids_and_all_samples(self):
        requests = [chat(f"Once upon a time {i}", replace(SAMPLED, n=1 + i % 3)) for i in range(12)]
        completions = self.ask(requests)
        assert [c.id for c in completions] == [r.id for r in requests]
        assert [len(c.samples) for c in completions] == [1 + i % 3 for i in range(12)]
        for completion in completions:
            assert completion.error is None
            assert completion.prompt_token_ids
            for sample in completion.samples:
                assert sample.finish_reason in ("stop", "length")
                assert 0 < len(sample.token_ids) <= 24

    def test_samples_of_one_prompt_differ_and_greedy_ones_do_not(self):
        sampled, greedy = self.ask([chat("Lily saw", replace(SAMPLED, n=4)), chat("Lily saw", replace(GREEDY, n=4))])
        assert len({s.text for s in sampled.samples}) > 1
        assert len({s.text for s in greedy.samples}) == 1

    def test_a_seed_gives_the_same_in_any_company(self):
        requests = [chat(f"There was a cat {i}", replace(SAMPLED, seed=100 + i)) for i in range(9)]
        together = self.ask(requests)
        alone = [self.ask([request])[0] for request in reversed(requests)]
        assert alone[::-1] == together
        mixed = self.ask([chat("company", replace(SAMPLED, seed=i)) for i in range(20)] + requests[4:6])
        assert mixed[-2:] == together[4:6]
        other = self.ask([replace(requests[0], sampling=replace(SAMPLED, seed=7))])[0]
        assert other.samples != together[0].samples

    def test_a_prompt_that_is_too_long_fails_alone(self):
        requests = [chat("short one"), chat(self.too_long), chat("short two")]
        first, long, second = self.ask(requests)
        assert [c.error for c in (first, second)] == [None, None]
        assert long.error.startswith("prompt_too_long: ")
        assert long.error.endswith(f", max_model_len {512}")
        assert not long.retryable
        assert long.samples == ()

    def test_max_tokens_ends_with_length(self):
        (cut,) = self.ask([chat("One day", replace(GREEDY, max_tokens=1))])
        assert (cut.samples[0].finish_reason, len(cut.samples[0].token_ids)) == ("length", 1)

    def test_logprobs_of_chosen_tokens_and_of_the_prompt(self):
        (completion,) = self.ask([chat("One day", replace(GREEDY, logprobs=0, prompt_logprobs=0))])
        (sample,) = completion.samples
        assert len(sample.logprobs) == len(sample.token_ids)
        for token, entry in zip(sample.token_ids, sample.logprobs, strict=True):
            assert entry[token] <= 0
        assert completion.prompt_logprobs[0] is None
        for token, entry in zip(completion.prompt_token_ids[1:], completion.prompt_logprobs[1:], strict=True):
            assert entry[token] <= 0

    def test_an_answer_is_one_of_the_choices(self):
        asked = [chat(f"Is it {i}?", replace(SAMPLED, choice=("yes", "no"), seed=i)) for i in range(8)]
        texts = {s.text for c in self.ask(asked) for s in c.samples}
        assert texts <= {"yes", "no"}
        assert texts

    def test_adapters_and_base_in_one_batch(self):
        one, two = self.adapters()
        prompts = [f"The little dog {i}" for i in range(4)]
        by = {who: [chat(p, GREEDY, adapter=who) for p in prompts] for who in (None, one, two)}
        alone = {who: self.ask(requests) for who, requests in by.items()}
        mixed = self.ask([request for trio in zip(*by.values(), strict=True) for request in trio])
        for index, who in enumerate(by):
            assert mixed[index::3] == alone[who]
        texts = {who: [c.samples[0].text for c in alone[who]] for who in by}
        assert texts[None] != texts[one] != texts[two] != texts[None]


def on_loop(loop: asyncio.AbstractEventLoop, coroutine):
    """Run on the engine's own loop, from outside it."""
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result(timeout=120)
