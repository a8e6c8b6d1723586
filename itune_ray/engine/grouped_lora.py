"""LoRA on CPU as one matrix product per adapter, where vLLM 0.32 copies the adapter's weights once per token.

Its torch operators gather A [T, r, k] and B [T, d, r] for the T tokens of a batch and contract them token by token, at
the rank the engine was started with: most of the time of an engine with adapters went there. Tokens are grouped by
adapter here instead. An index of -1, a row without an adapter, adds nothing; vLLM's operators read it as the last slot.
"""

from typing import Any

import torch
from torch import Tensor


def group_by_adapter() -> None:
    """Replace the operators that vLLM's CPU LoRA layers call in this process."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for operator in (shrink, expand, expand_slice):
        name = f"bgmv_{operator.__name__}"
        for module in (lora_ops, punica_cpu):  # sgmv_* of the first call bgmv_* by its global name
            setattr(module, name, operator)


def shrink(inputs: Tensor, weights: Tensor, output: Tensor, adapters: Tensor, scaling: float = 1.0) -> None:
    """output [T, >= r] = scaling · x A^T, with A of each token's adapter.

    Args:
        inputs: [T, k].
        weights: [slots, 1, r, k] or [slots, r, k].
        adapters: [T] slot of each token, -1 for none.
    """
    product = _product(inputs, weights, adapters, output.dtype)
    output[:, : product.shape[1]] = product.mul_(scaling)


def expand(inputs: Tensor, weights: Tensor, output: Tensor, adapters: Tensor, add_inputs: bool = True) -> None:
    """output [T, d] += x B^T, or = without `add_inputs`; weights and output may be padded to different widths."""
    width = min(weights.shape[-2], output.shape[1])
    expand_slice(inputs, weights[..., :width, :], output, adapters, 0, width, add_inputs)


def expand_slice(
    inputs: Tensor,
    weights: Tensor,
    output: Tensor,
    adapters: Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """The same on the columns `slice_offset : slice_offset + slice_size` of output."""
    product = _product(inputs, weights, adapters, output.dtype)
    target = output[:, slice_offset : slice_offset + slice_size]
    target.add_(product) if add_inputs else target.copy_(product)


def _product(inputs: Tensor, weights: Tensor, adapters: Tensor, dtype: torch.dtype) -> Tensor:
    """x_t W_a(t)^T in `dtype`: [T, o]; zero where a token has no adapter."""
    x: Any = inputs.to(dtype)
    slots: list[int] = adapters[: x.shape[0]].unique().tolist()
    if len(slots) == 1 and slots[0] >= 0:
        return x @ _matrix(weights, slots[0], dtype).T
    product = x.new_zeros(x.shape[0], weights.shape[-2])
    for slot in slots:
        if slot >= 0:
            rows = adapters[: x.shape[0]] == slot
            product[rows] = x[rows] @ _matrix(weights, slot, dtype).T
    return product


def _matrix(weights: Tensor, slot: int, dtype: torch.dtype) -> Tensor:
    chosen = weights[slot]
    return (chosen[0] if chosen.ndim == 3 else chosen).to(dtype)
