"""Schemas of the places that show a training's steps beside metrics.jsonl."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from itune_ray.config.base import SECRET, Schema


class TensorboardTracker(Schema):
    """Event files in `tensorboard/` of the training's folder: `tensorboard --logdir runs` shows them."""

    type: Literal["tensorboard"] = "tensorboard"


class WandbTracker(Schema):
    """Weights & Biases; needs the package `wandb`, and WANDB_API_KEY in the environment, or WANDB_MODE=offline."""

    type: Literal["wandb"] = "wandb"
    project: str = "itune-ray"
    entity: str | None = None
    """Team or user; default: the key's own."""


class MlflowTracker(Schema):
    """MLflow; needs the package `mlflow-skinny` or `mlflow`. Its user and password or token are read from the
    environment (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN)."""

    type: Literal["mlflow"] = "mlflow"
    experiment: str = "itune-ray"
    uri: str | None = None
    """Of the tracking server or folder; default: MLFLOW_TRACKING_URI in the environment. MLflow 3 takes a folder with
    MLFLOW_ALLOW_FILE_STORE=true alone."""

    @field_validator("uri")
    @classmethod
    def _holds_no_key(cls, uri: str | None) -> str | None:
        parts = urlsplit(uri or "")
        if parts.username or parts.password:
            raise PydanticCustomError(
                SECRET,
                "the uri holds a user or a password: give them in the environment (MLFLOW_TRACKING_USERNAME, "
                "MLFLOW_TRACKING_PASSWORD)",
            )
        return uri


TrackerConfig = Annotated[TensorboardTracker | WandbTracker | MlflowTracker, Field(discriminator="type")]
