"""Real vLLM on CPU: the engine contract, parity with Hugging Face, adapters coming and going, a quiet idle engine."""

import asyncio
import json
import re
import resource
import shutil
import time
from dataclasses import replace

import pytest
from engine_contract import GREEDY, SAMPLED, Contract, chat, on_loop
from tiny_model import TEMPLATE, lora_folder, model_folder

from itune_ray.config.shared import ModelRef, VllmEngineConfig
from itune_ray.engine.base import EngineDiedError, Request
from itune_ray.engine.llm import EngineLlm
from itune_ray.engine.vllm import LORA_SLOTS_SPARE, VllmEngine, check_head_dim, engine_args
from itune_ray.errors import ModelError

FLOAT32 = {"dtype": "float32", "chat_template": TEMPLATE}


def test_cpu_arguments_avoid_the_measured_traps():
    config = VllmEngineConfig(max_adapters=3, max_adapter_rank=12, kv_cache_gb=0.5)
    args = engine_args(config, ModelRef(path="m"), "/m", "/m", on_cpu=True)
    assert args["enable_chunked_prefill"] is False, "a seed and a chunked prefill kill the engine"
    assert args["max_loras"] == args["max_cpu_loras"] == 3 + LORA_SLOTS_SPARE == 4, "else base rows get an adapter"
    assert (args["max_lora_rank"], args["kv_cache_memory_bytes"], args["enforce_eager"]) == (16, 2**29, True)


def test_gpu_arguments():
    config = VllmEngineConfig(tensor_parallel=2, pipeline_parallel=2, extra={"quantization": "fp8"})
    args = engine_args(config, ModelRef(path="m", dtype="bfloat16"), "/m", "/t", on_cpu=False)
    assert (args["tensor_parallel_size"], args["pipeline_parallel_size"]) == (2, 2)
    assert (args["distributed_executor_backend"], args["quantization"], args["enforce_eager"]) == ("ray", "fp8", False)
    assert (args["model"], args["tokenizer"], args["dtype"]) == ("/m", "/t", "bfloat16")
    assert "enable_chunked_prefill" not in args
    assert "enable_lora" not in args


