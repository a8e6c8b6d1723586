"""Figures of preference tuning and sweeps, in the page's own style."""

from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from itune_ray.report.collect import Row, Stage
from itune_ray.report.figures import STYLE, VARIABLES, WIDTH, inline, series, side_by_side, smoothed

PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.0f} %")


def preference_figure(stage: Stage) -> str:
    """Reward margin and share of pairs ranked right over steps: trained pairs as a curve, held-out ones as points."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
        left, right = side_by_side(figure, [1.0, 1.0])
        for axes, key, title in (
            (left, "reward_margin", "reward margin β(Δw − Δl)"),
            (right, "reward_accuracy", "pairs ranked right"),
        ):
            _curve(axes, stage, key)
            axes.set_title(title, loc="left", fontsize=9.5, color=VARIABLES["ink"])
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        right.yaxis.set_major_formatter(PERCENT)
        right.axhline(0.5, color=VARIABLES["muted"], linewidth=0.8, linestyle=(0, (4, 3)))
        _legend(left)
        return inline(figure, "Reward margin and accuracy over steps, on trained and held-out pairs")


def _curve(axes: Axes, stage: Stage, key: str) -> None:
    points = [(entry["step"], entry[key]) for entry in stage.metrics if key in entry]
    steps, values = zip(*points, strict=True)
    axes.plot(steps, smoothed(values), color=VARIABLES["after"], linewidth=2.0, label="trained pairs")
    held = [entry for entry in stage.validation if key in entry]
    if not held:
        return
    places = [entry["step"] for entry in held]
    axes.plot(
        places,
        [e[key] for e in held],
        "o-",
        color=VARIABLES["ink"],
        markersize=4.5,
        linewidth=0.9,
        label="held-out pairs",
    )
    if key == "reward_accuracy":
        for entry in held:
            axes.plot(
                [entry["step"]] * 2, [entry["low"], entry["high"]], color=VARIABLES["ink"], linewidth=2, alpha=0.3
            )


def pareto_figure(sweep: Mapping[str, Any]) -> str:
    """Score over parameters and over tokens per second; the trials that nothing beats are joined and labelled."""
    trials = [trial for trial in sweep["trials"] if trial["score"]["value"] is not None]
    axes_of = [("parameters", "parameters served, M", 1e-6)]
    if any(trial["tokens_per_s"] for trial in trials):
        axes_of.append(("tokens_per_s", "tokens/s of the engine, thousands", 1e-3))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        for axes, (key, title, scale) in zip(side_by_side(figure, [1.0] * len(axes_of)), axes_of, strict=True):
            _scatter(axes, sweep, trials, key, scale)
            axes.set_xlabel(title)
            axes.yaxis.set_major_formatter(PERCENT)
            axes.set_title(sweep["metric"], loc="left", fontsize=9.5, color=VARIABLES["ink"])
            axes.margins(x=0.12, y=0.12)
        return inline(figure, "Score of every trial over its parameters and its speed")


def _scatter(axes: Axes, sweep: Mapping[str, Any], trials: list[Row], key: str, scale: float) -> None:
    best = set(sweep["pareto"])
    places = [trial[key] * scale for trial in trials if trial[key]]
    middle = (min(places) + max(places)) / 2
    for trial in trials:
        if not trial[key]:
            continue
        x, score, on = trial[key] * scale, trial["score"], trial["key"] in best
        colour = VARIABLES["after"] if on else VARIABLES["before"]
        axes.plot([x, x], [score["low"], score["high"]], color=colour, linewidth=2.5, alpha=0.35)
        hollow = trial["ended"] == "stopped"
        axes.plot(
            [x],
            [score["value"]],
            "o",
            color=colour,
            markersize=7 if on else 5.5,
            markerfacecolor="none" if hollow else colour,
        )
        if on:
            label = ", ".join(_short(path, value) for path, value in trial["axes"].items())
            right = x > middle
            axes.annotate(
                label,
                (x, score["value"]),
                xytext=(-7 if right else 7, 5),
                textcoords="offset points",
                ha="right" if right else "left",
                fontsize=8,
                color=VARIABLES["ink"],
            )
    joined = sorted((t[key] * scale, t["score"]["value"]) for t in trials if t["key"] in best and t[key])
    axes.plot(*zip(*joined, strict=True), color=VARIABLES["after"], linewidth=0.9, alpha=0.6)


def _short(path: str, value: Any) -> str:
    return f"{path.rpartition('.')[2]} {value:g}" if isinstance(value, (int, float)) else f"{path} {value}"


def rungs_figure(sweep: Mapping[str, Any]) -> str:
    """Score of every trial at each rung; empty where trials have one rung only."""
    trials = [trial for trial in sweep["trials"] if trial["rungs"]]
    if not any(len(trial["rungs"]) > 1 for trial in trials):
        return ""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
        axes = figure.add_subplot()
        for number, trial in enumerate(trials):
            label = ", ".join(_short(path, value) for path, value in trial["axes"].items())
            points = [(rung["step"], rung["value"]) for rung in trial["rungs"]]
            axes.plot(*zip(*points, strict=True), "o-", color=series(number), markersize=4, linewidth=1.2, label=label)
        axes.yaxis.set_major_formatter(PERCENT)
        axes.set_xlabel("optimizer steps")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor=VARIABLES["muted"], fontsize=8)
        return inline(figure, "Score of every trial at each rung")


def alignment_figure(alignment: Mapping[str, Any]) -> str:
    """The mean alignment matrix of a reflective learning as a heat map: levels down, steps across, darker for more.

    Args:
        alignment: `levels`, `mean` [level][step] in [0, 1], and `rows` per step.
    """
    levels, mean = alignment["levels"], alignment["mean"]
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(WIDTH, 0.7 + 0.36 * len(levels)), layout="constrained")
        axes = figure.add_subplot()
        for place, cells in enumerate(mean):
            for step, value in enumerate(cells):
                axes.barh([place], [0.94], 0.9, left=[step - 0.47], color=VARIABLES["after"], alpha=0.06 + 0.6 * value)
                axes.text(step, place, f"{value:.2f}", ha="center", va="center", color=VARIABLES["ink"])
        steps = [f"{step}\nn = {rows}" for step, rows in enumerate(alignment["rows"])]
        axes.set(xlim=(-0.5, len(steps) - 0.5), ylim=(len(levels) - 0.5, -0.5))
        axes.set(xticks=range(len(steps)), xticklabels=steps, yticks=range(len(levels)), yticklabels=levels)
        axes.set_xlabel("step")
        return inline(figure, "Mean alignment of the student's replies per level and step")


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper left", labelcolor=VARIABLES["muted"], handlelength=1.2)
