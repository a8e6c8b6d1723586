"""Means over a document of what an image-text model hands to its language model: image features and word embeddings.

Families such as LLaVA, Idefics3 and SmolVLM put the projector's output in the places of an image's tokens, among the
embeddings of the words; the language model is then called with `inputs_embeds`. That one tensor holds both.
"""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from itune_ray.errors import ModelError


class Pooled(NamedTuple):
    """Of the D documents of a micro-batch, in order; differentiable."""

    images: Tensor
    """[D, H] fp32, mean of the projected features of a document's images."""
    answers: Tensor
    """[D, H] fp32, mean of the input embeddings of its supervised tokens."""


def install_pooling(model: nn.Module) -> None:
    """Let `model(..., token_scores=True, pool_at=documents)` return scores with `pooled`.

    `pool_at` [B, T] is the document of each token, counted over the rows, and -1 in padding. To be called after
    `install_fused_head`, before PEFT and sharding. Images are where the model's config says that it puts their
    features, which need not be the processor's placeholder.
    """
    image_token = int(getattr(model.config, "image_token_id", -1))
    original: Callable[..., Any] = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, pool_at: Tensor | None = None, **kwargs: Any) -> Any:
        if pool_at is None:
            return original(*args, **kwargs)
        given: list[Tensor | None] = []

        def note(_: nn.Module, __: Any, arguments: dict[str, Any]) -> None:
            given.append(arguments.get("inputs_embeds"))

        hook = self.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
        try:
            scores = original(*args, **kwargs)
        finally:
            hook.remove()
        images = kwargs["input_ids"] == image_token
        if len(given) != 1 or given[0] is None or not images.any():
            raise ModelError(
                "the model does not put image features among its word embeddings, which the vision term compares",
                got=type(self).__name__,
                allowed="a family that does, such as llava or idefics3, or 0",
                knob="objective.vision",
            )
        answers = kwargs["labels"] != -100
        return scores._replace(pooled=Pooled(*(_means(given[0], marks, pool_at) for marks in (images, answers))))

    model.forward = MethodType(forward, model)


def _means(embeds: Tensor, marks: Tensor, documents: Tensor) -> Tensor:
    """[D, H] mean of embeds [B, T, H] where marks [B, T] are set, per document; 0 where a document has none."""
    num_documents = int(documents.max()) + 1
    of = documents[marks]
    sums = embeds.new_zeros((num_documents, embeds.shape[-1]), dtype=torch.float32)
    counts = torch.bincount(of, minlength=num_documents).clamp(min=1)
    return sums.index_add(0, of, embeds[marks].float()) / counts[:, None]
