"""What a step needs of its rows, checked on the rows before anything expensive starts.

A facet is a part that a row may have: `text`, `messages`, `prompt`, `response`, `finish_reason`, or `meta.NAME`. A
recipe or filter says which facets it needs and which it adds; a chain is refused when a step needs what no row of its
source has and no step before it adds.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from itune_ray.data.records import Record
from itune_ray.errors import DataError


@dataclass(frozen=True)
class Contract:
    """What one step needs and adds."""

    name: str
    """For the message, e.g. `filters.2 (human_rating)`."""
    needs: frozenset[str] = frozenset()
    provides: frozenset[str] = frozenset()
    only: tuple[str, ...] = ()
    """Sources it applies to; empty for all."""


def facets(records: Iterable[Record]) -> set[str]:
    """Facets that at least one of the records has."""
    found: set[str] = set()
    for record in records:
        present = {
            "text": record.text is not None,
            "messages": bool(record.messages),
            "prompt": bool(record.prompt),
            "response": record.response is not None,
            "finish_reason": record.finish_reason is not None,
        }
        found.update(name for name, there in present.items() if there)
        found.update(f"meta.{name}" for name in record.meta)
    return found


def check(steps: Sequence[Contract], facets_by_source: Mapping[str, set[str]]) -> None:
    """Refuse a chain that cannot work; raises `DataError` naming the step, what it misses and in which sources."""
    added: set[str] = set()
    for step in steps:
        sources = [name for name in facets_by_source if not step.only or name in step.only]
        present = added.union(*(facets_by_source[name] for name in sources))
        missing = sorted(step.needs - present)
        if missing and sources:
            raise DataError(
                f"{step.name} needs {', '.join(missing)}, and no row of {', '.join(sources)} has it",
                got=", ".join(sorted(present)) or "no facets",
                knob=step.name.split(" ")[0],
            )
        added |= step.provides