def test_a_head_size_that_dies_at_the_first_request_is_refused_before(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "num_attention_heads": 8}')
    with pytest.raises(ModelError, match="no head_dim 8"):
        check_head_dim(str(tmp_path), "tiny")
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "num_attention_heads": 8, "head_dim": 32}')
    check_head_dim(str(tmp_path), "tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return [str(lora_folder(folder, root / str(seed), seed)) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def engine(folder):
    """Room for two adapters."""
    config = VllmEngineConfig(max_adapters=2, max_adapter_rank=8, kv_cache_gb=0.25)
    built = VllmEngine(config, ModelRef(path=str(folder), **FLOAT32))
    yield built
    built.close()


@pytest.mark.real
class TestVllmContract(Contract):
    """The contract, with vLLM."""

    @pytest.fixture(autouse=True)
    def _engine(self, engine, loop, adapters):
        self._ask = lambda requests: on_loop(loop, engine.generate(requests))
        self._adapters = adapters

    def ask(self, requests):
        """Through the one engine of the module."""
        return self._ask(requests)

    def adapters(self):
        """Two real ones."""
        return self._adapters[:2]


@pytest.fixture(scope="module")
def hf(folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def greedy_by_hf(model, ids: list[int], count: int) -> list[int]:
    """Greedy continuation, one forward per token."""
    import torch

    stops = model.generation_config.eos_token_id
    stops = {stops} if isinstance(stops, int) else set(stops or ())
    made: list[int] = []
    with torch.no_grad():
        while len(made) < count and not (made and made[-1] in stops):
            made.append(int(model(torch.tensor([[*ids, *made]])).logits[0, -1].argmax()))
    return made


@pytest.mark.real
def test_structured_answers_have_their_structure(engine, loop):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "boolean"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    shape = replace(GREEDY, max_tokens=48)
    asked = [
        chat("Say whether.", replace(shape, json_schema=json.dumps(schema))),
        chat("Give a code.", replace(shape, regex="[a-c]{3}-[0-9]{2}")),
    ]
    as_json, code = (c.samples[0].text for c in on_loop(loop, engine.generate(asked)))
    assert list(json.loads(as_json)) == ["n"]
    assert re.fullmatch("[a-c]{3}-[0-9]{2}", code)


@pytest.mark.real
def test_a_text_is_continued_without_a_template(engine, loop):
    llm = EngineLlm(engine, model="m", sampling=GREEDY)

    async def both():
        text = await llm.complete("Once upon", key="a")
        return text, await llm.complete(text.prompt_token_ids, key="b")

    by_text, by_tokens = on_loop(loop, both())
    assert by_text.samples[0].text == by_tokens.samples[0].text != ""


@pytest.mark.real
def test_greedy_equals_hugging_face_token_for_token(engine, loop, hf):
    model, tokenizer = hf
    prompts = ["Once upon a time", "Lily and Ben went", "The dog was", "One day, a"]
    requests = [Request(id=p, text=p, sampling=replace(GREEDY, max_tokens=32)) for p in prompts]
    for prompt, completion in zip(prompts, on_loop(loop, engine.generate(requests)), strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        assert list(completion.prompt_token_ids) == ids
        assert list(completion.samples[0].token_ids) == greedy_by_hf(model, ids, 32)


@pytest.mark.real
def test_prompt_logprobs_equal_hugging_face(engine, loop, hf):
    import torch

    model, _ = hf
    ids = (1, *range(40, 90, 3))
    request = Request(id="x", token_ids=ids, sampling=replace(GREEDY, max_tokens=1, prompt_logprobs=0))
    (completion,) = on_loop(loop, engine.generate([request]))
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    for position in range(1, len(ids)):
        ours = completion.prompt_logprobs[position][ids[position]]
        assert ours == pytest.approx(float(expected[position - 1, ids[position]]), abs=1e-4)


@pytest.mark.real
@pytest.mark.parametrize("asked", [{"logprobs": 5}, {"logprob_token_ids": (40, 43, 86)}], ids=["top", "named"])
def test_logprobs_are_those_at_temperature_one_however_hot_the_sampling(engine, loop, hf, asked):
    import torch

    model, _ = hf
    ids, heats = (1, *range(40, 90, 3)), (0.5, 2.0)
    sampling = replace(SAMPLED, n=1, prompt_logprobs=0, **asked)
    requests = [Request(id=f"{t}", token_ids=ids, sampling=replace(sampling, temperature=t)) for t in heats]
    for temperature, completion in zip(heats, on_loop(loop, engine.generate(requests)), strict=True):
        (sample,) = completion.samples
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *sample.token_ids]])).logits[0].float()
        assert all(token in e and len(e) > 1 for token, e in zip(sample.token_ids, sample.logprobs, strict=True))
        entries = [*completion.prompt_logprobs[1:], *sample.logprobs]
        found = [(place, token, value) for place, entry in enumerate(entries) for token, value in entry.items()]
        places, tokens, values = map(list, zip(*found, strict=True))
        raw, heated = (torch.log_softmax(logits / t, -1)[places, tokens].tolist() for t in (1.0, temperature))
        assert values == pytest.approx(raw, abs=1e-4)
        assert values != pytest.approx(heated, abs=0.1)


@pytest.mark.real
@pytest.mark.parametrize("trained_tokens", [(), (261, 269, 286, 403, 262)], ids=["matrices", "and token rows"])
def test_adapters_equal_hugging_face_with_peft(engine, loop, hf, folder, tmp_path, trained_tokens):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, tokenizer = hf
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trained_tokens = tuple(i for i in trained_tokens if i < base.config.vocab_size)
    adapter = str(lora_folder(folder, tmp_path / "adapter", 5, trained_tokens))
    tuned = PeftModel.from_pretrained(base, adapter).eval()
    sampling = replace(GREEDY, logprobs=0, prompt_logprobs=0)
    plain, adapted = on_loop(
        loop,
        engine.generate([Request(id=f"{a}", text="The cat", sampling=sampling, adapter=a) for a in (None, adapter)]),
    )
    ids = [tokenizer.bos_token_id, *tokenizer("The cat", add_special_tokens=False)["input_ids"]]
    made = list(adapted.samples[0].token_ids)
    assert made == greedy_by_hf(tuned, ids, 24)
    assert plain.samples[0].token_ids[: len(made)] == tuple(greedy_by_hf(hf[0], ids, 24))
    with torch.no_grad():
        expected = torch.log_softmax(tuned(torch.tensor([[*ids, *made]])).logits[0].float(), -1)
    entries = (*adapted.prompt_logprobs[1:], *adapted.samples[0].logprobs)
    ours = [entry[token] for token, entry in zip([*ids[1:], *made], entries, strict=True)]
    theirs = [float(expected[i, token]) for i, token in enumerate([*ids[1:], *made])]
    assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.real
