"""Asking and grading, with clients in this process instead of engines."""

import asyncio
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from itune_ray.benchmarks.base import Benchmark, Grade, Item, Metric, Reply, share
from itune_ray.benchmarks.perplexity import Perplexity
from itune_ray.config.evaluate import PerplexityBenchmark
from itune_ray.config.shared import FileSource, ModelRef, SamplingConfig
from itune_ray.data.chat import ChatRenderer
from itune_ray.data.records import Record
from itune_ray.engine.base import Completion, Sample
from itune_ray.errors import EvalError
from itune_ray.evaluate.ask import Asked, Asker, Question

GREEDY = SamplingConfig(temperature=0.0, top_p=1.0, max_tokens=8, stop=("</s>",))
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} end {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


class Echo(Benchmark):
    """Right is what repeats the prompt."""

    version = "1"
    metrics = (Metric("exact_match", "share", share, "equal", binary=True),)

    def items(self):
        return [item(i, f"word{i}") for i in range(4)]

    def grade(self, item: Item, reply: Reply) -> Grade:
        ok = reply.text == item.reference
        return Grade(score=float(ok), ok=ok, sums={"exact_match": (float(ok), 1.0)})

    def settings(self):
        return {}


def item(index, word, **fields):
    return Item(
        key=f"k{index}", reference=word, category="echo", messages=({"role": "user", "content": word},), **fields
    )


class EchoClient:
    """Repeats the prompt; fails where told."""

    def __init__(self, failures=()):
        self.seen, self.failures = [], dict(failures)

    async def generate(self, requests):
        self.seen += requests
        return [self._complete(request) for request in requests]

    def _complete(self, request):
        word = request.messages[-1]["content"]
        if word in self.failures:
            return Completion(id=request.id, error=self.failures[word], retryable=True)
        sample = Sample(text=word, token_ids=(1, 2), finish_reason="stop")
        return Completion(id=request.id, samples=(sample,), prompt_token_ids=(7, 8, 9))


def asked(benchmark, client, questions=None, sampling=GREEDY, seed=0, adapter=None, render=None):
    """The answers to a benchmark's items, or to the given ones."""
    items = benchmark.items() if questions is None else questions
    asker = Asker(
        {"m": Asked(client, ModelRef(path="x", adapter=adapter))}, {benchmark.name: benchmark}, sampling, seed, render
    )
    return asyncio.run(
        asker.answer([Question(model="m", benchmark=benchmark.name, position=i, item=x) for i, x in enumerate(items)])
    )


def test_replies_come_back_graded_and_in_order():
    answers = asked(Echo("echo"), EchoClient())
    assert [a.reply.text for a in answers] == ["word0", "word1", "word2", "word3"]
    assert all(a.grade.ok for a in answers)
    assert {(a.num_prompt_tokens, a.num_tokens) for a in answers} == {(3, 2)}


def test_an_item_that_fails_fails_alone():
    answers = asked(Echo("echo"), EchoClient({"word1": "out of memory"}))
    assert [a.cause for a in answers] == [None, "out of memory", None, None]
    assert answers[1].grade is None
    assert answers[1].retryable


def test_requests_carry_adapter_stops_and_a_seed_of_their_own():
    client = EchoClient()
    asked(Echo("echo"), client, [item(0, "a", stop=("\n",)), item(1, "b")], adapter="/adapters/one", seed=5)
    first, second = client.seen
    assert first.adapter == "/adapters/one"
    assert (first.sampling.stop, second.sampling.stop) == (("</s>", "\n"), ("</s>",))
    assert first.sampling.seed != second.sampling.seed
    again = EchoClient()
    asked(Echo("echo"), again, [item(0, "a", stop=("\n",)), item(1, "b")], adapter="/adapters/one", seed=5)
    assert again.seen == client.seen
    other = EchoClient()
    asked(Echo("echo"), other, [item(0, "a"), item(1, "b")], seed=6)
    assert other.seen[0].sampling.seed != first.sampling.seed


def test_request_ids_name_the_work_and_not_only_the_item():
    ids = set()
    for sampling in (GREEDY, SamplingConfig(max_tokens=9)):
        client = EchoClient()
        asked(Echo("echo"), client, sampling=sampling)
        ids |= {request.id for request in client.seen}
    assert len(ids) == 8


# --- scored documents ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def renderer():
    words = ["<pad>", "<s>", "end", "user", "assistant", *(f"w{i}" for i in range(20))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return ChatRenderer(
        PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="end", pad_token="<pad>"), TEMPLATE
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=25,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


class ForwardClient:
    """Log-probabilities by a plain forward pass, in the shape engines give them."""

    def __init__(self, model):
        self.model = model

    async def generate(self, requests):
        return [self._complete(request) for request in requests]

    def _complete(self, request):
        ids = request.token_ids
        logprobs = torch.log_softmax(self.model(torch.tensor([ids])).logits[0].detach().double(), dim=-1)
        entries = [{ids[i]: float(logprobs[i - 1, ids[i]])} for i in range(1, len(ids))]
        sample = Sample(text="", token_ids=(0,), finish_reason="length")
        return Completion(id=request.id, samples=(sample,), prompt_token_ids=ids, prompt_logprobs=(None, *entries))


def documents():
    chat = ({"role": "user", "content": "w1 w2 w3"}, {"role": "assistant", "content": "w4 w5"})
    longer = ({"role": "user", "content": "w9"}, {"role": "assistant", "content": "w6 w7 w8 w1 w1 w2"})
    return [
        Record(source="s", position=0, messages=chat),
        Record(source="s", position=1, messages=longer),
        Record(source="s", position=2, text="w3 w1 w4 w1 w5"),
    ]


def scored(record):
    return Item(key=record.key, reference="", category="c", document=record)


def test_perplexity_is_that_of_a_forward_pass(renderer, model):
    benchmark = Perplexity(PerplexityBenchmark(source=FileSource(path="x")), "ppl")
    answers = asked(benchmark, ForwardClient(model), [scored(d) for d in documents()], render=lambda ref: renderer)
    losses, counts = [], []
    for document, span in zip(documents(), (3, 7, 6), strict=True):  # answers with their end token; texts but for bos
        ids = torch.tensor([renderer.record_ids(document).input_ids])
        labels = ids.clone()
        labels[0, : ids.shape[1] - span] = -100
        with torch.no_grad():
            losses.append(float(model(ids, labels=labels).loss) * span)
        counts.append(span)
    assert [len(a.reply.logprobs) for a in answers] == counts
    sums = torch.tensor([a.grade.sums["perplexity"] for a in answers], dtype=torch.float64).sum(0).numpy()
    assert float(benchmark.metrics[0].value(sums)) == pytest.approx(math.exp(sum(losses) / sum(counts)), rel=1e-5)


def test_a_uniform_model_has_the_vocabulary_as_perplexity(renderer):
    class Uniform(ForwardClient):
        def __init__(self):
            super().__init__(lambda ids: type("Out", (), {"logits": torch.zeros(1, ids.shape[1], 25)}))

    benchmark = Perplexity(PerplexityBenchmark(source=FileSource(path="x")), "ppl")
    answers = asked(benchmark, Uniform(), [scored(d) for d in documents()], render=lambda ref: renderer)
    assert [a.grade.score for a in answers] == pytest.approx([25.0] * 3)


def test_a_row_that_cannot_be_rendered_fails_with_its_reason_and_asks_nothing(renderer, model):
    empty = Record(source="s", position=0, messages=({"role": "user", "content": "w1"},))
    benchmark = Perplexity(PerplexityBenchmark(source=FileSource(path="x")), "ppl")
    answers = asked(benchmark, ForwardClient(model), [scored(empty), scored(documents()[0])], render=lambda r: renderer)
    assert [a.cause for a in answers] == ["no_answer", None]


def test_an_engine_without_log_probabilities_is_an_error(renderer):
    class Silent(ForwardClient):
        def _complete(self, request):
            return Completion(id=request.id, samples=(Sample(text="", token_ids=(), finish_reason="stop"),))

    benchmark = Perplexity(PerplexityBenchmark(source=FileSource(path="x")), "ppl")
    with pytest.raises(EvalError, match="log-probability"):
        asked(benchmark, Silent(None), [scored(documents()[0])], render=lambda ref: renderer)
