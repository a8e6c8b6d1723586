"""Decoder layers compiled by TorchInductor: what lies between their products becomes a few fused kernels.

Layers alone, for all of a model share one code, which is compiled once; what a strategy hooks onto them, embeddings and
the fused head stay as they are.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from itune_ray.model.documents import BY_DOCUMENT, attend_by_document

VARIANTS = 64
"""Of one code that are compiled (training and not, with and without gradients, one row and several) before torch would
quietly run it uncompiled."""


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks transformers itself declares indivisible: no list of model names is needed."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return [module for module in model.modules() if type(module).__name__ in names]


def compile_layers(model: nn.Module) -> None:
    """Let every decoder layer be compiled when it is first called, for rows of any length: were there a kernel for each
    length, a resumed run would round otherwise. Random numbers stay torch's own.

    Compiles in this process, so that nothing outlives it.
    """
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    dynamo.recompile_limit = VARIANTS
    inductor.compile_threads = 1
    # Its documents' lengths are known only as it runs.
    ALL_ATTENTION_FUNCTIONS.register(BY_DOCUMENT, torch.compiler.disable(attend_by_document))
    for layer in decoder_layers(model):
        compiled: Any = torch.compile(layer.forward, dynamic=True, options={"fallback_random": True})
        layer.forward = compiled
