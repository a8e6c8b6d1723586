"""Schema of the classification objective."""

from typing import ClassVar, Literal

from itune_ray.config.base import Schema


class ClassifyConfig(Schema):
    """Classification as a question per label (Kowsher et al. 2024): the mean over labels y of
    -log σ(s_y) where y is the text's label and -log(1 - σ(s_y)) where it is not, s_y a new scalar head's value at the
    text's last token. Needs `model.peft.type=l_tuning`, which holds the labels."""

    rows: ClassVar[Literal["classes"]] = "classes"

    type: Literal["classify"] = "classify"
    field: str | None = None
    """Field of a row's `meta` that holds its label; default: a chat's answer is the label, and not part of the text."""
