"""bfloat16 training on CPUs, many of which multiply it slower than float32.

CPUs with AMX have units for products of bf16 matrices, and AMD's with AVX-512 BF16 (480 against 110 GFLOP/s a thread);
others reach half of what they do in fp32, even some with AVX-512 BF16 (81 against 155). There, products are taken
by fp32 units: between layers everything is rounded to bf16 as under autocast, while fp32 master weights, their
gradients and all sums are not rounded, so that a result is at least as exact as by bf16 units.
"""

import ctypes
import sys
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


@cache
def has_amx() -> bool:
    """Whether this machine's CPU has units for products of bf16 tiles."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


@cache
def has_bf16_units() -> bool:
    """Whether this machine's CPU multiplies large bf16 matrices faster than fp32 ones."""
    found = torch.cpu.get_capabilities()
    return has_amx() or (bool(found.get("avx512_bf16", False)) and str(found.get("cpu_name", "")).startswith("AMD"))


def wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products in dtype are faster by fp32 units: bf16 on a CPU without units for it."""
    return dtype == torch.bfloat16 and device.type == "cpu" and not has_bf16_units()


SHORT = 256
"""Tokens of a document below which attention over it in bf16 is slower than in fp32 on a CPU without AMX, since the
kernel converts its blocks there."""


def attention_dtype(device: torch.device, dtype: torch.dtype, mean_length: float) -> torch.dtype:
    """What attention over documents of that mean length is computed in, where their projections are in dtype."""
    slow = dtype == torch.bfloat16 and device.type == "cpu" and not has_amx() and mean_length < SHORT
    return torch.float32 if slow or wide(device, dtype) else dtype


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What autocast makes of the tensor; its own dtype without."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
"""Numbers of settings of glibc's `mallopt`."""
KEPT_SIZES = (2**26 + 2**16, 2**25)
"""Bytes from which a tensor has a mapping of its own: more than the largest chunk of the head has, or 32 MiB where
glibc takes no more."""


def keep_memory() -> None:
    """Let glibc's malloc keep what this process frees, tensors up to 64 MiB, instead of giving them back to the kernel
    after every use: a step of a 16M Llama faulted 400 MB in anew, and more with two packed rows a pass. Other C
    libraries are left alone."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        any(libc.mallopt(M_MMAP_THRESHOLD, size) for size in KEPT_SIZES)  # the first that it takes
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def install_wide_products(model: nn.Module) -> None:
    """Let every plain `nn.Linear` multiply by fp32 units where `wide` says so; install it after PEFT has wrapped."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_linear, module)


def _linear(self: nn.Linear, hidden: Tensor) -> Tensor:
    dtype = compute_dtype(hidden)
    return product_in(self, hidden, dtype, dtype, dtype)


def product_in(layer: nn.Linear, hidden: Tensor, dtype: torch.dtype, read: torch.dtype, written: torch.dtype) -> Tensor:
    """The layer in dtype; where that is done by fp32 units, its input and output are rounded to these dtypes."""
    if not wide(hidden.device, dtype):
        return nn.functional.linear(hidden, layer.weight, layer.bias)
    product: Any = _WideProduct.apply(hidden, layer.weight, read, written)
    return product if layer.bias is None else product + layer.bias.to(written)


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
