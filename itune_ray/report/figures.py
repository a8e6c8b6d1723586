"""Figures as inline SVG: drawn by matplotlib, coloured by the page, so that one figure serves light, dark and print.

matplotlib gets stand-in colours; `inline` puts the page's CSS variables in their place and leaves text as text, in
the page's font. Nothing in the SVG refers to anything outside it.
"""

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from itune_ray.report import format as shown
from itune_ray.report.collect import Stage

WIDTH = 9.6
"""Inches at 100 dots: the text column of the page."""

VARIABLES = {
    "ink": "#010101",
    "muted": "#010102",
    "line": "#010103",
    "paper": "#010104",
    "before": "#010105",
    "after": "#010106",
    "kept": "#010107",
}
_SERIES = [f"#0102{i:02x}" for i in range(8)]
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": VARIABLES["line"],
    "axes.labelcolor": VARIABLES["muted"],
    "text.color": VARIABLES["ink"],
    "xtick.color": VARIABLES["line"],
    "ytick.color": VARIABLES["line"],
    "xtick.labelcolor": VARIABLES["muted"],
    "ytick.labelcolor": VARIABLES["ink"],
    "axes.grid": True,
    "grid.color": VARIABLES["line"],
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_TRIMMED = (
    (re.compile(r"<defs>\s*<style.*?</style>\s*</defs>", re.DOTALL), ""),  # it would style the whole page
    (re.compile(r"<g id=\"[^\"]*\""), "<g"),  # equal in every figure, and an id must be unique on a page
    (re.compile(r" font-family: [^;\"]*;?"), ""),
    (re.compile(r"\s*\n\s*"), " "),
)
_COORDINATES = re.compile(r'\b(?:d|x|y|transform)="[^"]*"')
_FINE = re.compile(r"(?<=\.\d\d)\d+")
"""Digits beyond a hundredth of a dot: half of a curve's bytes, and finer than any screen."""
_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.0f} %")


def scores_figure(scores: Mapping[str, Mapping[str, Mapping[str, Any]]], colours: Mapping[str, str]) -> str:
    """Every share with its interval: a group of lines per benchmark, a line per model; empty where no score is a share.

    Args:
        scores: Model -> benchmark -> score.
        colours: Model -> `before`, `after` or `muted`.
    """
    names = list(dict.fromkeys(n for per in scores.values() for n, s in per.items() if s["unit"] == "share"))
    if not names:
        return ""
    lines: list[tuple[str, Mapping[str, Any] | None, str]] = []
    for name in names:
        asked = [model for model in scores if name in scores[model]]
        lines += [(name, None, "ink"), *((_told(m, colours), scores[m][name], colours[m]) for m in asked)]
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(0.45 + 0.21 * len(lines))
        for place, (_, score, colour) in enumerate(lines):
            if score is not None:
                _whisker(axes, place, score, VARIABLES[colour])
        axes.set(xlim=(-0.015, 1.015), ylim=(len(lines) - 0.4, -0.6), yticks=range(len(lines)))
        for label, (_, score, _) in zip(axes.set_yticklabels([text for text, *_ in lines]), lines, strict=True):
            label.set(fontweight="bold" if score is None else "normal")
        axes.xaxis.set_major_formatter(_PERCENT)
        axes.grid(axis="y", visible=False)
        return inline(figure, "Scores of every model on every benchmark with 95 percent intervals")


def _told(model: str, colours: Mapping[str, str]) -> str:
    """A model's name, and whether it is the one before or after."""
    paired = {"before", "after"} <= set(colours.values())
    return f"{model} ({colours[model]})" if paired and colours[model] != "muted" else model


def _whisker(axes: Axes, place: int, score: Mapping[str, Any], colour: str) -> None:
    bounds = [score["low"], score["high"]]
    axes.plot(bounds, [place] * 2, color=colour, linewidth=3, alpha=0.45, solid_capstyle="round")
    axes.plot([score["value"]], [place], "o", color=colour, markersize=6)


