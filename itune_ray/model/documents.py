"""Attention over a flat row of packed documents, one document after another: no mask, no work between documents.

A masked row of T tokens costs T² per head, of which documents of n tokens need T·n. FlashAttention takes documents'
lengths on a GPU; this is the same on a CPU, by torch's SDPA kernel.
"""

import itertools
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from itune_ray.errors import ModelError
from itune_ray.model.cpu import SHORT, attention_dtype, compute_dtype, wide

BY_DOCUMENT = "itune_documents"
"""Of this attention among transformers' own."""


def attend_by_document(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of query [1, H, T, D], key and value [1, G, T, D] within each document; output [1, T, H, D].

    Args:
        cu_seq_lens_q: [documents + 1] where documents begin and end, as FlashAttention takes them.
    """
    if cu_seq_lens_q is None or attention_mask is not None:
        raise ModelError("attention by document needs the documents' lengths and no mask", knob="model.attention")
    lengths: list[int] = cu_seq_lens_q.diff().tolist()
    dtype = compute_dtype(value)
    inside = attention_dtype(value.device, dtype, sum(lengths) / len(lengths))
    kept = getattr(module, "unrounded", False) and wide(value.device, dtype)
    written = inside if kept else dtype
    with torch.autocast(value.device.type, enabled=False):
        shapes = query.shape[-1], key.shape[-1], value.shape[-1]
        if (
            inside == torch.float32
            and len(set(shapes)) == 1
            and _short(lengths, shapes[0])
            and _plain(module, **kwargs)
        ):
            scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
            out: Any = _ShortDocuments.apply(query, key, value, lengths, scale, written)
            return out, None
        split = [tensor.to(inside).split(lengths, 2) for tensor in (query, key, value)]
        parts = [sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in zip(*split, strict=True)]
        return torch.cat(parts, 1).to(written), None


def _short(lengths: list[int], width: int) -> bool:
    """Whether all P of a head together are no larger than twice its queries, of which each has that width."""
    return max(lengths) <= SHORT and sum(n * n for n in lengths) <= 2 * width * sum(lengths)


def _plain(
    module: nn.Module, dropout: float = 0.0, is_causal: bool | None = None, position_bias: object = None, **_: Any
) -> bool:
    """Whether nothing is asked for but causal attention, as transformers' own reads its arguments."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return causal and dropout == 0 and position_bias is None


@cache
def _above_diagonal(repeats: int) -> Tensor:
    """[SHORT · repeats, SHORT]: -inf where a key comes after the query, of which each is there `repeats` times."""
    return torch.full((SHORT, SHORT), float("-inf")).triu_(1).repeat_interleave(repeats, 0)


class _ShortDocuments(torch.autograd.Function):
    """`attend_by_document` in fp32, P = softmax(scale · q kᵀ) kept for the backward pass: for short documents torch's
    kernel, which computes P again in blocks, takes a quarter longer. With output o = P v and its gradient g:

    dv = Pᵀ g,  dS = P (g vᵀ - Σ g o),  dq = scale · dS k,  dk = scale · dSᵀ q

    A query's heads that share a key are rows of one product.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float, written: torch.dtype
    ) -> Tensor:
        groups, tokens, width = key.shape[1:]
        repeats = query.shape[1] // groups
        q = _laid_out(query[0].unflatten(0, (groups, repeats)).transpose(1, 2))
        k, v = _laid_out(key[0]), _laid_out(value[0])
        out, weights = torch.empty_like(q), []
        for one, its in _places(lengths, repeats):
            length = one.stop - one.start
            mask = _above_diagonal(repeats)[: length * repeats, :length]
            p = torch.baddbmm(mask, q[:, its], k[:, one].mT, alpha=scale).softmax(-1)
            out[:, its] = torch.bmm(p, v[:, one])
            weights.append(p)
        ctx.save_for_backward(q, k, v, out, *weights)
        ctx.lengths, ctx.scale, ctx.repeats, ctx.dtypes = lengths, scale, repeats, (query.dtype, key.dtype, value.dtype)
        result = out.new_empty((1, tokens, groups * repeats, width), dtype=written)
        result.view(tokens, groups, repeats, width).copy_(out.view(groups, tokens, repeats, width).transpose(0, 1))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            return _ShortDocuments._gradients(ctx, grads[0])

    @staticmethod
    def _gradients(ctx: Any, grad_out: Tensor) -> Any:
        q, k, v, out, *weights = ctx.saved_tensors
        groups, tokens, width = k.shape
        grad = _laid_out(grad_out[0].unflatten(1, (groups, ctx.repeats)).transpose(0, 1))
        along = (grad * out).sum(-1, keepdim=True)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for (one, its), p in zip(_places(ctx.lengths, ctx.repeats), weights, strict=True):
            grad_v[:, one] = torch.bmm(p.mT, grad[:, its])
            scores = torch.bmm(grad[:, its], v[:, one].mT).sub_(along[:, its]).mul_(p)
            grad_q[:, its] = torch.bmm(scores, k[:, one])
            grad_k[:, one] = torch.bmm(scores.mT, q[:, its])
        by_head = grad_q.mul_(ctx.scale).view(groups, tokens, ctx.repeats, width).transpose(1, 2).flatten(0, 1)
        found = by_head, grad_k.mul_(ctx.scale), grad_v
        return *(g[None].to(dtype) for g, dtype in zip(found, ctx.dtypes, strict=True)), None, None, None


def _laid_out(tensor: Tensor) -> Tensor:
    """[groups, tokens, ...] -> [groups, rows, width], fp32 and contiguous, in one pass."""
    copied = torch.empty(tensor.shape, dtype=torch.float32)
    return copied.copy_(tensor).view(len(tensor), -1, tensor.shape[-1])


def _places(lengths: list[int], repeats: int) -> list[tuple[slice, slice]]:
    """Of each document: its keys, and its queries' rows."""
    ends = list(itertools.accumulate(lengths, initial=0))
    return [(slice(a, b), slice(a * repeats, b * repeats)) for a, b in itertools.pairwise(ends)]


def install_document_attention(model: Any) -> None:
    """Let the model attend by document; its inputs are then those of `varlen` masking alone."""
    if BY_DOCUMENT not in ALL_ATTENTION_FUNCTIONS.valid_keys():  # else as `compiled` has left it
        ALL_ATTENTION_FUNCTIONS.register(BY_DOCUMENT, attend_by_document)
    model.config.get_text_config()._attn_implementation = BY_DOCUMENT
