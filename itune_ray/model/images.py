"""Image-text models: which of their weights are what, and images as the tensors that their forward pass takes."""

import inspect
import io
import re
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from itune_ray.data.images import BadImageError
from itune_ray.errors import ModelError, first_line

PROJECTORS = ("multi_modal_projector", "connector", "merger", "mm_projector", "embed_vision")
"""What families call the module from image features to the language model's embeddings."""


class ImageReader:
    """The processor of an image-text model.

    Args:
        folder: Where the processor's files are.

    Raises:
        ModelError: There is none, or it has no image token.
    """

    def __init__(self, folder: str, trust_remote_code: bool = False):
        try:
            from transformers import AutoProcessor  # a second of imports that trainings on text go without

            self.processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"no usable processor: {first_line(error)}", got=folder, knob="model.path") from None
        self.token: str | None = getattr(self.processor, "image_token", None)
        if self.token is None or not hasattr(self.processor, "image_processor"):
            raise ModelError("the processor takes no images", got=folder, knob="images")
        self.token_id = int(self.processor.tokenizer.convert_tokens_to_ids(self.token))

    def expansion(self, image: bytes) -> list[int]:
        """The tokens that one placeholder becomes for this image; raises `BadImageError`."""
        encoded = self.processor(text=self.token, images=[_opened(image)], add_special_tokens=False)
        (ids,) = encoded["input_ids"]
        return list(ids)

    def inputs(self, images: Sequence[bytes]) -> dict[str, Tensor]:
        """`pixel_values` and what else the processor gives beside the ids, for the images of a micro-batch."""
        text = self.token * len(images) if self.token else ""
        encoded = self.processor(text=text, images=[_opened(i) for i in images], return_tensors="pt")
        return {name: v for name, v in encoded.items() if name not in ("input_ids", "attention_mask")}

    def blank(self) -> bytes:
        """A black image, for a rank without rows: it takes part in every forward and backward of the vision tower."""
        out = io.BytesIO()
        Image.new("RGB", (32, 32)).save(out, "PNG")
        return out.getvalue()


def _opened(image: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(image)).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise BadImageError(f"an image cannot be decoded: {str(error)[:120]}", got=f"{len(image)} bytes") from None


def expanded(ids: Sequence[int], supervised: Sequence[bool], token: int, expansions: Sequence[Sequence[int]]) -> Any:
    """Ids and flags with every placeholder replaced by its image's tokens, which are never targets.

    Raises:
        ModelError: The template wrote another number of placeholders than there are images.
    """
    if (places := sum(i == token for i in ids)) != len(expansions):
        raise ModelError(
            "the chat template writes another number of image tokens than a row has images",
            got=places,
            allowed=len(expansions),
            knob="model.chat_template",
        )
    rest = iter(expansions)
    new_ids: list[int] = []
    flags: list[bool] = []
    for i, on in zip(ids, supervised, strict=True):
        part, value = (next(rest), False) if i == token else ([i], on)
        new_ids += part
        flags += [value] * len(part)
    return new_ids, flags


def exchanged(
    ids: Sequence[int], supervised: Sequence[bool], was: Sequence[Sequence[int]], becomes: Sequence[Sequence[int]]
) -> tuple[list[int], list[bool]]:
    """Ids and flags of `expanded` with the tokens of every image replaced by those of another.

    Raises:
        ModelError: The ids do not hold the former, in order.
    """
    new_ids: list[int] = []
    flags: list[bool] = []
    start = 0
    for old, new in zip(was, becomes, strict=True):
        places = range(start, len(ids) - len(old) + 1)
        at = next((i for i in places if ids[i] == old[0] and list(ids[i : i + len(old)]) == list(old)), None)
        if at is None:
            raise ModelError("an image's tokens are not among those of its row", got=f"{len(old)} tokens")
        new_ids += [*ids[start:at], *new]
        flags += [*supervised[start:at], *[False] * len(new)]
        start = at + len(old)
    return [*new_ids, *ids[start:]], [*flags, *supervised[start:]]


def language_path(model: Any) -> str | None:
    """Name of the language model's module within an image-text model; None for any other model."""
    if "image" not in (getattr(model, "input_modalities", None) or ()):
        return None
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder and name), None)


def beside_language(model: Any) -> str | None:
    """A regular expression of the modules that are not the language model's, for an image-text model."""
    path = language_path(model)
    return None if path is None else rf"(?!{re.escape(path)}\.).*"


def choose_trained(model: Any, trained: str) -> None:
    """Let gradients into the projector alone, or into it and the language model with its head.

    Raises:
        ModelError: The model has no projector that is known by name, or places images in more than one dimension.
    """
    projectors = [m for name, m in model.named_modules() if name.rpartition(".")[2] in PROJECTORS]
    if not projectors:
        raise ModelError(
            "the model has no projector of a known name",
            got=type(model).__name__,
            allowed=", ".join(PROJECTORS),
            knob="images.trained",
        )
    model.requires_grad_(False)
    parts: list[nn.Module] = [*projectors]
    if trained == "joint":
        parts += [model.get_decoder(), model.get_output_embeddings()]
    for part in parts:
        part.requires_grad_(True)


def check_positions(model: Any) -> None:
    """Refuse families that number an image's tokens by height and width, since rows here are numbered one by one, and
    those whose images look ahead, since masks here are causal.

    Raises:
        ModelError: The model is of such a family.
    """
    text: Any = model.config.get_text_config()
    typed = "token_type_ids" in inspect.signature(type(model).forward).parameters
    ahead = typed and model.config.model_type != "gemma3n"  # which takes them and does not use them
    if ahead or getattr(text, "use_bidirectional_attention", None):
        raise ModelError(
            "the tokens of an image, or a whole prompt, see each other in both directions, which the loop does not do",
            got=model.config.model_type,
            allowed="a model with causal attention throughout, such as llava, smolvlm or idefics3",
            knob="model.path",
        )
    rope: Any = getattr(text, "rope_parameters", None) or {}
    if "mrope_section" in rope:
        raise ModelError(
            "the model numbers image tokens by height and width, which the loop does not",
            got=model.config.model_type,
            allowed="a model with plain positions, such as llava, smolvlm or idefics3",
            knob="model.path",
        )


def to_compute(inputs: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """On the device, pixels in the compute dtype."""
    return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}
