"""The steps of a curate job: its filters, made, named, checked against the inputs and grouped into passes."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from itune_ray.config.curate import AnyFilter
from itune_ray.curate.filters import load_filter
from itune_ray.curate.filters.base import Filter, RowFilter, SetFilter
from itune_ray.curate.references import check_reference, needs_of
from itune_ray.data.contract import Contract, check, facets
from itune_ray.data.sources import SourceTable
from itune_ray.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Step:
    """One filter of the job, made."""

    name: str
    """Its type; numbered where the job has two of it. Names its score column."""
    config: AnyFilter
    filter: Filter


def make_steps(configs: Sequence[AnyFilter]) -> list[Step]:
    """The filters of a job in their order; raises `ConfigError` for one that cannot work."""
    counts = Counter(config.type for config in configs)
    seen: Counter[str] = Counter()
    steps: list[Step] = []
    for config in configs:
        seen[config.type] += 1
        name = config.type if counts[config.type] == 1 else f"{config.type}_{seen[config.type]}"
        steps.append(Step(name, config, load_filter(config)))
    return steps


def check_steps(steps: Sequence[Step], tables: Sequence[SourceTable]) -> None:
    """The inputs that a filter names exist, and have what it needs."""
    names = [table.name for table in tables]
    for step in steps:
        for name in step.config.only:
            if name not in names:
                raise ConfigError(
                    f"filter {step.name} names no input{did_you_mean(name, names)}",
                    got=name,
                    allowed=", ".join(names),
                    knob="filters.N.only",
                )
    for place, step in enumerate(steps):
        for reference in _references(step):
            check_reference(reference, [earlier.name for earlier in steps[:place]], step.name)
    contracts = [
        Contract(f"filters.{i} ({s.name})", s.filter.needs | needs_of(_references(s)), s.filter.provides, s.config.only)
        for i, s in enumerate(steps)
    ]
    check(contracts, {table.name: facets(table.records) for table in tables if table.records})


def _references(step: Step) -> tuple[str, ...]:
    return step.filter.references if isinstance(step.filter, SetFilter) else ()


def passes(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Row filters in a row share one pass, up to one that must settle; every other filter is a pass of its own."""
    group: list[Step] = []
    for step in steps:
        is_row = isinstance(step.filter, RowFilter)
        if group and not is_row:
            yield group
            group = []
        group.append(step)
        if not isinstance(step.filter, RowFilter) or step.filter.settles:
            yield group
            group = []
    if group:
        yield group
