"""The base of every schema: strict, frozen, documented fields, and the YAML + override loader.

A job is one complete YAML file. `load_job` reads it, applies `a.b=c` overrides, and returns a frozen, fully resolved
schema; there is no inheritance and no interpolation between files. Nothing here imports more than pydantic and yaml.
"""

import hashlib
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, Union

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from itune_ray.errors import ConfigError, brief, did_you_mean

Tree = dict[str, Any]
SECRET = "secret"
"""Type of an error whose input must not be repeated."""
JINJA = ("{%", "{{")
"""What opens a template on the command line, which YAML would take for a mapping."""


class Schema(BaseModel):
    """A frozen config section. The string under a field is its documentation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), validate_default=True
    )

    beside_identity: ClassVar[frozenset[str]] = frozenset()
    """Fields that decide where or how fast, never what: left out of the artifact's id."""

    silent_at_default: ClassVar[frozenset[str]] = frozenset()
    """Fields that ask for something more: left out of the artifact's id where they hold their default."""

    def identity(self) -> Tree:
        """What decides the content of the artifact this section describes, as JSON values, sections below included."""
        fields = (name for name in type(self).model_fields if name not in self.beside_identity)
        return {name: _identity(getattr(self, name)) for name in fields if not self._silent(name)}

    def _silent(self, name: str) -> bool:
        return name in self.silent_at_default and getattr(self, name) == type(self).model_fields[name].default


S = TypeVar("S", bound=Schema)


def _identity(value: Any) -> Any:
    if isinstance(value, Schema):
        return value.identity()
    if isinstance(value, Mapping):
        return {str(key): _identity(item) for key, item in typing.cast(Mapping[Any, Any], value).items()}
    if isinstance(value, (list, tuple)):
        return [_identity(item) for item in typing.cast(Sequence[Any], value)]
    return value


def mapped(section: S, change: Callable[[Schema], Schema]) -> S:
    """The section with every schema in it replaced by what `change` makes of it, the innermost first."""
    fields = {name: _mapped(getattr(section, name), change) for name in type(section).model_fields}
    changed = {name: value for name, value in fields.items() if value is not getattr(section, name)}
    return typing.cast(S, change(section.model_copy(update=changed) if changed else section))


def _mapped(value: Any, change: Callable[[Schema], Schema]) -> Any:
    if isinstance(value, Schema):
        return mapped(value, change)
    if isinstance(value, tuple):
        items = typing.cast(tuple[Any, ...], value)
        made = tuple(_mapped(item, change) for item in items)
        return items if all(new is old for new, old in zip(made, items, strict=True)) else made
    if isinstance(value, dict):
        entries = typing.cast(dict[Any, Any], value)
        changed = {key: _mapped(item, change) for key, item in entries.items()}
        return entries if all(changed[key] is item for key, item in entries.items()) else changed
    return value


def sections(section: Schema, kind: type[S]) -> list[S]:
    """Every section of a kind inside a section, itself included."""
    found: list[S] = []

    def note(inner: Schema) -> Schema:
        if isinstance(inner, kind):
            found.append(inner)
        return inner

    mapped(section, note)
    return found


def digest(value: object, length: int = 8) -> str:
    """Hex prefix of SHA-256 over canonical JSON; equal values give equal digests on every machine."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:length]


def read_tree(path: str | Path) -> Tree:
    """Parse a YAML job file into a plain tree, or say on one line why not."""
    file = Path(path)
    if not file.is_file():
        near = sorted(p.name for p in file.parent.glob("*.yaml")) if file.parent.is_dir() else []
        raise ConfigError(f"no such job file{did_you_mean(file.name, near)}", got=str(path), allowed="a YAML file")
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of config keys", got=type(tree).__name__)
    return typing.cast(Tree, tree)


def apply_overrides(tree: Tree, overrides: Sequence[str]) -> Tree:
    """Return the tree with each `a.b=c` applied in order.

    The value is parsed as YAML (a Jinja template is taken as it is), so `lr=1e-3`, `flag=true` and `data=[{path: x}]`
    mean what they look like. A number in the path indexes a list (`data.0.weight=2`); one past the end appends. An
    intermediate key that is missing is created; whether it is allowed is the schema's business.
    """
    result: Tree = json.loads(json.dumps(tree))
    for override in overrides:
        dotted, separator, text = override.partition("=")
        if not separator or not dotted:
            raise ConfigError("an override must read a.b=c", got=override, allowed="dotted.path=value")
        try:
            value = text if text.startswith(JINJA) else _numeric(yaml.safe_load(text))
        except yaml.YAMLError:
            raise ConfigError("the value of an override must be valid YAML", got=override) from None
        _assign(result, dotted.split("."), value, override)
    return result


def _numeric(value: Any) -> Any:
    """YAML 1.1 reads `1e-3` as a string; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and value.strip()[:1] in "0123456789.-+" else value
        except ValueError:
            return value
    return value


