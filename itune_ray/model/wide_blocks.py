"""What lies between the products of a layer, on CPUs where those are taken by fp32 units (`itune_ray.model.cpu`).

A third of a small model's step are passes over memory beside its products. Here a norm or a gate is one function, and
neither it nor attention by document rounds what a product has made and a product will read.
"""

from collections.abc import Sequence
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

from itune_ray.model.cpu import compute_dtype, product_in, wide
from itune_ray.model.documents import BY_DOCUMENT

NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Qwen3MoeRMSNorm"})
"""Classes of transformers that compute w · x / rms(x)."""
MLPS = frozenset({"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "Qwen3MoeMLP"})
"""Classes of transformers that compute down(act(gate(x)) · up(x))."""
ATTENTIONS = frozenset(
    {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention", "Qwen3MoeAttention"},
)
"""Classes of transformers that compute o(attention(q(x), k(x), v(x)))."""


def install_wide_blocks(model: nn.Module) -> None:
    """Let known norms, SwiGLU gates and attention by document stay in fp32 between products by fp32 units, which are
    installed before. Only for a model that nothing wraps: adapters expect projections in their input's dtype."""
    for module in model.modules():
        name, layer = type(module).__name__, cast(Any, module)
        if name in NORMS:
            layer.forward = MethodType(_norm, layer)
        elif name in MLPS and isinstance(layer.act_fn, nn.SiLU | SiLUActivation):
            if _keep_unrounded((layer.gate_proj, layer.up_proj), layer.down_proj):
                layer.forward = MethodType(_gated, layer)
        elif name in ATTENTIONS and layer.config._attn_implementation == BY_DOCUMENT:
            layer.unrounded = _keep_unrounded((layer.q_proj, layer.k_proj, layer.v_proj), layer.o_proj)


def _keep_unrounded(first: Sequence[nn.Module], last: nn.Module) -> bool:
    """Whether the layers are plain, and so pass on what they compute, and read it, without rounding."""
    if any(type(layer) is not nn.Linear for layer in (*first, last)):
        return False
    for layer in first:
        layer.forward = MethodType(_linear_unrounded, layer)
    last.forward = MethodType(_linear_of_unrounded, last)
    return True


def _linear_unrounded(self: nn.Linear, hidden: Tensor) -> Tensor:
    dtype = compute_dtype(hidden)
    return product_in(self, hidden, dtype, dtype, torch.float32)


def _linear_of_unrounded(self: nn.Linear, hidden: Tensor) -> Tensor:
    dtype = compute_dtype(self.weight)
    return product_in(self, hidden, dtype, torch.float32, dtype)


def _norm(self: Any, hidden: Tensor) -> Tensor:
    if not wide(hidden.device, compute_dtype(hidden)):
        return type(self).forward(self, hidden)
    normed: Any = _ScalingNorm.apply(hidden, self.weight, self.variance_epsilon)
    return normed


def _gated(self: Any, hidden: Tensor) -> Tensor:
    if not wide(hidden.device, compute_dtype(hidden)):
        return type(self).forward(self, hidden)
    gated: Any = _Gate.apply(self.gate_proj(hidden), self.up_proj(hidden))
    return self.down_proj(gated)


class _Gate(torch.autograd.Function):
    """silu(g) · u, each [..., N]; silu(g) is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        grad_gate = grads[0] * up
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, nn.functional.silu(gate).mul_(grads[0])


class _ScalingNorm(torch.autograd.Function):
    """y = w · x̂, with x̂ = r · x and r = (mean(x²) + ε)^-½ over the last of the dimensions of x [..., H]:

    dx = r (w·dy - x̂ mean(w·dy·x̂)),  dw = Σ dy·x̂
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        read = hidden.float()
        scale = torch.linalg.vector_norm(read, dim=-1, keepdim=True).square_().div_(read.shape[-1])
        scale.add_(epsilon).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (read * scale).mul_(weight).to(torch.promote_types(hidden.dtype, weight.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, weight, scale = ctx.saved_tensors
        grad_hidden = grad_weight = None
        normed = hidden.float() * scale
        along = grads[0] * normed
        if ctx.needs_input_grad[1]:
            grad_weight = along.flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            mean = along.mul_(weight).mean(-1, keepdim=True)
            grad_hidden = (grads[0].float() * weight).sub_(normed.mul_(mean)).mul_(scale).to(hidden.dtype)
        return grad_hidden, grad_weight, None
