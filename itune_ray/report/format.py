"""Figures as people read them. Every number of the page goes through here, so that equal things look equal."""

import math

MISSING = "–"


def score(value: float | None, unit: str) -> str:
    """A score: shares in percent, points and ratios as they are."""
    if value is None or math.isnan(value):
        return MISSING
    return f"{100 * value:.1f} %" if unit == "share" else f"{value:,.2f}"


def interval(low: float | None, high: float | None, unit: str) -> str:
    """`81.4 – 87.6`, in the unit of its score, which stands beside it."""
    if low is None or high is None:
        return ""
    scale, digits = (100, 1) if unit == "share" else (1, 2)
    return f"{scale * low:,.{digits}f} – {scale * high:,.{digits}f}"


def points(difference: float, unit: str) -> str:
    """A signed difference of two scores; of shares in percentage points."""
    value, digits = (100 * difference, 1) if unit == "share" else (difference, 2)
    return f"{'+' if value >= 0 else '−'}{abs(value):,.{digits}f}"


def count(value: float | None) -> str:
    """`12,345`; millions and more with three digits."""
    if value is None:
        return MISSING
    for size, suffix in ((1e9, " B"), (1e6, " M")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """`4.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds is None:
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def p_value(p: float) -> str:
    """`p = 0.032` or `p < 0.0001`."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def share(part: float, whole: float) -> str:
    """`12.3 %` of a whole, `< 0.1 %` of what would round to nothing; of an empty whole there is none."""
    if not whole:
        return MISSING
    percent = 100 * part / whole
    return "< 0.1 %" if 0 < percent < 0.05 else f"{percent:.1f} %"


def shorten(text: str, limit: int) -> str:
    """At most so many characters, the cut marked."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
