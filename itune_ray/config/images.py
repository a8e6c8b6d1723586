"""Schema of training image-text models."""

from typing import Literal

from itune_ray.config.base import Schema


class ImagesConfig(Schema):
    """Images beside the chats (LLaVA; Liu et al. 2023): the loss is that of the text alone, given the images, unless
    `objective.vision` or `objective.fusion` add a term (survey eq. 9). The vision tower stays as it is. Rows without an
    image are rejected as `no_image`, and every row is its own: set packing=false."""

    trained: Literal["projector", "joint"] = "joint"
    """projector: what maps image features to the language model's embeddings, alone, the paper's first stage (lr 1e-3);
    joint: it and the language model, the second (lr 2e-5), or LoRA on the language model alone."""


def refusal(packing: bool, objective: str, peft: str, trained: str, fresh: bool) -> str | None:
    """Why a job cannot train with images, or None when it can."""
    if packing:
        return "images go without packing, since an image's features belong to one row: set packing=false"
    if objective != "sft":
        return f"images go with objective.type=sft alone, and the objective is {objective}"
    if fresh:
        return "images need a pretrained image-text model: set model.path"
    if peft not in ("full", "lora"):
        return f"images go with model.peft.type full or lora, and {peft} would wrap the vision tower too"
    if trained == "projector" and peft != "full":
        return "images.trained=projector trains whole weights of the projector: set model.peft.type=full"
    return None


def terms_refusal(vision: float, fusion: float, images: bool, peft: str, batch: int) -> str | None:
    """Why a job cannot have the vision and fusion terms that it asks for, or None when it can."""
    if not (vision or fusion):
        return None
    if not images:
        return "objective.vision and objective.fusion compare images: set images, or leave both at 0"
    if batch < 2:
        return "objective.vision and objective.fusion compare the rows of a step: set batch to 2 or more"
    if vision and peft == "lora":
        return (
            "objective.vision moves image features and word embeddings towards each other, and LoRA trains neither: "
            "set model.peft.type=full, or objective.vision=0"
        )
    return None
