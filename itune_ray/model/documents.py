"""Attention over a flat row of packed documents, one document after another: no mask, no work between documents.

A masked row of T tokens costs T² per head, of which documents of n tokens need T·n. FlashAttention takes documents'
lengths on a GPU; this is the same on a CPU, by torch's SDPA kernel.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from itune_ray.errors import ModelError
from itune_ray.model.cpu import attention_dtype, compute_dtype, wide

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
    split = [tensor.to(inside).split(lengths, 2) for tensor in (query, key, value)]
    with torch.autocast(value.device.type, enabled=False):
        parts = [sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in zip(*split, strict=True)]
        out = torch.cat(parts, 1)
        kept = getattr(module, "unrounded", False) and wide(value.device, dtype)
        return out if kept else out.to(dtype), None


def install_document_attention(model: Any) -> None:
    """Let the model attend by document; its inputs are then those of `varlen` masking alone."""
    ALL_ATTENTION_FUNCTIONS.register(BY_DOCUMENT, attend_by_document)
    model.config.get_text_config()._attn_implementation = BY_DOCUMENT
