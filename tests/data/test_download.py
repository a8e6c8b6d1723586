"""Downloads by the real client from a Hub on this machine, each in a process of its own, as on a node."""

import json
import os
import subprocess
import sys

import pytest
import tiny
from hubs import COMMIT, hub

RESOLVE = """
import json, sys
from itune_ray.data.hub import resolve
from itune_ray.errors import ITuneError
try:
    found = resolve(sys.argv[1], revision=sys.argv[2] if len(sys.argv) > 2 else None)
    print(json.dumps({"path": found.path, "revision": found.revision}))
except ITuneError as error:
    print(json.dumps({"error": str(error)}))
"""
MANIFEST = """
import sys
import tiny
from itune_ray.data.artifact import RunStore
from itune_ray.train.run import version
job = tiny.job("org/model")
print(RunStore(sys.argv[1], "pinned").artifact("sft", "train", job, version(job)).path("manifest.json"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def server(folder):
    with hub() as started:
        started.repos["org/model"] = folder
        yield started


@pytest.fixture
def node(server, tmp_path):
    """The environment of a node that knows this Hub and has nothing yet."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    caches = {"HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return {**kept, **caches, "HF_ENDPOINT": server.endpoint, "PYTHONPATH": os.path.dirname(tiny.__file__)}


def start(node, *arguments, script=RESOLVE):
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, env=node, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def resolved(node, *arguments):
    """What `resolve` says on that node."""
    process = start(node, *arguments)
    told, wrong = process.communicate(timeout=120)
    assert process.returncode == 0, wrong
    return json.loads(told.splitlines()[-1])


def test_three_processes_of_a_node_download_once(server, node, folder):
    """And what they get is the commit that the branch means now, whatever it is called."""
    processes = [start(node, "org/model") for _ in range(3)]
    found = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in processes]
    assert {answer["revision"] for answer in found} == {COMMIT}
    assert len({answer["path"] for answer in found}) == 1
    assert server.downloads["org/model/model.safetensors"] == 1
    offline = resolved({**node, "HF_HUB_OFFLINE": "1"}, "org/model")
    assert offline == found[0]
    assert server.downloads["org/model/model.safetensors"] == 1


def test_a_hub_that_is_gone_leaves_what_the_node_has(server, node):
    first = resolved(node, "org/model")
    assert resolved({**node, "HF_ENDPOINT": "http://127.0.0.1:9"}, "org/model") == first


def test_the_commit_is_in_the_manifest(node, tmp_path):
    process = start(node, str(tmp_path / "runs"), script=MANIFEST)
    told, wrong = process.communicate(timeout=120)
    assert process.returncode == 0, wrong
    with open(told.splitlines()[-1]) as file:
        assert COMMIT in json.dumps(json.load(file))


def test_a_gated_model_without_a_token_names_the_variable_and_the_page(server, node):
    server.gated["org/model"] = "hf_right"
    error = resolved(node, "org/model")["error"]
    assert "the model cannot be had: it is gated: accept its licence at" in error
    assert f"{server.endpoint}/org/model and give your token" in error
    assert "set by `HF_TOKEN`" in error


def test_a_token_whose_account_has_not_accepted_says_so(server, node):
    server.gated["org/model"] = "hf_right"
    error = resolved({**node, "HF_TOKEN": "hf_wrong"}, "org/model")["error"]
    assert f"its licence must be accepted at {server.endpoint}/org/model with the account of the token" in error
    assert "hf_wrong" not in error


def test_the_right_token_reads_it(server, node):
    server.gated["org/model"] = "hf_right"
    assert resolved({**node, "HF_TOKEN": "hf_right"}, "org/model")["revision"] == COMMIT


def test_what_the_hub_does_not_know_is_told_apart(node):
    assert "neither a folder nor reachable on the Hub" in resolved(node, "org/other")["error"]
    error = resolved(node, "org/model", "v9")["error"]
    assert "no such revision; got 'v9'" in error


def test_a_model_larger_than_the_disk_is_refused_before_the_first_byte(server, node):
    server.claimed["model.safetensors"] = 10**16
    error = resolved(node, "org/model")["error"]
    assert "the model needs 10000000.00 GB more on this node, and the disk of" in error
    assert "set by `HF_HOME`" in error
    assert not server.downloads


def test_the_mirror_is_asked_first(server, node, folder, tmp_path):
    mirror = tmp_path / "mirror"
    (mirror / "org").mkdir(parents=True)
    (mirror / "org" / "mirrored").symlink_to(folder)
    node |= {"ITUNE_MODEL_MIRROR": f"file://{mirror}"}
    found = resolved(node, "org/mirrored")
    assert found["path"].startswith(node["XDG_CACHE_HOME"])
    assert found["revision"].startswith("mirror-")
    assert resolved(node, "org/model")["revision"] == COMMIT, "and then the Hub"
    assert "org/mirrored" not in str(server.downloads)
