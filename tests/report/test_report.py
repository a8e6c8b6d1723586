"""The report of a finished run: self-contained, and every figure the artifacts' own."""

import csv
import html
import io
import json
import re

import pytest

from itune_ray.config.report import ReportJob
from itune_ray.data.artifact import RunStore, open_artifact
from itune_ray.errors import ConfigError, DataError
from itune_ray.evaluate.answers import ANSWERS_SCHEMA
from itune_ray.observe.progress import Progress
from itune_ray.report import format as shown
from itune_ray.report.collect import collect
from itune_ray.report.compare import chosen_models, chosen_samples, compare, headline, verdict
from itune_ray.report.run import command_line
from itune_ray.report.run import run as run_report
from itune_ray.report.summary import write_summary


def make(run, **config):
    """The report of a run: its artifact, and the run's folder."""
    job = ReportJob(name="quickstart", inputs=tuple(run.paths), **config)
    with Progress(quiet=True) as progress:
        artifact = run_report(job, run.store, "report", None, progress)
    return artifact, run.store.folder


def page_of(folder):
    return folder.read_bytes("report.html").decode()


def text_of(page):
    """What a reader sees: no markup, no drawings, single spaces."""
    bare = re.sub(r"<(style|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", bare)).split())


def test_the_page_is_self_contained(run):
    _, folder = make(run)
    page = page_of(folder)
    assert not re.findall(r"""(?:src|href|action|data)\s*=\s*["'](?!#)[^"']*""", page)
    assert not re.findall(r"url\((?!#)", page)
    assert "@import" not in page
    assert "<script" not in page
    assert "http" not in page


def test_replies_cannot_become_markup(run):
    page = page_of(make(run)[1])
    assert "<b>?</b>" not in page
    assert "&lt;b&gt;?&lt;/b&gt;" in page


def test_the_figures_of_the_page_are_the_artifacts(run):
    text = text_of(page_of(make(run)[1]))
    base, sft = (open_artifact(run.paths[i]).folder.read_json("scores.json") for i in (0, 4))
    for scores in (base["base"], base["teacher"], sft["sft"]):
        for score in scores.values():
            assert f"{100 * score['value']:.1f} % {100 * score['low']:.1f} – {100 * score['high']:.1f}" in text
    for stage, reason, number in (("curate", "near_duplicate", 402), ("distill", "failed: timeout", 3)):
        assert f"{reason} {number}" in text, stage
    assert "143,872 of 908,416" in text
    assert "distilled 2,986 2,273 1 0.9372 0.9428 2,273" in text
    assert "0.812" in text
    assert "q_proj 4 128 × 128 16 0.25" in text
    assert "2 min 37 s" in text  # 18.4 + 21.7 + 6.2 + 96.0 + 14.9 s


def test_every_drawing_has_its_own_ids(run):
    page = page_of(make(run)[1])
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:url\(|href=")#([^")]+)', page):
        assert target in ids


def test_drawings_take_all_their_colours_from_the_page(run):
    for drawing in re.findall(r"<svg.*?</svg>", page_of(make(run)[1]), flags=re.DOTALL):
        assert not re.findall(r"#[0-9a-f]{6}", drawing)
        assert "var(--" in drawing


def test_the_summary_has_exactly_its_four_parts(run):
    _, folder = make(run)
    summary = folder.read_json("summary.json")
    assert set(summary) == {"scores", "funnel", "stages", "artifacts"}
    scores = open_artifact(run.paths[4]).folder.read_json("scores.json")
    assert summary["scores"]["sft"]["exact match"] == {
        key: scores["sft"]["exact match"][key] for key in ("value", "low", "high", "n")
    }
    assert list(summary["scores"]) == ["base", "teacher", "sft"]
    funnel = summary["funnel"]["curate"]
    assert funnel["in"] == funnel["accepted"] + sum(funnel["rejected"].values()) + sum(funnel["failed"].values())
    assert summary["stages"]["distill"] == {
        "job": "generate",
        "seconds": pytest.approx(21.7, abs=0.5),
        "rows": 3000,
        "tokens": 91_020,
        "status": "run",
    }
    assert summary["artifacts"]["sft"] == run.paths[3]


def test_a_summary_needs_no_report_and_says_what_was_skipped(run):
    artifacts = [open_artifact(path) for path in run.paths[:3]]
    write_summary(artifacts, run.store, {"distill"})
    summary = run.store.folder.read_json("summary.json")
    assert {name: stage["status"] for name, stage in summary["stages"].items()} == {
        "score-base": "run",
        "distill": "skipped",
        "curate": "run",
    }


def test_an_unfinished_stage_is_left_out_of_the_summary_and_refused_by_the_report(run):
    unfinished = open_artifact(run.paths[2])
    unfinished.folder.write_json("manifest.json", {**unfinished.manifest, "status": "running"})
    write_summary([unfinished], run.store, ())
    assert run.store.folder.read_json("summary.json")["stages"] == {}
    with pytest.raises(DataError, match="finished"):
        make(run)


def test_tables_hold_every_score_and_count(run):
    artifact, _ = make(run)
    rows = list(csv.DictReader(io.StringIO(artifact.folder.read_bytes("tables.csv").decode())))
    scores = open_artifact(run.paths[4]).folder.read_json("scores.json")["sft"]["exact match"]
    mine = [r for r in rows if r["model"] == "sft" and r["benchmark"] == "exact match"]
    (total,) = (r for r in mine if r["table"] == "scores" and r["name"] == "exact_match")
    assert float(total["value"]) == scores["value"]
    families = {r["slice"]: float(r["value"]) for r in mine if r["table"] == "categories"}
    assert families == {name: part["value"] for name, part in scores["categories"].items()}
    rejected = {r["slice"]: int(r["value"]) for r in rows if r["stage"] == "curate" and r["name"] == "rejected"}
    assert rejected == open_artifact(run.paths[2]).manifest["funnel"]["rejected"]
    losses = [float(r["value"]) for r in rows if r["table"] == "training" and r["name"] == "loss"]
    assert len(losses) == 452


