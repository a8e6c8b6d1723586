"""The http engine against a real server: what is sent, what is tried again, and what is never taken for an answer."""

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from engine_contract import chat
from pydantic import TypeAdapter, ValidationError

from itune_ray.config.generate import GenerateJob
from itune_ray.config.shared import HttpEngineConfig, ModelRef, ServedModel
from itune_ray.engine.base import UNKNOWN_TOKEN, Request, Sampling
from itune_ray.engine.http import HttpEngine
from itune_ray.errors import ModelError
from itune_ray.pipeline.output import receivers

KEY = "sk-very-secret"


class Endpoint:
    """Answers `reply N` with the words of `N`'s last turn; `plan` gives statuses for the first requests instead."""

    def __init__(self):
        self.plan: list[int] = []
        self.finish = "stop"
        self.bodies: list[dict] = []
        self.keys: set[str] = set()
        self.times: list[float] = []
        self.delay = 0.0
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, answer = endpoint.answer(body, self.headers["Authorization"], self.path)
                payload = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                if status == 429:
                    self.send_header("Retry-After", "0.2")
                self.end_headers()
                self.wfile.write(payload)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def answer(self, body, key, path):
        with self.lock:
            self.bodies.append(body)
            self.keys.add(key)
            self.times.append(time.monotonic())
            status = self.plan.pop(0) if self.plan else 200
        time.sleep(self.delay)
        if status != 200:
            return status, {"error": {"message": f"no: {status}", "type": "x", "code": None}}
        if path.endswith("/embeddings"):
            vectors = [
                {"object": "embedding", "index": i, "embedding": [float(len(t))]} for i, t in enumerate(body["input"])
            ]
            return 200, {
                "object": "list",
                "data": vectors[::-1],
                "model": "m",
                "usage": {"prompt_tokens": 1, "total_tokens": 1},
            }
        words = body["messages"][-1]["content"]
        choices = [
            {"index": i, "message": {"role": "assistant", "content": f"{words} {i}"}, "finish_reason": self.finish}
            for i in range(body["n"])
        ]
        usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
        return 200, {
            "id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": choices, "usage": usage
        }  # fmt: skip


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    served = Endpoint()
    yield served
    served.server.shutdown()


def ask(endpoint: Endpoint, *requests: Request, **config):
    settings = HttpEngineConfig(url=endpoint.url, **{"api_key_env": "TEACHER_KEY", **config})
    engine = HttpEngine(settings, ModelRef(path="big-one"))
    return asyncio.run(engine.generate(requests))


def test_a_chat_is_sent_with_its_sampling_and_answered(endpoint):
    sampling = Sampling(temperature=0.5, top_p=0.9, top_k=5, max_tokens=9, n=2, seed=2**40 + 3, stop=("END",))
    (completion,) = ask(endpoint, chat("hello", sampling), extra={"user": "me"})
    (body,) = endpoint.bodies
    assert body == {
        "model": "big-one", "messages": [{"role": "user", "content": "hello"}], "temperature": 0.5, "top_p": 0.9,
        "max_tokens": 9, "n": 2, "seed": 3, "stop": ["END"], "top_k": 5, "user": "me",
    }  # fmt: skip
    assert endpoint.keys == {f"Bearer {KEY}"}
    assert [s.text for s in completion.samples] == ["hello 0", "hello 1"]
    assert [len(s.token_ids) for s in completion.samples] == [3, 2]
    assert completion.prompt_token_ids == (UNKNOWN_TOKEN,) * 7


def test_structure_is_asked_for(endpoint):
    schema = {"type": "object"}
    ask(endpoint, chat("a", Sampling(json_schema=json.dumps(schema))), chat("b", Sampling(choice=("x", "y"))))
    bodies = {body["messages"][0]["content"]: body for body in endpoint.bodies}
    assert bodies["a"]["response_format"]["json_schema"]["schema"] == schema
    assert bodies["b"]["structured_outputs"] == {"choice": ["x", "y"]}


def test_busy_and_broken_answers_are_asked_again(endpoint):
    endpoint.plan = [429, 500, 503]
    (completion,) = ask(endpoint, chat("hello"))
    assert completion.error is None
    assert len(endpoint.bodies) == 4
    assert endpoint.times[1] - endpoint.times[0] >= 0.2  # as long as it asked for


