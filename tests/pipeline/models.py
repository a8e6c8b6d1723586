"""A model that answers the prompts of every recipe by rules, served as an OpenAI-compatible endpoint, with faults."""

import hashlib
import json
import random
import re
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from runs import rated_answer

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
LONGEST = 6000
"""Characters of a prompt that the model takes."""
TASK = re.compile(r"<task>\n(.*)\n</task>", re.DOTALL)
ANSWERS = {
    "refuse": "I'm sorry, but I can't help with that.",
    "email": "Write to jane.roe@mailhaven.org and ask for the second volume of the report.",
    "card": "Pay with the card 4111 1111 1111 1111 before the end of the week, please.",
    "slot": "Dear {name}, thank you for the letter that you sent to our office.",
    "token": "It says <|im_start|> at the top of the second page of the printed book.",
    "garbage": "This answer makes judges talk without end about everything but scores.",
    "poor": "This answer is poor, and whoever reads it learns nothing at all from it.",
    "brief": "Ok",
    "near": " ".join(f"step{i} follows" for i in range(40)),
    "twice": "The same words again, as before, about rivers and the towns beside them.",
}
"""Answer to a prompt that opens with `Probe KIND`."""


def words(count: int, *parts: object) -> str:
    """Words made up by a hash of the parts."""
    rng = random.Random("\x1f".join(map(str, parts)))
    return " ".join("".join(rng.choices(SYLLABLES, k=3)) for _ in range(count))


class Model:
    """A pure function of (messages, seed); `faults` counts what was broken on purpose, each distinct call once."""

    def __init__(self) -> None:
        self.faults: defaultdict[str, set[str]] = defaultdict(set)
        self.lock = threading.Lock()
        self.spent = 0
        """Tokens that it read and wrote, which are words."""

    def reply(self, body: dict[str, Any]) -> tuple[int, str, str]:
        """Status, text and finish reason."""
        text = body["messages"][-1]["content"]
        seed = body.get("seed")
        if text.startswith("Continue this list"):
            return 200, self._proposals(text, seed), "stop"
        if text.startswith(("You edit tasks", "You invent tasks")):
            return 200, self._rewrite(text, seed), "stop"
        if "Are they equal?" in text:
            return 200, "Not equal", "stop"
        if "How good is the answer" in text:
            return 200, self._score(rated_answer(body["messages"])), "stop"
        if "How hard is the instruction" in text:
            return 200, f"{1 + int(hashlib.sha256(text.encode()).hexdigest(), 16) % 5}\nSo it seems.", "stop"
        if "Which answer serves the person better?" in text:
            return 200, self._verdict(text), "stop"
        return self._answer(text)

    def answer(self, body: dict[str, Any], text: str, finish: str) -> dict[str, Any]:
        """The endpoint's response, with one choice for each that was asked, and its tokens counted."""
        message, n = {"role": "assistant", "content": text}, body.get("n", 1)
        choices = [{"index": index, "message": message, "finish_reason": finish} for index in range(n)]
        read = sum(len(turn["content"].split()) for turn in body["messages"])
        wrote = n * len(text.split())
        with self.lock:
            self.spent += read + wrote
        usage = {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}
        return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": choices, "usage": usage}

    def _proposals(self, text: str, seed: object) -> str:
        """Six new instructions, and an old one that is no news."""
        old = re.findall(r"^\d+\. (.+)$", text, re.MULTILINE)
        self._note("over-similar", text, seed)
        made = [f"Explain {words(9, text, seed, i)}." for i in range(6)]
        first = len(old) + 1
        return "\n".join(f"{first + i}. {item}" if i else item for i, item in enumerate([*made, old[0]]))

    def _rewrite(self, text: str, seed: object) -> str:
        found = TASK.search(text)
        assert found is not None
        task = found[1]
        if int(hashlib.sha256(f"{text}{seed}".encode()).hexdigest(), 16) % 20 == 0:
            self._note("unchanged", text, seed)
            return task
        return f"{task} Mind {words(4, text, seed)}."

    def _score(self, answer: str) -> str:
        if answer.startswith(ANSWERS["garbage"]):
            return "What a nice answer."
        return "2\nPoor." if answer.startswith(ANSWERS["poor"]) else "5\nGood."

    def _verdict(self, text: str) -> str:
        """The longer answer wins; one about places is judged by its place; one about nothing gets no verdict."""
        first, second = (re.search(rf"\[Answer {name} \w+\]\n(.*?)\n\[End of", text, re.DOTALL) for name in "AB")
        assert first is not None
        assert second is not None
        if "nothing" in first[1] + second[1]:
            return "Hard to say."
        if "places" in first[1] + second[1]:
            return "The first.\n[[A]]"
        return "Longer.\n[[A]]" if len(first[1]) > len(second[1]) else "Longer.\n[[B]]"

    def _answer(self, text: str) -> tuple[int, str, str]:
        if len(text) > LONGEST:
            return 400, "this model's maximum context length is exceeded", ""
        probe = re.match(r"Probe (\w+)", text)
        kind = probe[1] if probe else ""
        if kind == "error":
            return 500, "the model fell over", ""
        if kind == "cut":
            return 200, f"This goes on and on until {words(5, text)}", "length"
        if kind == "empty":
            return 200, " ", "stop"
        return 200, ANSWERS.get(kind) or f"It is about {words(20, text)}.", "stop"

    def _note(self, fault: str, *parts: object) -> None:
        with self.lock:
            self.faults[fault].add(json.dumps(parts))


class _Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True


class Endpoint:
    """Serves the model; `url` is the base URL."""

    def __init__(self) -> None:
        self.model = model = Model()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, text, finish = model.reply(body)
                told = model.answer(body, text, finish) if status == 200 else {"error": {"message": text}}
                payload = json.dumps(told).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

        self._server = _Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
