"""A job's keys as text: name, type, default, and the string that stands under the field."""

import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from itune_ray.config.base import Schema, schemas_in


def describe(schema: type[Schema]) -> str:
    """Every key of a schema and of the sections below it, one block each, by dotted path."""
    return "\n".join(_lines(schema, "", ()))


def _lines(schema: type[Schema], prefix: str, above: tuple[type[Schema], ...]) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        if name == "type":
            continue
        sections = [s for s in schemas_in(field.annotation) if s not in above]
        yield f"{prefix}{name}: {_kind(field, sections)}{_default(field)}"
        if field.description:
            yield "    " + " ".join(field.description.split())
        for section in sections:
            tag = section.model_fields.get("type")
            if tag is not None and len(sections) > 1:
                yield f"{prefix}{name}[type={tag.default}]: {_summary(section)}"
            yield from _lines(section, f"{prefix}{name}.", (*above, section))


def _kind(field: FieldInfo, sections: list[type[Schema]]) -> str:
    if sections:
        return " | ".join(_summary(s) if len(sections) == 1 else str(s.model_fields["type"].default) for s in sections)
    return _name(field.annotation)


def _name(annotation: Any) -> str:
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if origin is typing.Annotated:
        return _name(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_name(argument) for argument in arguments)
    if arguments:
        return f"{origin.__name__}[{', '.join(_name(argument) for argument in arguments)}]"
    if annotation is type(None) or annotation is ...:
        return "none" if annotation is not ... else "..."
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "  (required)"
    return "" if isinstance(field.default, Schema) else f" = {field.default!r}"


def _summary(schema: type[Schema]) -> str:
    return (schema.__doc__ or "").strip().split("\n")[0]
