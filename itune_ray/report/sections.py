"""What a run holds beyond scores and losses: preference tuning, invented instructions, pruning, a sweep."""

from collections.abc import Mapping, Sequence
from typing import Any

from itune_ray.data.records import row_seed
from itune_ray.errors import ConfigError, did_you_mean
from itune_ray.report import curves
from itune_ray.report import format as shown
from itune_ray.report.collect import Row, Run, Stage
from itune_ray.report.compare import Comparison, compare

Section = dict[str, Any]


def compared_pairs(run: Run, pairs: Sequence[tuple[str, str]], seed: int) -> list[Comparison]:
    """For each pair of models their common scores, with paired differences where the items are the same.

    Raises:
        ConfigError: A pair names a model that nothing scored.
    """
    found: list[Comparison] = []
    for before, after in pairs:
        for name in (before, after):
            if name not in run.scores:
                hint = did_you_mean(name, run.scores)
                raise ConfigError(
                    f"no stage scored this model{hint}", got=name, allowed=", ".join(run.scores), knob="pairs"
                )
        found += compare(run, before, after, row_seed(seed, "report.pairs", f"{before}/{after}"))
    return [comparison for comparison in found if comparison.difference is not None]


def stated(comparison: Comparison) -> Section:
    """The paired difference in words, and whether it can be told from 0."""
    c, unit, d = comparison, comparison.score["unit"], comparison.difference
    assert d is not None
    certain = not d.low <= 0 <= d.high
    return {
        "before": c.before,
        "after": c.after,
        "score": c.name,
        "values": f"{shown.score(c.earlier['value'], unit)} → {shown.score(c.score['value'], unit)}",
        "difference": shown.points(d.value, unit),
        "interval": f"{shown.points(d.low, unit)} to {shown.points(d.high, unit)}",
        "n": len(c.pairs),
        "verdict": ("rises" if d.value > 0 else "falls") if certain else "no reliable difference",
    }


def preference(stage: Stage) -> Section | None:
    """The margins of a preference tuning, over its pairs and over held-out ones."""
    margins = [entry for entry in stage.metrics if "reward_margin" in entry]
    if not margins:
        return None
    facts = [("loss at the first step (log 2 = 0.6931)", f"{margins[0]['loss']:.4f}")]
    held = [entry for entry in stage.validation if "reward_accuracy" in entry]
    if held:
        last = held[-1]
        bounds = shown.interval(last["low"], last["high"], "share")
        facts.append(
            (f"held-out pairs ranked right, n = {last['n']:,}", f"{100 * last['reward_accuracy']:.1f} % [{bounds}]")
        )
        facts.append(("held-out margin, first → last", f"{held[0]['reward_margin']:.3f} → {last['reward_margin']:.3f}"))
    return {"stage": stage, "facts": facts, "svg": curves.preference_figure(stage)}


def distillation(stage: Stage) -> list[tuple[str, str]]:
    """Divergence from the teacher, first and last, and how much of it the stored tokens hold."""
    entries = [entry for entry in stage.metrics if "teacher_mass" in entry]
    if not entries:
        return []
    first, last = entries[0], entries[-1]
    return [
        ("KL from the teacher, first → last", f"{first['kl']:.4f} → {last['kl']:.4f}"),
        ("mass of the stored tokens", f"{100 * last['teacher_mass']:.2f} %"),
    ]


def inventions(run: Run) -> list[Section]:
    """Self-instruct stages with their rounds, and what the grader of a later curate stage made of them."""
    found: list[Section] = []
    for stage in run.of_job("generate"):
        rounds: Sequence[Row] = stage.manifest.get("rounds") or ()
        if rounds:
            found.append({"stage": stage, "rounds": rounds, "facts": _graded(run, stage)})
    return found


def alignments(run: Run) -> list[Section]:
    """Reflective learning stages with the mean of their alignment matrices."""
    found = [(stage, stage.manifest.get("alignment")) for stage in run.of_job("generate")]
    return [{"stage": stage, "svg": curves.alignment_figure(facts)} for stage, facts in found if facts]


def _graded(run: Run, stage: Stage) -> list[tuple[str, str]]:
    """Share valid (the grader's inverse parser knows the instruction) and share right, where it was graded."""
    facts = [("new instructions accepted", shown.count(sum(done["accepted"] for done in stage.manifest["rounds"])))]
    for curated in run.of_job("curate"):
        sources = [part["source"].get("path", "") for part in curated.config["inputs"]]
        graded = any(f["type"] == "grader" for f in curated.config["filters"])
        if not graded or curated.funnel is None or not any(str(s).startswith(stage.path) for s in sources):
            continue
        rejected: Mapping[str, int] = curated.funnel["rejected"]
        wrong, unknown = rejected.get("wrong_answer", 0), rejected.get("ungradable", 0)
        judged = curated.funnel["accepted"] + wrong + unknown
        facts.append(("valid by the inverse parser", shown.share(judged - unknown, judged)))
        facts.append(("valid and answered right", shown.share(curated.funnel["accepted"], judged)))
    return facts


def pruning(run: Run) -> list[Section]:
    """Compress stages: parameters by part, bytes and speeds, before and after."""
    return [_pruned(stage) for stage in run.of_job("compress") if stage.compression]


def _pruned(stage: Stage) -> Section:
    facts: Row = stage.compression or {}
    before, after = facts["parameters"]["before"], facts["parameters"]["after"]
    rows = [
        {"part": part, "before": before[part], "after": after[part], "kept": shown.share(after[part], before[part])}
        for part in before
        if before[part]
    ]
    shape = facts["shape"]
    sizes = [
        f"{name.replace('_', ' ')} {shape['before'][name]} → {shape['after'][name]}"
        for name in ("heads", "kv_heads", "channels")
    ]
    tally = [
        ("of all parameters removed", f"{100 * facts['parameters']['removed_share']:.1f} %"),
        ("bytes", f"{shown.count(facts['bytes']['before'])} → {shown.count(facts['bytes']['after'])}"),
        ("per layer", ", ".join(sizes)),
    ]
    speed = facts.get("tokens_per_s")
    if speed:
        rates = f"{speed['before']:,.0f} → {speed['after']:,.0f}"
        tally.append((f"tokens/s of vLLM, {speed['prompts']} prompts", rates))
    return {"stage": stage, "rows": rows, "facts": tally}


def sweeps(run: Run) -> list[Section]:
    """Sweep stages: every trial, the best ones first, and the figure of what they cost."""
    found: list[Section] = []
    for stage in run.of_job("sweep"):
        sweep = stage.sweep
        if not sweep:
            continue
        sign = -1 if sweep["higher_is_better"] else 1
        trials = sorted(sweep["trials"], key=lambda t: (-t["steps"], sign * (t["score"]["value"] or 0), t["key"]))
        unit = sweep.get("unit", "share")
        found.append(
            {
                "stage": stage,
                "metric": sweep["metric"],
                "axes": [axis.rpartition(".")[2] for axis in sweep["axes"]],
                "paths": sweep["axes"],
                "unit": unit,
                "trials": [{**trial, "pareto": trial["key"] in sweep["pareto"]} for trial in trials],
                "facts": [
                    ("trials", str(len(trials))),
                    ("stopped early", str(sum(t["ended"] == "stopped" for t in trials))),
                    ("engines started", f"{sweep['engine_starts']} for {sweep['shapes']} model shapes"),
                ],
                "svg": curves.pareto_figure(sweep),
                "rungs_svg": curves.rungs_figure(sweep),
            }
        )
    return found
