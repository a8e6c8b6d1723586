"""Decoder layers compiled by TorchInductor: what lies between their products becomes a few fused kernels.

Layers alone, for all of a model share one code, which is compiled once; what a strategy hooks onto them, embeddings and
the fused head stay as they are.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from itune_ray.errors import ModelError
from itune_ray.model.documents import BY_DOCUMENT, attend_by_document

VARIANTS = 64
"""Of one code that are compiled (training and not, with and without gradients, one row and several) before torch would
quietly run it uncompiled."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""How configs name the number of experts."""


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks transformers itself declares indivisible: no list of model names is needed."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return [module for module in model.modules() if type(module).__name__ in names]


def compile_layers(model: Any, width: int) -> None:
    """Let every decoder layer be compiled when it is first called, for rows of any length. Random numbers stay torch's.

    What is compiled depends on the sizes met first; for a resumed run to round as the first one did, call the model
    with a batch of that width before any other. Compiles in this process, so that no process outlives it.

    Args:
        width: Tokens of the batch that comes first; kernels compiled for another are not taken from torch's cache.

    Raises:
        ModelError: The model has experts, or no layers that are declared.
    """
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor
    import torch.compiler.config as caches
    import torch.fx.experimental._config as shapes

    config = model.config.get_text_config()
    if any((getattr(config, name, None) or 0) > 1 for name in EXPERTS):
        raise ModelError(
            "the layers of a mixture of experts cannot be compiled: which tokens an expert gets is known as it runs",
            got=config.model_type,
            allowed="compile=false",
            knob="compile",
        )
    layers = decoder_layers(model)
    if not layers:
        raise ModelError(
            "the model does not say what its layers are", got=config.model_type, allowed="compile=false", knob="compile"
        )
    dynamo.recompile_limit = VARIANTS
    inductor.compile_threads = 1
    caches.cache_key_tag = f"itune-{width}"
    shapes.use_duck_shape = False  # a width that equals the hidden size by chance would be taken for it
    # Its documents' lengths are known only as it runs.
    ALL_ATTENTION_FUNCTIONS.register(BY_DOCUMENT, torch.compiler.disable(attend_by_document))
    for layer in layers:
        compiled: Any = torch.compile(layer.forward, dynamic=True, options={"fallback_random": True})
        layer.forward = compiled
