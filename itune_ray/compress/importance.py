"""How much heads and channels matter, by gradients of the supervised loss on calibration rows.

Heads (survey eq. 25 and 26, corrected as in Michel et al. 2019): with o_h the output of head h just before o_proj, and
a gate xi_h = 1 on it,
    I_h = E_x |dL(x)/dxi_h| = E_x |sum_t o_h,t . dL(x)/do_h,t|,
the absolute value per example; of the gradient of a mean over examples, contributions of opposite sign would cancel.
The survey prints |dL/do| . |o| instead, which is `taylor_abs`: E_x sum_t sum_i |o_i| |dL/do_i|.

Channels (LLM-Pruner's first-order criterion): I_c = sum |w dL/dw| over channel c's row of gate and up and its column
of down, L the mean over the calibration rows.

L(x) is the mean negative log-likelihood of the supervised tokens of x. Rows of one batch do not meet, so the gradient
of the sum of their losses holds each row's own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from itune_ray.compress.blocks import MLP, Block, Shape
from itune_ray.data.batches import Batch, model_inputs
from itune_ray.model.load import masking_for

Importance = Literal["gate_gradient", "taylor_abs"]


class Scores:
    """Sums over calibration rows; `heads` [L, H] and `channels` [L, C] are their means.

    Args:
        model: In fp32, eval mode; its gradients are overwritten.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], shape: Shape, importance: Importance):
        self._model, self._blocks, self._shape, self._importance = model, blocks, shape, importance
        self._heads = torch.zeros(len(blocks), shape.heads, dtype=torch.float64)
        self._rows = 0
        model.requires_grad_(False)
        for block in blocks:
            for name in MLP:
                getattr(block.mlp, name).weight.requires_grad_(True)
        model.zero_grad(set_to_none=True)

    def add(self, batch: Batch) -> None:
        """Take a batch of one row per line into account."""
        with torch.enable_grad(), self._outputs() as outputs:
            row_losses(self._model, batch).sum().backward()
        self._rows += batch.input_ids.shape[0]
        for layer, output in enumerate(outputs):
            assert output.grad is not None
            products = (output.detach() * output.grad).unflatten(-1, (self._shape.heads, self._shape.head_dim))
            per_row = products.sum((1, 3)).abs() if self._importance == "gate_gradient" else products.abs().sum((1, 3))
            self._heads[layer] += per_row.sum(0).double().cpu()

    @property
    def heads(self) -> Tensor:
        """[L, H] mean over rows."""
        return self._heads / max(self._rows, 1)

    @property
    def channels(self) -> Tensor:
        """[L, C] of the mean loss."""
        return torch.stack([self._channels(block) for block in self._blocks])

    def _channels(self, block: Block) -> Tensor:
        gate, up, down = (_saliency(getattr(block.mlp, name).weight) for name in MLP)
        return (gate.sum(1) + up.sum(1) + down.sum(0)) / max(self._rows, 1)

    @contextmanager
    def _outputs(self) -> Iterator[list[Tensor]]:
        """Collects what enters each o_proj, with its gradient."""
        seen: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            output = inputs[0] if inputs[0].requires_grad else inputs[0].detach().requires_grad_(True)
            output.retain_grad()
            seen.append(output)
            return (output, *inputs[1:])

        hooks = [block.attention.o_proj.register_forward_pre_hook(keep) for block in self._blocks]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()


def row_losses(model: Any, batch: Batch) -> Tensor:
    """[B] mean negative log-likelihood of each row's supervised tokens; rows must not be packed."""
    dtype = next(model.parameters()).dtype
    logits = model(**model_inputs(batch, masking_for(model), dtype)).logits[:, :-1]
    targets = batch.labels[:, 1:]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return losses.sum(1) / (targets != -100).sum(1).clamp(min=1)


def _saliency(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return (weight.detach().double() * weight.grad.double()).abs().cpu()