def _assign(node: Any, keys: list[str], value: Any, override: str) -> None:
    for key, following in zip(keys, [*keys[1:], None], strict=True):
        if isinstance(node, list):
            items = typing.cast(list[Any], node)
            if not key.isdigit() or int(key) > len(items):
                raise ConfigError(f"override {override!r} needs a list index", got=key, allowed=f"0 to {len(items)}")
            if int(key) == len(items):
                items.append({})
            slot: Any = int(key)
        else:
            slot = key
        if following is None:
            node[slot] = value
            return
        child: Any = typing.cast(Any, node)[slot] if isinstance(node, list) else node.get(slot)
        if not isinstance(child, (dict, list)):
            child = {}
            node[slot] = child
        node = typing.cast(Any, child)


def load_job(schema: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """Read, override and validate one job file; raises `ConfigError` naming the key, the value and what is allowed."""
    return validate(schema, apply_overrides(read_tree(path), overrides), where=str(path))


def validate(schema: type[S], tree: Mapping[str, Any], where: str) -> S:
    """Validate a tree against a schema, turning pydantic's report into one `ConfigError` line."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: {'; '.join(_explain(schema, e) for e in error.errors())}") from None


def _explain(schema: type[Schema], error: ErrorDetails) -> str:
    path = ".".join(_path_of(schema, error["loc"]))
    if error["type"] == "extra_forbidden":
        parent, key = error["loc"][:-1], str(error["loc"][-1])
        options = sorted(_fields_at(schema, parent))
        hint = did_you_mean(key, options) or (f"; allowed: {', '.join(options)}" if options else "")
        return f"unknown key `{path}`{hint}"
    if error["type"] == "missing":
        return f"`{path}` is required"
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        context = error.get("ctx", {})
        tags = str(context.get("expected_tags", "")).replace("'", "").split(", ")
        tag = str(context.get("tag", ""))
        return f"`{path}.type` is {tag!r}{did_you_mean(tag, tags)}; allowed: {', '.join(tags)}"
    message = error["msg"].removeprefix("Value error, ")
    got = "" if error["type"] == SECRET else f"; got {brief(error['input'])}"
    return f"`{path}`: {message[:1].lower() + message[1:]}{got}"


def _path_of(schema: type[Schema], loc: Sequence[int | str]) -> list[str]:
    """The location as people write it: without the union tags that pydantic puts in."""
    current: list[type[Schema]] = [schema]
    parts: list[str] = []
    for part in loc:
        fields = [c.model_fields[part] for c in current if isinstance(part, str) and part in c.model_fields]
        if fields:
            current = [s for field in fields for s in schemas_in(field.annotation)]
        elif any(_tag_of(c) == part for c in current):
            current = [c for c in current if _tag_of(c) == part]
            continue
        parts.append(str(part))
    return parts


def _fields_at(schema: type[Schema], loc: Sequence[int | str]) -> set[str]:
    """Field names of every schema that a location can mean (a union may offer several)."""
    current: list[type[Schema]] = [schema]
    for part in loc:
        following: list[type[Schema]] = []
        for candidate in current:
            if isinstance(part, str) and part in candidate.model_fields:
                following += list(schemas_in(candidate.model_fields[part].annotation))
            elif _tag_of(candidate) == part or isinstance(part, int):
                following.append(candidate)
        current = following or current
    tag = next((str(p) for p in reversed(loc) if isinstance(p, str)), None)
    tagged = [c for c in current if _tag_of(c) == tag]
    return {name for c in (tagged or current) for name in c.model_fields}


def _tag_of(schema: type[Schema]) -> str | None:
    field = schema.model_fields.get("type")
    return None if field is None else str(field.default)


def schemas_in(annotation: Any) -> Iterator[type[Schema]]:
    """The schemas an annotation can mean: itself, or the members of its unions and containers."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, Schema):
            yield annotation
        return
    if typing.get_origin(annotation) in (Union, types.UnionType, list, tuple, dict, typing.Annotated):
        for argument in typing.get_args(annotation):
            yield from schemas_in(argument)


def to_yaml(config: Schema) -> str:
    """The resolved config as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
