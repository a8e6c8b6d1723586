import http.server
import json
import threading
import time

import pytest
import tiny

from itune_ray.config.shared import ModelRef
from itune_ray.data import download, hub
from itune_ray.data.hub import local_model_folder, resolve
from itune_ray.errors import ModelError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("models") / "tiny-llama")


def test_a_folder_is_itself_and_its_fingerprint_is_its_content(folder, tmp_path):
    found = local_model_folder(ModelRef(path=str(folder)))
    assert (found.path, found.revision) == (str(folder), None)
    twin = tiny.llama(tmp_path / "twin")
    assert resolve(str(twin)).fingerprint == found.fingerprint
    (twin / "config.json").write_text(json.dumps({**json.loads((twin / "config.json").read_text()), "x": 1}))
    assert resolve(str(twin)).fingerprint != found.fingerprint


def test_large_weights_are_fingerprinted_by_samples(folder, monkeypatch):
    whole = resolve(str(folder)).fingerprint
    monkeypatch.setattr(hub, "WHOLE_FILE_BYTES", 0)
    sampled = resolve(str(folder)).fingerprint
    assert sampled != whole
    assert sampled == resolve(str(folder)).fingerprint


def test_a_near_name_is_suggested(folder):
    with pytest.raises(ModelError, match=r"neither a folder nor reachable on the Hub.*did you mean 'tiny-llama'"):
        resolve(str(folder.parent / "tiny-lama"))


def test_a_folder_that_is_no_model(tmp_path, folder):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match=r"the folder is no model: it holds no config.json \(it holds notes.txt\)"):
        resolve(str(tmp_path))
    with pytest.raises(ModelError, match="is a file, not a folder"):
        resolve(str(folder / "config.json"))
    with pytest.raises(ModelError, match="no adapter"):
        resolve(str(folder), kind="adapter")


def test_an_unknown_playground_model_lists_what_there_is():
    with pytest.raises(ModelError, match="the playground ships no such model"):
        resolve("playground://nobody")


def test_offline_a_hub_id_is_one_clear_line_at_once(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    started = time.monotonic()
    with pytest.raises(ModelError, match="neither a folder nor reachable on the Hub"):
        resolve("some-org/some-model")
    assert time.monotonic() - started < 5


def test_a_hub_that_never_answers_does_not_hang(monkeypatch):
    from huggingface_hub import HfApi

    class Silent(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            time.sleep(3)

        do_HEAD = do_GET  # noqa: N815  the name http.server looks for

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(download, "HUB_TIMEOUT_S", 0.3)
    original = HfApi.__init__
    monkeypatch.setattr(HfApi, "__init__", lambda self, *a, **k: original(self, *a, **{**k, "endpoint": endpoint}))
    started = time.monotonic()
    with pytest.raises(ModelError, match="neither a folder nor reachable on the Hub"):
        resolve("some-org/some-model")
    assert time.monotonic() - started < 2.5
    server.shutdown()


def test_a_uri_is_copied_to_the_node_once_and_anew_when_it_changes(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote = tiny.llama(tmp_path / "bucket" / "model")
    # pyarrow opens file:// like any other URI; only the scheme check of ours is stepped around.
    copy = download.from_uri(f"file://{remote}")
    assert copy.is_relative_to(tmp_path / "cache")
    assert resolve(str(copy)).fingerprint == resolve(str(remote)).fingerprint
    assert download.from_uri(f"file://{remote}") == copy
    (remote / "generation_config.json").write_text("{}")
    assert download.from_uri(f"file://{remote}") != copy


def test_a_uri_without_a_model_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="cannot be read"):
        download.from_uri(f"file://{tmp_path}/nowhere")
