"""The spot agent against a local server that answers as each cloud's metadata service does."""

import contextlib
import datetime
import http.server
import json
import threading

import pytest

from itune_ray.spot import NOTICES, watch

SOON = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=2)


@contextlib.contextmanager
def metadata(answers):
    """A server: (method, path) -> (header that must be there, status, body)."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self):
            seen.append((self.command, self.path))
            header, status, body = answers.get((self.command, self.path), (None, 404, ""))
            missing = header is not None and header not in self.headers
            self.send_response(401 if missing else status)
            self.end_headers()
            self.wfile.write(b"" if missing else body.encode())

        do_GET = do_PUT = _answer  # noqa: N815  the names are those of http.server

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()


TOKEN = {("PUT", "/latest/api/token"): ("X-aws-ec2-metadata-token-ttl-seconds", 200, "t")}
ACTION = ("GET", "/latest/meta-data/spot/instance-action")
EVENTS = ("GET", "/metadata/scheduledevents?api-version=2020-07-01")
PREEMPTED = ("GET", "/computeMetadata/v1/instance/preempted")
QUIET = {
    "aws": TOKEN,
    "gcp": {PREEMPTED: ("Metadata-Flavor", 200, "FALSE")},
    "azure": {EVENTS: ("Metadata", 200, json.dumps({"Events": [{"EventType": "Reboot"}]}))},
}
NOTICE = {
    "aws": {
        **TOKEN,
        ACTION: (
            "X-aws-ec2-metadata-token",
            200,
            json.dumps({"action": "terminate", "time": SOON.strftime("%Y-%m-%dT%H:%M:%SZ")}),
        ),
    },
    "gcp": {PREEMPTED: ("Metadata-Flavor", 200, "TRUE")},
    "azure": {
        EVENTS: (
            "Metadata",
            200,
            json.dumps({"Events": [{"EventType": "Preempt", "NotBefore": SOON.strftime("%a, %d %b %Y %H:%M:%S GMT")}]}),
        )
    },
}


@pytest.mark.parametrize("cloud", NOTICES)
def test_no_notice_is_none(cloud):
    with metadata(QUIET[cloud]) as (base, _):
        assert NOTICES[cloud](base) is None


@pytest.mark.parametrize("cloud", NOTICES)
def test_a_notice_gives_the_seconds_that_are_left(cloud):
    with metadata(NOTICE[cloud]) as (base, _):
        seconds = NOTICES[cloud](base)
    assert seconds == 30 if cloud == "gcp" else 3600 < seconds <= 7200


def test_it_drains_once_and_survives_a_service_that_fails_meanwhile():
    drained, pauses = [], []
    answers = dict(QUIET["gcp"])
    with metadata(answers) as (base, seen):
        steps = iter([{PREEMPTED: (None, 500, "")}, {PREEMPTED: (None, 200, "TRUE")}])

        def pause(seconds):
            pauses.append(seconds)
            answers.update(next(steps))

        watch(lambda: NOTICES["gcp"](base), drained.append, pause)
    assert drained == [30.0]
    assert len(pauses) == 2
    assert len(seen) == 3


def test_a_drain_that_ray_refuses_is_tried_again():
    tries = []

    def drain(seconds):
        tries.append(seconds)
        if len(tries) == 1:
            raise OSError("no raylet")

    watch(lambda: 10.0, drain, lambda _: None)
    assert tries == [10.0, 10.0]
