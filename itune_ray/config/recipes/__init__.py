"""Schemas of the recipes of `itune generate`, one per `type`, a module per family."""

from typing import Annotated, Any, Literal

from pydantic import Field

from itune_ray.config.recipes.answers import (
    ConstitutionalConfig,
    DialogueConfig,
    ReflectionConfig,
    ReflectiveLearningConfig,
    RespondConfig,
    SelectiveReflectionConfig,
    TeacherTopkConfig,
)
from itune_ray.config.recipes.base import RecipeBase
from itune_ray.config.recipes.documents import BacktranslationConfig, GroundedConfig, MultiDocumentConfig
from itune_ray.config.recipes.instructions import (
    AlpacaConfig,
    EvolInstructConfig,
    MagpieConfig,
    MctsConfig,
    RedTeamConfig,
    SelfInstructConfig,
    SelfInstructInstancesConfig,
)
from itune_ray.config.recipes.preferences import BestOfNConfig, CompareConfig, PreferenceConfig, PreferenceLabelConfig
from itune_ray.config.recipes.transforms import (
    AugmentConfig,
    MosaicConfig,
    TaskTokensConfig,
    TechniqueConfig,
    TemplatesConfig,
)


class CustomRecipeConfig(RecipeBase):
    """Your own recipe: a class like those of `itune_ray.generate.recipes`."""

    type: Literal["custom"] = "custom"
    import_path: str
    """`package.module:Class`; its source code is part of the artifact's identity."""
    args: dict[str, Any] = {}


RecipeConfig = Annotated[
    RespondConfig
    | PreferenceConfig
    | BestOfNConfig
    | SelfInstructConfig
    | AlpacaConfig
    | SelfInstructInstancesConfig
    | TeacherTopkConfig
    | EvolInstructConfig
    | CompareConfig
    | MagpieConfig
    | BacktranslationConfig
    | GroundedConfig
    | MultiDocumentConfig
    | MosaicConfig
    | TechniqueConfig
    | AugmentConfig
    | ReflectiveLearningConfig
    | TaskTokensConfig
    | MctsConfig
    | ConstitutionalConfig
    | PreferenceLabelConfig
    | DialogueConfig
    | ReflectionConfig
    | SelectiveReflectionConfig
    | RedTeamConfig
    | TemplatesConfig
    | CustomRecipeConfig,
    Field(discriminator="type"),
]
