"""Recipes: how one input row becomes rows, as an async function of (row, llm). A new one is a class and a line here."""

import importlib

from itune_ray.config.recipes import CustomRecipeConfig, RecipeConfig
from itune_ray.errors import ConfigError, did_you_mean
from itune_ray.generate.recipes.base import Recipe

RECIPES = {
    "respond": "itune_ray.generate.recipes.respond:Respond",
    "preference": "itune_ray.generate.recipes.preference:Preference",
    "teacher_topk": "itune_ray.generate.recipes.teacher_topk:TeacherTopk",
    "self_instruct": "itune_ray.generate.recipes.propose:Propose",
    "templates": "itune_ray.generate.recipes.templates:Templates",
    "evol_instruct": "itune_ray.generate.recipes.evol_instruct:EvolInstruct",
}
"""Recipe type -> class, built with its config."""


def load_recipe(config: RecipeConfig) -> Recipe:
    """Build the recipe on the driver; it is pickled to the workers, with the text of its prompts."""
    if isinstance(config, CustomRecipeConfig):
        return _custom(config)
    module, _, name = RECIPES[config.type].partition(":")
    return getattr(importlib.import_module(module), name)(config)


def _custom(config: CustomRecipeConfig) -> Recipe:
    module, _, name = config.import_path.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the recipe's module cannot be imported: {error}",
            got=config.import_path,
            allowed="package.module:Class",
            knob="recipe.import_path",
        ) from None
    if not hasattr(found, name):
        raise ConfigError(
            f"the module has no such class{did_you_mean(name, vars(found))}",
            got=config.import_path,
            allowed="package.module:Class",
            knob="recipe.import_path",
        )
    try:
        return getattr(found, name)(**config.args)
    except TypeError as error:
        raise ConfigError(f"the recipe refuses its arguments: {error}", got=config.args, knob="recipe.args") from None
