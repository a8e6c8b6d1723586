"""Prompt templates: where they are read from, and how they are filled, in a sandbox and without unknown names."""

from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from itune_ray.errors import ConfigError


def read_template(template: str, knob: str, builtin: Mapping[str, str] | None = None) -> str:
    """The text of a template.

    Args:
        template: The name of a built-in, or a file of the user's, which is checked for syntax.
        knob: Where the job names it, for messages.
        builtin: Name -> `package:file`.

    Raises:
        ConfigError: There is no such file, or it is not valid Jinja.
    """
    if builtin and template in builtin:
        package, _, name = builtin[template].partition(":")
        return (resources.files(package) / name).read_text(encoding="utf-8")
    if not Path(template).is_file():
        allowed = ", ".join(["a Jinja file", *(builtin or ())])
        raise ConfigError("no such template file", got=template, allowed=allowed, knob=knob)
    text = Path(template).read_text(encoding="utf-8")
    try:
        _compiled(text)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"the template is not valid Jinja: {error.message} (line {error.lineno})", got=template, knob=knob
        ) from None
    return text


def render(template: str, **values: Any) -> str:
    """Fill a template; an unknown name raises `jinja2.UndefinedError`."""
    return _compiled(template).render(**values)


@lru_cache(maxsize=64)
def _compiled(text: str) -> jinja2.Template:
    template = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False).from_string(text)
    template.globals = dict(template.globals)  # each rendering copies them, and a ChainMap copies slowly
    return template
