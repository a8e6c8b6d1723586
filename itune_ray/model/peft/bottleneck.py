"""Bottleneck adapters inside decoder layers: Houlsby's, Pfeiffer's and Compacter's.

h <- h + W_up f(W_down h) on what attention and MLP put out, before it joins the residual stream. W_up is zero at the
start, so the adapted model starts equal to its base; Compacter's is next to zero, see `CompacterAdapter`.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from transformers.modeling_utils import PreTrainedModel

from itune_ray.config.adaptation import Bottleneck, CompacterConfig, PfeifferConfig
from itune_ray.errors import ModelError
from itune_ray.model.peft.names import OWN_CONFIG

NAME = "bottleneck_adapter"
"""Of the submodule that attention and MLP get."""
SHARED_STD = 1e-4
"""Standard deviation of Compacter's A at the start, as published (adapter-hub's `phm_init_range`)."""


class BottleneckAdapter(nn.Module):
    """One dense bottleneck of width b over hidden size d: 2 d b + b + d parameters."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.down, self.up = nn.Linear(hidden, width), nn.Linear(width, hidden)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        """[..., d] -> [..., d], in the dtype of h."""
        return h + self.up(silu(self.down(h.to(self.down.weight.dtype)))).to(h.dtype)


class PhmLinear(nn.Module):
    """A linear map by parameterised hypercomplex multiplication: Wᵀ = Σ_i A_i ⊗ (s_i t_iᵀ) + bias.

    Shapes: A [n, n, n] (given at each call, as all layers share it), s [n, k/n, 1], t [n, 1, d/n] for k inputs and d
    outputs. At the start s_i and t_i are Glorot-uniform, each as a matrix of its own, and the bias is zero.
    """

    def __init__(self, terms: int, inputs: int, outputs: int):
        super().__init__()
        for size in (inputs, outputs):
            if size % terms:
                raise ModelError("a dimension is no multiple of Compacter's terms", got=size, knob="model.peft.terms")
        self.s = nn.Parameter(torch.empty(terms, inputs // terms, 1))
        self.t = nn.Parameter(torch.empty(terms, 1, outputs // terms))
        self.bias = nn.Parameter(torch.zeros(outputs))
        for factor, size in ((self.s, inputs), (self.t, outputs)):
            bound = math.sqrt(6 / (size // terms + 1))
            nn.init.uniform_(factor, -bound, bound)

    def matrix(self, shared: Tensor) -> Tensor:
        """[k, d]."""
        blocks = torch.einsum("nij,nkl->ikjl", shared, self.s @ self.t)
        return blocks.reshape(blocks.shape[0] * blocks.shape[1], -1)

    def forward(self, h: Tensor, shared: Tensor) -> Tensor:
        """[..., k] -> [..., d]."""
        return h @ self.matrix(shared) + self.bias


class CompacterAdapter(nn.Module):
    """A bottleneck of two PHM maps; its A is the same parameter in every adapter of the model.

    No map is zero at the start: A is drawn by N(0, (1e-4)²), so that h changes by less than fp32 shows. A zero t
    above such an A would leave both of them almost without a gradient.
    """

    def __init__(self, hidden: int, width: int, terms: int, shared: nn.Parameter):
        super().__init__()
        self.down = PhmLinear(terms, hidden, width)
        self.up = PhmLinear(terms, width, hidden)
        self.shared = shared

    def forward(self, h: Tensor) -> Tensor:
        """[..., d] -> [..., d], in the dtype of h."""
        x = h.to(self.shared.dtype)
        return h + self.up(gelu(self.down(x, self.shared)), self.shared).to(h.dtype)


def apply_bottlenecks(model: PreTrainedModel, config: Bottleneck) -> nn.Module:
    """Freeze the model and give its decoder layers adapters, in place."""
    model.requires_grad_(False)
    hidden = model.config.get_text_config().hidden_size
    width = hidden // config.reduction
    if width < 1:
        raise ModelError(
            "the bottleneck would have no width",
            got=config.reduction,
            allowed=f"at most the hidden size {hidden}",
            knob="model.peft.reduction",
        )
    terms = config.terms if isinstance(config, CompacterConfig) else 0
    shared = nn.Parameter(SHARED_STD * torch.randn(terms, terms, terms)) if terms else None
    for module in _adapted_modules(model, mlp_only=isinstance(config, PfeifferConfig)):
        device = next(module.parameters()).device
        made = BottleneckAdapter(hidden, width) if shared is None else CompacterAdapter(hidden, width, terms, shared)
        module.add_module(NAME, made.to(device))
        module.register_forward_hook(_adapted)
    setattr(model, OWN_CONFIG, config)
    return model


def _adapted(module: Any, _: Any, output: Any) -> Any:
    """The forward hook: attention puts out a tuple, hidden states first."""
    adapter = getattr(module, NAME)
    return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a model from the lowest to the highest, by the names of their classes that its family declares.

    Raises:
        ModelError: It declares none.
    """
    kinds = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ModelError("this family declares no decoder layers to adapt", got=model.config.model_type)
    return layers


def _adapted_modules(model: PreTrainedModel, mlp_only: bool) -> Iterator[nn.Module]:
    parts = ("mlp",) if mlp_only else ("self_attn", "mlp")
    for layer in decoder_layers(model):
        for part in parts:
            if not isinstance(getattr(layer, part, None), nn.Module):
                raise ModelError(f"this family's layers have no `{part}` to adapt", got=model.config.model_type)
            yield getattr(layer, part)