def families_figure(before: Mapping[str, Any], after: Mapping[str, Any], labels: tuple[str, str]) -> str:
    """Per category, the share before and after, the worst after first; whiskers are the after model's interval."""
    names = sorted(after, key=lambda name: (after[name]["value"], name))
    columns = [names] if len(names) <= 8 else [names[: (len(names) + 1) // 2], names[(len(names) + 1) // 2 :]]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.6 + 0.25 * len(columns[0])), layout="constrained")
        panels = side_by_side(figure, [1.0] * len(columns))
        for axes, part in zip(panels, columns, strict=True):
            _families(axes, part, before, after, labels)
            axes.set_ylim(len(columns[0]) - 0.4, -0.6)
        _legend(panels[0])
        return inline(figure, "Share of right answers per task family, before and after")


def _families(
    axes: Axes, names: Sequence[str], before: Mapping[str, Any], after: Mapping[str, Any], labels: tuple[str, str]
) -> None:
    places = range(len(names))
    axes.barh(
        [p - 0.1 for p in places], [after[n]["value"] for n in names], 0.4, color=VARIABLES["after"], label=labels[1]
    )
    axes.barh(
        [p + 0.22 for p in places],
        [before.get(n, {}).get("value") or 0 for n in names],
        0.2,
        color=VARIABLES["before"],
        label=labels[0],
    )
    for place, name in enumerate(names):
        axes.plot(
            [after[name]["low"], after[name]["high"]],
            [place - 0.1] * 2,
            color=VARIABLES["ink"],
            linewidth=0.9,
            alpha=0.55,
        )
    axes.set(xlim=(0, 1.0), yticks=list(places), yticklabels=names)
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.grid(axis="y", visible=False)


def training_figure(stage: Stage) -> str:
    """Loss, gradient norm and learning rate over steps."""
    wanted = [("loss", "loss"), ("grad_norm", "gradient norm"), ("lr", "learning rate")]
    panels = [(key, label) for key, label in wanted if any(key in entry for entry in stage.metrics)]
    if not panels:
        return ""
    with matplotlib.rc_context({**STYLE, "ytick.labelcolor": VARIABLES["muted"]}):
        figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
        widths = [2.0 if key == "loss" else 1.0 for key, _ in panels]
        for axes, (key, label) in zip(side_by_side(figure, widths), panels, strict=True):
            points = [(e["step"], e[key]) for e in stage.metrics if key in e]
            _curve(axes, points, smooth=key != "lr")
            axes.set_title(label, loc="left", fontsize=9.5, color=VARIABLES["ink"])
            axes.set_xlabel("step")
            axes.margins(x=0.02)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(4 if key != "loss" else 7, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        return inline(figure, "Training loss, gradient norm and learning rate over steps")


def _curve(axes: Axes, points: Sequence[tuple[float, float]], smooth: bool) -> None:
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color=VARIABLES["after"], linewidth=1.0 if smooth else 1.8, alpha=0.35 if smooth else 1)
    if smooth:
        axes.plot(steps, smoothed(values), color=VARIABLES["after"], linewidth=2.0)


def series(number: int) -> str:
    """Stand-in colour of the n-th of many lines."""
    return _SERIES[number % len(_SERIES)]


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean over a window around each step, a twentieth of the run wide; unlike a running mean it does not lag."""
    reach = max(1, len(values) // 40)
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def funnel_figure(stages: Sequence[Stage]) -> str:
    """Per stage, the share of rows accepted, rejected by reason and failed by cause."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(0.55 + 0.52 * len(stages))
        colours = reason_colours(stages)
        for place, stage in enumerate(stages):
            left = 0.0
            for name, number in endings(stage):
                width = number / max(1, (stage.funnel or {})["in"])
                axes.barh(
                    [place],
                    [width],
                    0.56,
                    left=[left],
                    color=_of(colours[name]),
                    edgecolor=VARIABLES["paper"],
                    linewidth=0.8,
                )
                left += width
        labels = [f"{stage.name}\n{shown.count((stage.funnel or {})['in'])} in" for stage in stages]
        axes.set(xlim=(0, 1), ylim=(len(stages) - 0.45, -0.55), yticks=range(len(stages)), yticklabels=labels)
        axes.xaxis.set_major_formatter(_PERCENT)
        axes.grid(axis="y", visible=False)
        return inline(figure, "Rows accepted, rejected by reason and failed by cause, per stage")


def endings(stage: Stage) -> list[tuple[str, int]]:
    """How a stage's rows ended: accepted first, then reasons and causes by their count."""
    funnel = stage.funnel or {"accepted": 0, "rejected": {}, "failed": {}}
    rest = [*funnel["rejected"].items(), *((f"failed: {cause}", n) for cause, n in funnel["failed"].items())]
    return [("accepted", funnel["accepted"]), *sorted(rest, key=lambda pair: (-pair[1], pair[0]))]


def reason_colours(stages: Sequence[Stage]) -> dict[str, str]:
    """Ending -> CSS variable, the same in figure and legend."""
    names = list(dict.fromkeys(name for stage in stages for name, _ in endings(stage) if name != "accepted"))
    return {"accepted": "kept", **{name: f"series-{i % len(_SERIES)}" for i, name in enumerate(names)}}


def cost_figure(stages: Sequence[Stage]) -> str:
    """Seconds and tokens per stage, side by side."""
    names = [stage.name for stage in stages]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.75 + 0.34 * len(stages)), layout="constrained")
        left, right = side_by_side(figure, [1.0, 1.0])
        _bars(left, names, [stage.seconds for stage in stages], [shown.duration(s.seconds) for s in stages], "time")
        tokens = [stage.tokens or 0 for stage in stages]
        _bars(right, [""] * len(names), tokens, [shown.count(t) if t else "" for t in tokens], "tokens")
        return inline(figure, "Seconds and tokens of every stage")


