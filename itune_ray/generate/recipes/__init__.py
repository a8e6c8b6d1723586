"""Recipes: how one input row becomes rows, as an async function of (row, llm). A new one is a class and a line here."""

import importlib

from itune_ray.config.recipes import CustomRecipeConfig, RecipeConfig
from itune_ray.errors import ConfigError, did_you_mean
from itune_ray.generate.recipes.base import Recipe

RECIPES = {
    "respond": "itune_ray.generate.recipes.respond:Respond",
    "preference": "itune_ray.generate.recipes.preference:Preference",
    "best_of_n": "itune_ray.generate.recipes.best_of_n:BestOfN",
    "teacher_topk": "itune_ray.generate.recipes.teacher_topk:TeacherTopk",
    "self_instruct": "itune_ray.generate.recipes.propose:Propose",
    "alpaca": "itune_ray.generate.recipes.alpaca:Alpaca",
    "self_instruct_instances": "itune_ray.generate.recipes.self_instruct_instances:SelfInstructInstances",
    "compare": "itune_ray.generate.recipes.compare:Compare",
    "magpie": "itune_ray.generate.recipes.magpie:Magpie",
    "backtranslation": "itune_ray.generate.recipes.backtranslation:Backtranslation",
    "grounded": "itune_ray.generate.recipes.grounded:Grounded",
    "multi_document": "itune_ray.generate.recipes.multi_document:MultiDocument",
    "templates": "itune_ray.generate.recipes.templates:Templates",
    "evol_instruct": "itune_ray.generate.recipes.evol_instruct:EvolInstruct",
    "mosaic": "itune_ray.generate.recipes.mosaic:Mosaic",
    "technique": "itune_ray.generate.recipes.technique:Technique",
    "augment": "itune_ray.generate.recipes.augment:Augment",
    "reflective_learning": "itune_ray.generate.recipes.reflective_learning:ReflectiveLearning",
    "task_tokens": "itune_ray.generate.recipes.task_tokens:TaskTokens",
    "mcts": "itune_ray.generate.recipes.mcts:Mcts",
    "constitutional": "itune_ray.generate.recipes.constitutional:Constitutional",
    "preference_label": "itune_ray.generate.recipes.preference_label:PreferenceLabel",
    "dialogue": "itune_ray.generate.recipes.dialogue:Dialogue",
    "reflection": "itune_ray.generate.recipes.reflection:Reflection",
    "selective_reflection": "itune_ray.generate.recipes.selective_reflection:SelectiveReflection",
    "red_team": "itune_ray.generate.recipes.red_team:RedTeam",
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