def test_three_adapters_take_turns_in_two_slots_and_the_base_stays_the_base(engine, loop, adapters):
    alone = {who: on_loop(loop, engine.generate([chat("Tom", GREEDY, adapter=who)]))[0] for who in (None, *adapters)}
    assert len({c.samples[0].text for c in alone.values()}) == 4
    crowd = [chat("Tom", GREEDY, adapter=who) for _ in range(6) for who in (None, *adapters)]
    assert on_loop(loop, engine.generate(crowd)) == [alone[request.adapter] for request in crowd]


@pytest.mark.real
def test_a_broken_adapter_fails_its_requests_only(engine, loop, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    bad, good = on_loop(loop, engine.generate([chat("Tom", GREEDY, adapter=str(tmp_path)), chat("Tom", GREEDY)]))
    assert "vLLM cannot load the adapter" in bad.error
    assert not bad.retryable
    assert good.error is None


@pytest.mark.real
def test_what_vllm_refuses_fails_alone(engine, loop):
    bad, good = on_loop(loop, engine.generate([chat("Tom", replace(GREEDY, logprobs=99)), chat("Tom", GREEDY)]))
    assert bad.error.startswith("invalid_request: ")
    assert not bad.retryable
    assert good.error is None


@pytest.mark.real
def test_a_cancelled_request_leaves_the_engine(engine, loop):
    async def cancel():
        task = asyncio.ensure_future(engine.generate([chat("Tom", replace(SAMPLED, max_tokens=400, n=8))]))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for _ in range(200):
            if engine.status().startswith("0 requests"):
                return True
            await asyncio.sleep(0.02)
        return False

    assert on_loop(loop, cancel())


@pytest.mark.real
def test_an_idle_engine_takes_no_cpu(engine, loop):
    on_loop(loop, engine.generate([chat("Tom", GREEDY)]))
    before = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(2.0)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime) < 0.2


@pytest.mark.real
@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"architectures": ["NoSuchModel"], "model_type": "nonsense"}, {}, "vLLM cannot load the model: .*nonsense"),
        ({}, {"max_model_len": 100_000}, "vLLM cannot load the model: .*max_model_len"),
        ({}, {"extra": {"no_such_argument": 1}}, "vLLM cannot load the model: .*no_such_argument"),
    ],
)
def test_what_vllm_cannot_load_is_one_line(folder, tmp_path, change, config, message):
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ModelError, match=message) as caught:
        VllmEngine(VllmEngineConfig(**config), ModelRef(path=str(tmp_path / "model"), **FLOAT32))
    assert "\n" not in str(caught.value)


@pytest.mark.real
def test_what_the_prefix_cache_gave_is_counted(engine, loop):
    long = Request(id="a", sampling=replace(GREEDY, max_tokens=1), text="one two three four five six " * 20)
    first, again = (on_loop(loop, engine.generate([replace(long, id=name)]))[0] for name in ("a", "b"))
    assert first.error is None
    assert first.num_cached_tokens == 0
    assert 0 < again.num_cached_tokens < len(again.prompt_token_ids)
    assert again.samples == first.samples


@pytest.mark.real
def test_a_dead_engine_tells_all_its_callers_why(engine, loop, monkeypatch):
    stepper = engine._backend._stepper

    def fail():
        raise RuntimeError("out of memory\nin the middle")

    monkeypatch.setattr(stepper._engine, "step", fail)
    for _ in range(2):
        with pytest.raises(EngineDiedError, match="RuntimeError: out of memory in the middle"):
            on_loop(loop, engine.generate([chat("a"), chat("b")]))