def _bars(axes: Axes, names: Sequence[str], values: Sequence[float], labels: Sequence[str], title: str) -> None:
    axes.barh(range(len(values)), values, 0.6, color=VARIABLES["after"])
    top = max(values, default=0) or 1
    for place, (value, label) in enumerate(zip(values, labels, strict=True)):
        axes.text(value + 0.015 * top, place, label, va="center", color=VARIABLES["muted"])
    axes.set(xlim=(0, 1.22 * top), ylim=(len(values) - 0.4, -0.6), yticks=range(len(values)), yticklabels=names)
    axes.set_title(title, loc="left", fontsize=9.5, color=VARIABLES["ink"])
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def side_by_side(figure: Figure, widths: Sequence[float]) -> list[Axes]:
    """Axes next to each other, of these relative widths."""
    grid = figure.add_gridspec(1, len(widths), width_ratios=widths)
    return [figure.add_subplot(grid[0, i]) for i in range(len(widths))]


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        labels[::-1],
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=2,
        borderaxespad=0.2,
        handlelength=1.0,
        labelcolor=VARIABLES["muted"],
    )


def _of(name: str) -> str:
    return _SERIES[int(name.removeprefix("series-"))] if name.startswith("series-") else VARIABLES[name]


def inline(figure: Figure, label: str) -> str:
    """The figure as an `<svg>` element for this page."""
    out = io.StringIO()
    salt = hashlib.sha256(label.encode()).hexdigest()  # ids must differ between figures of one page, not between runs
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]+"', svg)
    head = f'<svg {box[0] if box else ""} role="img" aria-label="{escape(label)}">'
    svg = re.sub(r"<svg[^>]*>", head, svg, count=1)
    for pattern, clean in _TRIMMED:
        svg = pattern.sub(clean, svg)
    svg = _COORDINATES.sub(lambda attribute: _FINE.sub("", attribute[0]), svg)
    for name, colour in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    for index, colour in enumerate(_SERIES):
        svg = svg.replace(colour, f"var(--series-{index})")
    return svg.strip()
