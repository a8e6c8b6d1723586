"""bfloat16 training on CPUs, most of which multiply it slower than float32.

Only CPUs with AMX have units for products of bf16 matrices; others reach half of what they do in fp32 (81 against 155
GFLOP/s a thread with AVX-512 BF16). There, products are taken by fp32 units: between layers everything is rounded to
bf16 as under autocast, while fp32 master weights, their gradients and all sums are not rounded, so that a result is at
least as exact as by bf16 units. What lies between two products without leaving a layer, a norm or a gate, is not
rounded either, and takes few passes over memory: a third of a small model's step are such passes, not products.
"""

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation


@cache
def has_bf16_units() -> bool:
    """Whether this machine's CPU multiplies bf16 matrices in hardware."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products in dtype are faster by fp32 units: bf16 on a CPU without AMX."""
    return dtype == torch.bfloat16 and device.type == "cpu" and not has_bf16_units()


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What autocast makes of the tensor; its own dtype without."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


MMAP_THRESHOLD, TRIM_THRESHOLD = (-3, 2**25), (-1, 2**31 - 1)
"""Of glibc's `mallopt`: numbers of its settings, and the largest values that it takes."""


def keep_memory() -> None:
    """Let glibc's malloc keep what this process frees, instead of giving tensors back to the kernel after every use:
    a step of a 16M Llama faulted 400 MB in anew, 3 % of its time. Does nothing with another C library."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for setting in (MMAP_THRESHOLD, TRIM_THRESHOLD):
            libc.mallopt(*setting)


NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Qwen3MoeRMSNorm"})
"""Classes of transformers that compute w · x / rms(x)."""
MLPS = frozenset({"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "Qwen3MoeMLP"})
"""Classes of transformers that compute down(act(gate(x)) · up(x))."""
ATTENTIONS = frozenset(
    {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention", "Qwen3MoeAttention"},
)
"""Classes of transformers that compute o(attention(q(x), k(x), v(x)))."""


def install_wide_products(model: nn.Module) -> None:
    """Let every plain `nn.Linear` multiply by fp32 units where `wide` says so, and known norms, gates and attention
    between such products stay in fp32; install it after PEFT has wrapped."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_linear, module)
    for module in model.modules():
        name: Any = type(module).__name__
        layer: Any = module
        if name in NORMS:
            layer.forward = MethodType(_norm, layer)
        elif name in MLPS and isinstance(layer.act_fn, nn.SiLU | SiLUActivation):
            if _keep_unrounded((layer.gate_proj, layer.up_proj), layer.down_proj):
                layer.forward = MethodType(_gated, layer)
        elif name in ATTENTIONS:
            _keep_unrounded((layer.q_proj, layer.k_proj, layer.v_proj), layer.o_proj)


def _keep_unrounded(first: Sequence[nn.Module], last: nn.Module) -> bool:
    """Whether the layers, in PEFT's wrapping or not, are plain, and so pass on and read what they compute in fp32."""
    before, after = [_unwrapped(layer) for layer in first], _unwrapped(last)
    if any(type(layer) is not nn.Linear for layer in (*before, after)):
        return False
    for layer in before:
        layer.forward = MethodType(_linear_unrounded, layer)
    after.forward = MethodType(_linear_of_unrounded, after)
    return True


def _unwrapped(layer: Any) -> Any:
    return layer if type(layer) is nn.Linear else getattr(layer, "base_layer", layer)


def _linear(self: nn.Linear, hidden: Tensor) -> Tensor:
    dtype = compute_dtype(hidden)
    return _product(self, hidden, dtype, dtype, dtype)


def _linear_unrounded(self: nn.Linear, hidden: Tensor) -> Tensor:
    dtype = compute_dtype(hidden)
    return _product(self, hidden, dtype, dtype, torch.float32)


def _linear_of_unrounded(self: nn.Linear, hidden: Tensor) -> Tensor:
    dtype = compute_dtype(self.weight)
    return _product(self, hidden, dtype, torch.float32, dtype)


def _product(layer: nn.Linear, hidden: Tensor, dtype: torch.dtype, read: torch.dtype, written: torch.dtype) -> Tensor:
    """The layer in dtype; where that is done by fp32 units, its input and output are rounded to these dtypes."""
    if not wide(hidden.device, dtype):
        return nn.functional.linear(hidden, layer.weight, layer.bias)
    product: Any = _WideProduct.apply(hidden, layer.weight, read, written)
    return product if layer.bias is None else product + layer.bias.to(written)


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


class _WideProduct(torch.autograd.Function):
    """x Wᵀ of x [..., K], rounded to `read`, and W [N, K]: [..., N], rounded to `written`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, read: torch.dtype, written: torch.dtype) -> Tensor:
        ctx.dtype = hidden.dtype
        with torch.autocast("cpu", enabled=False):
            rounded = _rounded(hidden, read)
            ctx.save_for_backward(rounded, weight)
            return (_widened(rounded) @ weight.float().T).to(written)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        rounded, weight = ctx.saved_tensors
        grad_hidden = grad_weight = None
        with torch.autocast("cpu", enabled=False):
            grad = grads[0].float()
            if ctx.needs_input_grad[0]:
                grad_hidden = (grad @ weight.float()).to(ctx.dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = (grad.flatten(0, -2).T @ _widened(rounded).flatten(0, -2)).to(weight.dtype)
        return grad_hidden, grad_weight, None, None


class _Gate(torch.autograd.Function):
    """silu(g) · u, each [..., N]; silu(g) is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
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
        wide = hidden.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(wide.shape[-1])
        scale.add_(epsilon).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (wide * scale).mul_(weight).to(torch.promote_types(hidden.dtype, weight.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, weight, scale = ctx.saved_tensors
        grad_hidden = grad_weight = None
        normed = hidden.float() * scale
        along = grads[0] * normed
        if ctx.needs_input_grad[1]:
            grad_weight = along.flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            mean = along.mul_(weight).mean(-1, keepdim=True)
            grad_hidden = (grads[0] * weight).sub_(normed.mul_(mean)).mul_(scale).to(hidden.dtype)
        return grad_hidden, grad_weight, None


class _Cast:
    """A cast that, asked of the tensor that it did last, gives the same result: the projections of a layer read one
    input. Tensors are known by where they lie; the last one is kept, so that no other can come to lie there."""

    def __init__(self) -> None:
        self._last: tuple[object, Tensor, Tensor] | None = None

    def __call__(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if tensor.dtype == dtype:
            return tensor
        asked = (tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype, dtype)
        if self._last is None or self._last[0] != asked:
            self._last = asked, tensor.detach(), tensor.detach().to(dtype)
        return self._last[2]


_rounded, _to_wide = _Cast(), _Cast()


def _widened(tensor: Tensor) -> Tensor:
    return _to_wide(tensor, torch.float32)
