"""Files of principles, YAML or JSON: what answers are criticised, revised and compared under."""

from pathlib import Path
from typing import TypeVar

import pydantic
import yaml

from itune_ray.config.base import Schema
from itune_ray.errors import ConfigError
from itune_ray.generate.recipes.base import builtin_prompt

T = TypeVar("T", bound=Schema)


def principles_text(path: str | None, recipe: str) -> str:
    """Text of the user's file, or of the recipe's own where `path` is None."""
    if path is None:
        return builtin_prompt(recipe, "principles.json")
    file = Path(path)
    if not file.is_file():
        raise ConfigError(
            "no such file of principles", got=path, allowed="a YAML or JSON file", knob="recipe.principles"
        )
    return file.read_text(encoding="utf-8")


def read_principles(text: str, schema: type[T]) -> T:
    """The principles that a text holds.

    Raises:
        ConfigError: It is neither YAML nor JSON, or holds something else.
    """
    try:
        return schema.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        what = f"the file of principles is no YAML: {' '.join(str(error).split())}"
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        what = f"the file of principles is wrong at {'.'.join(map(str, first['loc'])) or 'its top'}: {first['msg']}"
    raise ConfigError(what, knob="recipe.principles")