@pytest.mark.parametrize(("status", "retryable"), [(400, False), (422, False), (429, True), (500, True)])
def test_a_status_is_an_error_and_never_an_answer(endpoint, status, retryable):
    endpoint.plan = [status] * 2
    failed, fine = ask(endpoint, chat("one"), chat("two"), max_retries=0)[:2]
    endpoint.plan = []
    for completion in (failed, fine):
        assert (completion.samples, completion.retryable) == ((), retryable)
        assert completion.error.startswith(f"http_{status}: ")


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_ends_the_job_and_is_not_shown(endpoint, status):
    endpoint.plan = [status]
    with pytest.raises(ModelError, match=f"status {status}") as error:
        ask(endpoint, chat("hello"))
    assert KEY not in str(error.value)
    assert "engine.api_key_env" in str(error.value)


def test_a_missing_key_is_told_by_the_name_of_its_variable(endpoint):
    with pytest.raises(ModelError, match=r"\$NO_SUCH_KEY"):
        ask(endpoint, chat("hello"), api_key_env="NO_SUCH_KEY")


def test_what_a_filter_ended_is_no_answer(endpoint):
    endpoint.finish = "content_filter"
    (completion,) = ask(endpoint, chat("hello"))
    assert (completion.error.split(":")[0], completion.retryable) == ("content_filter", False)


def test_a_cut_answer_says_so(endpoint):
    endpoint.finish = "length"
    (completion,) = ask(endpoint, chat("hello"))
    assert {s.finish_reason for s in completion.samples} == {"length"}


def test_no_answer_in_time_may_be_asked_again(endpoint):
    endpoint.delay = 1.0
    (completion,) = ask(endpoint, chat("hello"), timeout_s=0.2, max_retries=0)
    assert completion.retryable
    assert completion.error.startswith(f"no answer from {endpoint.url}; ")


def test_requests_keep_their_rate(endpoint):
    began = time.monotonic()
    ask(endpoint, *(chat(f"q {i}") for i in range(30)), requests_per_minute=600)
    for second in (1, 2):  # ten a second, and a second's worth at once
        assert sum(t - began < second for t in endpoint.times) <= 10 * (second + 1) + 1
    assert endpoint.times[-1] - began >= 1.9


def test_tokens_keep_their_rate_by_what_was_used(endpoint):
    """Each is guessed at 100 tokens and takes 12: of 120 a second, 20 take 1 s after a second's worth, not 16 s."""
    settings = HttpEngineConfig(url=endpoint.url, api_key_env=None, tokens_per_minute=7200)
    engine = HttpEngine(settings, ModelRef(path="m"))

    async def one_by_one():
        for i in range(20):
            await engine.generate([chat(f"q {i}", Sampling(max_tokens=100))])

    began = time.monotonic()
    asyncio.run(one_by_one())
    assert 0.9 < time.monotonic() - began < 8


def test_what_an_endpoint_cannot_do_is_refused(endpoint):
    asked = [
        chat("a", Sampling(prompt_logprobs=1)),
        chat("b", Sampling(logprobs=1)),
        Request(id="c", sampling=Sampling(), text="go on"),
        chat("d", adapter="/some/adapter"),
    ]
    completions = ask(endpoint, *asked)
    assert all(c.error.startswith("unsupported: ") and not c.retryable for c in completions)
    assert endpoint.bodies == []


def test_embeddings_come_in_order(endpoint):
    settings = HttpEngineConfig(url=endpoint.url, api_key_env=None)
    engine = HttpEngine(settings, ModelRef(path="m"))
    assert asyncio.run(engine.embed(["a", "bbb"])) == [[1.0], [3.0]]


@pytest.mark.parametrize("url", ["api.openai.com/v1", "ftp://host/v1", "https://me:key@host/v1"])
def test_an_address_without_scheme_or_with_a_password_is_refused(url):
    with pytest.raises(ValidationError, match="url must"):
        HttpEngineConfig(url=url)


def test_one_client_keeps_the_limits():
    tree = {"model": {"path": "m"}, "engine": {"type": "http", "url": "https://a.b/v1"}, "pool": {"replicas": 2}}
    with pytest.raises(ValidationError, match=r"pool\.replicas must be 1"):
        TypeAdapter(ServedModel).validate_python(tree)


def test_the_host_that_gets_the_rows_is_named():
    teacher = {"model": {"path": "m"}, "engine": {"type": "http", "url": "https://api.example.org/v1"}}
    prompts = [{"type": "playground", "split": "prompts", "rows": 1}]
    job = GenerateJob(name="a", prompts=prompts, teacher=teacher)
    assert receivers(job) == ["rows go to api.example.org (an http engine)"]
