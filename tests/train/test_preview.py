"""The sample of rendered rows that `itune train --dry-run` prints."""

import json
import re

import pytest
import tiny
import yaml

from itune_ray import cli

GREEN, DIM, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


@pytest.fixture(scope="module")
def job_file(tmp_path_factory):
    root = tmp_path_factory.mktemp("preview")
    tiny.tokenizer().save_pretrained(root / "model")
    rows = [
        {"messages": [{"role": "user", "content": "apple?"}, {"role": "assistant", "content": "river\nstone"}]},
        {"messages": [{"role": "user", "content": "\x1b[31mcloud?"}, {"role": "assistant", "content": "maple"}]},
        {"messages": [{"role": "user", "content": "never shown"}, {"role": "assistant", "content": "tiger"}]},
    ]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job = tiny.job(root / "model").model_dump(mode="json", exclude={"run"})
    job["data"] = [{"source": {"type": "file", "path": str(root / "rows.jsonl")}}]
    (root / "job.yaml").write_text(yaml.safe_dump(job))
    return root / "job.yaml"


def shown(capsys, job_file, *overrides) -> str:
    assert cli.main(["train", str(job_file), *overrides, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_supervised_tokens_are_told_apart_without_colour_where_nobody_looks(capsys, job_file):
    out = shown(capsys, job_file)
    assert "\x1b" not in out
    assert yaml.safe_load(out)["name"] == "tiny", "the output is still the config"
    sample = out[out.index("# sample of the rows") :].replace("\n# ", "\n")
    first = re.search(r"--- rows:0:0: (\d+) tokens, (\d+) supervised\n(.*?)\n---", sample, re.DOTALL)
    assert first is not None
    assert first[3].rstrip() == "<|im_start|>user\napple?<|im_end|>\n<|im_start|>assistant\n⟦river\nstone<|im_end|>⟧"
    assert int(first[2]) < int(first[1])
    assert "\\x1b[31mcloud?" in sample
    assert "never shown" not in sample


@pytest.mark.parametrize("no_colour", ["", "1"])
def test_a_terminal_gets_colours_unless_no_color_is_set(capsys, job_file, monkeypatch, no_colour):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", no_colour)
    out = shown(capsys, job_file)
    if no_colour:
        assert "\x1b" not in out
        return
    assert f"{GREEN}river{RESET}" in out
    assert f"{GREEN}stone<|im_end|>{RESET}" in out
    assert f"{DIM}<|im_start|>user{RESET}" in out
    assert "\x1b[31m" not in out


def test_rejected_rows_say_why(capsys, job_file):
    assert "rejected as too_long" in shown(capsys, job_file, "max_length=4")
    assert "rejected as no_pair" in shown(capsys, job_file, "objective={type: dpo}")


@pytest.mark.parametrize("override", ["data.0.source.path=/no/such/file.jsonl", "model.path=/no/such/model"])
def test_a_sample_that_cannot_be_made_says_why_and_the_config_is_printed(capsys, job_file, override):
    out = shown(capsys, job_file, override)
    assert "# no sample of the rows: " in out
    assert yaml.safe_load(out)["name"] == "tiny"