def test_asked_twice_the_report_is_not_made_again_but_found_again(run):
    first, folder = make(run)
    page = page_of(folder)
    folder.delete("report.html")
    again = RunStore(folder.uri.rsplit("/", 1)[0], "quickstart")
    run.store = again
    second, _ = make(run)
    assert second.path() == first.path()
    assert page_of(folder) == page
    assert {stage["status"] for stage in folder.read_json("summary.json")["stages"].values()} == {"run", "skipped"}


def comparison_of(run):
    collected = collect([open_artifact(path) for path in run.paths], ())
    return collected, headline(compare(collected, "base", "sft", seed=0))


def test_before_and_after_are_the_first_and_last_model_or_those_named(run):
    collected, _ = comparison_of(run)
    assert chosen_models(collected, ReportJob(name="x", inputs=("y",))) == ("base", "sft")
    assert chosen_models(collected, ReportJob(name="x", inputs=("y",), after="teacher")) == ("base", "teacher")
    with pytest.raises(ConfigError, match="did you mean 'teacher'"):
        chosen_models(collected, ReportJob(name="x", inputs=("y",), after="teecher"))


def test_transitions_are_counted_on_common_items(run):
    _, main = comparison_of(run)
    tables = [open_artifact(run.paths[i]).folder.read_table("answers.parquet").to_pylist() for i in (0, 4)]
    old = {r["item"]: r["ok"] for r in tables[0] if (r["model"], r["benchmark"]) == ("base", "exact match")}
    new = {r["item"]: r["ok"] for r in tables[1] if r["benchmark"] == "exact match"}
    mended = sum(bool(new[key]) and not old[key] for key in new)
    assert main.transitions["wrong → right"] == mended > 100
    assert sum(main.transitions.values()) == 600
    assert main.difference.value == pytest.approx(main.score["value"] - main.earlier["value"])


def test_samples_show_regressions_and_every_kind_and_respect_the_limit(run):
    _, main = comparison_of(run)
    assert main.transitions["right → wrong"] >= 1, "the fixture must hold a regression"
    samples = chosen_samples(main, 12, seed=0)
    kinds = [kind for kind, _, _ in samples]
    assert len(samples) == 12
    assert set(kinds) == {kind for kind, number in main.transitions.items() if number}
    mended = [new["category"] for kind, _, new in samples if kind == "wrong → right"]
    assert len(set(mended)) == len(mended)
    assert samples == chosen_samples(main, 12, seed=0) != chosen_samples(main, 12, seed=1)


def test_the_verdict_claims_no_more_than_the_interval(run):
    collected, main = comparison_of(run)
    claim, evidence = verdict(collected, main)
    assert claim.startswith("sft rises from")
    assert "600 items" in evidence
    same = headline(compare(collected, "sft", "sft", seed=0))
    assert verdict(collected, same)[0].startswith("No reliable difference")
    fallen = headline(compare(collected, "sft", "base", seed=0))
    assert "falls" in verdict(collected, fallen)[0]


def test_a_run_without_scores_still_has_a_report(run):
    run.paths = run.paths[1:4]
    artifact, folder = make(run)
    text = text_of(page_of(folder))
    assert "3 stages finished" in text
    assert "near_duplicate 402" in text
    assert artifact.folder.read_json("summary.json")["scores"] == {}


def test_a_model_scored_twice_keeps_both_scores(run):
    collected = collect([open_artifact(run.paths[4]), open_artifact(run.paths[4])], ())
    assert list(collected.scores) == ["sft", "sft (score-sft)"]


def test_failed_items_are_shown(run):
    text = text_of(page_of(make(run)[1]))
    assert "n 600 · 1 failed" in text
    assert "failed: prompt_too_long 2" in text


def test_the_answers_fixture_has_the_stages_own_columns(run):
    table = open_artifact(run.paths[0]).folder.read_table("answers.parquet")
    assert table.schema.equals(ANSWERS_SCHEMA)
    assert json.loads(table["sums"][0].as_py()) == {"exact_match": [0.0, 1.0]}


def test_command_lines_are_shown_as_typed():
    assert command_line(["/usr/bin/itune", "pipeline", "a b.yaml"]) == "itune pipeline 'a b.yaml'"
    assert command_line(["/x/itune_ray/__main__.py", "train", "f.yaml"]) == "itune train f.yaml"
    assert "Python" in command_line(["/usr/bin/pytest", "tests"])


def test_figures_as_people_read_them():
    assert shown.score(0.8533, "share") == "85.3 %"
    assert shown.score(37.9918, "points") == "37.99"
    assert shown.score(None, "share") == shown.MISSING
    assert shown.interval(0.1, 0.256, "share") == "10.0 – 25.6"
    assert shown.points(-0.041, "share") == "−4.1"
    assert shown.duration(157) == "2 min 37 s"
    assert shown.duration(7800) == "2 h 10 min"
    assert shown.duration(59.97) == "1 min 00 s"
    assert shown.count(8_030_261_248) == "8.03 B"
    assert shown.share(1, 3000) == "< 0.1 %"
    assert shown.p_value(1e-9) == "p < 0.0001"
