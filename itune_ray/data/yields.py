"""What an accepted row has cost. Rejected and failed rows are paid for too: all tokens count, accepted rows divide."""

from typing import Any

import pyarrow as pa


def by_recipe(table: pa.Table) -> dict[str, dict[str, Any]]:
    """Recipe -> rows, accepted ones, generated tokens of all, and of those per accepted row (None where none was).

    Args:
        table: Rows in `LEDGER_SCHEMA`; those without a recipe, as people wrote them, are left out.
    """
    columns = table.select(["recipe", "status", "num_tokens"]).to_pydict()
    found: dict[str, dict[str, Any]] = {}
    for recipe, status, tokens in zip(columns["recipe"], columns["status"], columns["num_tokens"], strict=True):
        if recipe is not None:
            entry = found.setdefault(recipe, {"rows": 0, "accepted": 0, "generated_tokens": 0})
            entry["rows"] += 1
            entry["accepted"] += status == "accepted"
            entry["generated_tokens"] += tokens or 0
    for entry in found.values():
        entry["tokens_per_accepted"] = _per(entry["generated_tokens"], entry["accepted"])
    return dict(sorted(found.items()))


def per_accepted(accepted: int, seconds: float, tokens: int | None, cost: float | None) -> dict[str, float | None]:
    """Wall seconds, tokens read and generated, and money of a stage per accepted row; None for what is not known."""
    return {"seconds": _per(seconds, accepted), "tokens": _per(tokens, accepted), "cost": _per(cost, accepted)}


def _per(amount: float | None, rows: int) -> float | None:
    return None if amount is None or not rows else round(amount / rows, 6)
