"""A scalar head in place of the language model's: what makes a reward model of a base (Stiennon et al. 2020).

    r = w · h,   h the state of a text's last token

w starts as a draw from N(0, 1/(d+1)) that is a function of (seed, parameter name). transformers calls such a model a
sequence classifier with one label, and finds a text's last token by its padding token.
"""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from itune_ray.data.records import row_seed
from itune_ray.errors import ModelError
from itune_ray.model.logprobs import TokenScores

HEAD = "score"
"""What transformers calls the head of its decoders' sequence classifiers."""
HEAD_WEIGHT = f"{HEAD}.weight"


def reward_head(model: Any) -> nn.Linear | None:
    """The scalar head of a plain transformers model, or None where there is none."""
    head = getattr(model, HEAD, None)
    return head if isinstance(head, nn.Linear) and head.out_features == 1 else None


def install_reward_head(model: nn.Module) -> None:
    """Let `model(..., token_scores=True, value_at=places)` return the values of those states.

    `value_at` [S] counts places over the rows of [B, T] laid end to end. As for the fused head, this comes before PEFT
    and sharding, and the backbone and the head are looked up at each call.

    Raises:
        ModelError: The architecture has no such head, or one with a bias.
    """
    head = reward_head(model)
    if head is None or head.bias is not None:
        raise ModelError(
            "this architecture has no scalar head that a reward model could be trained with",
            got=type(model).__name__,
            allowed=f"a sequence classifier whose head is the linear layer `{HEAD}`",
            knob="model.path",
        )
    original: Callable[..., Any] = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self: Any, *args: Any, token_scores: bool = False, value_at: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if not token_scores:
            return original(*args, **kwargs)
        if value_at is None:
            raise ModelError("the values of a reward model need places")
        kwargs.pop("labels", None)
        states = self.base_model(*args, **kwargs).last_hidden_state.flatten(0, 1)
        values = (
            getattr(self, HEAD)(states[value_at])[:, 0].float().clone()
        )  # FSDP2 hooks what is returned, and a view would lose it
        return TokenScores(values.new_zeros(0), values.new_zeros(0), values=values)

    model.forward = MethodType(forward, model)


def initial_head(shape: tuple[int, ...], seed: int) -> Tensor:
    """Starting value of the head [1, d]: N(0, 1/(d+1)), equal on every rank."""
    generator = torch.Generator().manual_seed(row_seed(seed, "train.head", HEAD_WEIGHT))
    return torch.randn(shape, generator=generator) / (shape[-1] + 1) ** 0.5


def own_padding(tokenizer: Any) -> int | None:
    """The padding token by which transformers may find a text's last token: one that no text ends with, or None.

    Where padding is the end-of-turn token too, the last token would be taken for padding and the state before it
    scored; without a padding token transformers scores text by text, and right.
    """
    pad = tokenizer.pad_token_id
    return None if pad is None or pad == tokenizer.eos_token_id else int(pad)
