"""Axes: dotted config paths with the values they take, and trees with a point of the grid written into them."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from pydantic import JsonValue

from itune_ray.config.base import Schema, Tree, schemas_in
from itune_ray.errors import ConfigError, did_you_mean

Axes = Mapping[str, Sequence[JsonValue]]
AxisValues = dict[str, JsonValue]
"""Dotted path -> the value one trial has there."""


def grid(axes: Axes) -> list[AxisValues]:
    """All combinations, the last axis running fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def check_axes(axes: Axes, sections: Mapping[str, Schema]) -> None:
    """Refuse a path that no schema knows and a value that stands twice.

    Args:
        axes: To be checked.
        sections: First part of a path -> the config it leads into.

    Raises:
        ConfigError: In one line, with the path that was probably meant.
    """
    for path, values in axes.items():
        name, *keys = path.split(".")
        if name not in sections or not keys or not _leads_somewhere(sections[name], [type(sections[name])], keys):
            known = [f"{name}.{below}" for name, section in sections.items() for below in _paths(section)]
            raise ConfigError(
                f"axis `{path}` is no config path{_meant(path, known)}",
                allowed=f"paths that begin with {', '.join(f'{name}.' for name in sections)}",
                knob="axes",
            )
        written = [json.dumps(value, sort_keys=True) for value in values]
        if len(set(written)) < len(written):
            raise ConfigError(f"axis `{path}` has a value twice", got=list(values), knob="axes")


def with_values(tree: Tree, section: str, values: AxisValues) -> Tree:
    """A copy of a section's tree with the values of the axes that lead into it."""
    made: Tree = json.loads(json.dumps(tree))
    for path, value in of_section(values, section).items():
        *parents, leaf = path.split(".")[1:]
        node: Any = made
        for part in parents:
            node = _child(node, part)
        node[int(leaf) if isinstance(node, list) else leaf] = value
    return made


def of_section(values: AxisValues, section: str) -> AxisValues:
    """The axes that lead into one section."""
    return {path: value for path, value in values.items() if path.split(".")[0] == section}


def told(values: AxisValues) -> str:
    """`path=value, path=value`, for messages."""
    return ", ".join(f"{path}={json.dumps(value)}" for path, value in values.items())


def _child(node: Any, part: str) -> Any:
    """The item or section below; a section that is left out so far begins empty."""
    if isinstance(node, list):
        return cast(list[Any], node)[int(part)]
    if not isinstance(node.get(part), (dict, list)):
        node[part] = {}
    return node[part]


def _leads_somewhere(value: object, schemas: list[type[Schema]], keys: Sequence[str]) -> bool:
    """Whether every key names a field: of the config that is there, else of any that could be."""
    if not keys or isinstance(value, Mapping):  # a free mapping takes any key
        return True
    key, *rest = keys
    if isinstance(value, (list, tuple)):
        items = cast(Sequence[object], value)
        return key.isdigit() and int(key) < len(items) and _leads_somewhere(items[int(key)], [], rest)
    known = [type(value)] if isinstance(value, Schema) else schemas
    fields = [schema.model_fields[key] for schema in known if key in schema.model_fields]
    below = [schema for field in fields for schema in schemas_in(field.annotation)]
    return bool(fields) and _leads_somewhere(getattr(value, key, None), below, rest)


def _paths(section: Schema) -> Iterator[str]:
    """Dotted paths of the fields below a config that is there."""
    for name in type(section).model_fields:
        yield name
        value: object = getattr(section, name)
        if isinstance(value, Schema):
            yield from (f"{name}.{below}" for below in _paths(value))


def _meant(path: str, known: Sequence[str]) -> str:
    close = did_you_mean(path, known)
    same_leaf = [other for other in known if other.endswith(f".{path.split('.')[-1]}")]
    return close or (f"; did you mean {same_leaf[0]!r}?" if same_leaf else "")
