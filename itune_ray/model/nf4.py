"""Linear layers whose frozen weight is held in 4 bits: NF4 with double quantisation (Dettmers et al. 2023), in plain
torch.

A block of 64 weights is divided by its largest magnitude and each rounded to the nearest of 16 quantiles of a normal
distribution. The magnitudes, less their mean, are rounded to 8 bits in blocks of 256 (linearly; the paper's are 8-bit
floats). A weight takes 4 + 8/64 + 32/(64 · 256) = 4.127 bits.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 16 values: quantiles of N(0, 1) in equal steps on either side of an exact 0, divided by the largest."""
BLOCK = 64
SCALE_BLOCK = 256


class Nf4(NamedTuple):
    """A tensor in 4 bits."""

    codes: Tensor
    """[⌈n/64⌉ · 32] uint8, two codes each, the first in the high half."""
    scales: Tensor
    """[⌈n/64⌉] int8: a block's magnitude less `mean`, in units of its `units`."""
    units: Tensor
    """[⌈n/64/256⌉] fp32."""
    mean: Tensor
    """fp32, of all magnitudes."""


def quantise(weight: Tensor) -> Nf4:
    """Round a tensor to NF4; a block of zeros stays zero up to the rounding of its magnitude."""
    blocks = _blocks(weight.detach().float().flatten(), BLOCK)
    magnitudes = blocks.abs().amax(1)
    levels = torch.tensor(NF4, device=weight.device)
    unit = blocks / magnitudes.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).flatten()
    mean = magnitudes.mean()
    groups = _blocks(magnitudes - mean, SCALE_BLOCK)
    units = groups.abs().amax(1) / 127
    steps = (groups / units.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8)
    return Nf4(codes[0::2] << 4 | codes[1::2], steps.flatten()[: len(magnitudes)].clone(), units, mean)


def dequantise(packed: Nf4, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """The rounded tensor."""
    codes = torch.stack([packed.codes >> 4, packed.codes & 15], dim=1).flatten().long()
    groups = _blocks(packed.scales.float(), SCALE_BLOCK) * packed.units[:, None]
    magnitudes = groups.flatten()[: len(packed.scales)] + packed.mean
    levels = torch.tensor(NF4, device=codes.device)
    values = levels[codes].view(-1, BLOCK) * magnitudes[:, None]
    return values.flatten()[: torch.Size(shape).numel()].view(shape).to(dtype)


def _blocks(flat: Tensor, size: int) -> Tensor:
    """[⌈n/size⌉, size], filled up with zeros."""
    return nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)


class Nf4Linear(nn.Linear):
    """A frozen linear layer in 4 bits; gradients reach its input, not its weight.

    `weight` is made anew at each access. The buffers are not persistent: a checkpoint of training holds no base.
    """

    def __init__(self, source: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = source.in_features, source.out_features
        self.compute_dtype = source.weight.dtype
        for name, tensor in quantise(source.weight)._asdict().items():
            self.register_buffer(f"nf4_{name}", tensor, persistent=False)
        self.bias = source.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The rounded weight [d, k], without a gradient."""
        packed = Nf4(*(getattr(self, f"nf4_{name}") for name in Nf4._fields))
        return dequantise(packed, (self.out_features, self.in_features), self.compute_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """x Wᵀ + b, W made for this call and made again in its backward pass."""
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        out = _FrozenProduct.apply(input, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def plain(self) -> nn.Linear:
        """The same layer with its rounded weight in fp32."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.weight.float(), requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().float(), requires_grad=False)
        return layer


class _FrozenProduct(torch.autograd.Function):
    """x Wᵀ that keeps neither x nor W for its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Nf4Linear) -> Tensor:
        ctx.layer = layer
        return linear(x, layer.weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] @ ctx.layer.weight.to(grads[0].dtype), None


def quantise_linear_layers(model: nn.Module, keep: nn.Module | None) -> None:
    """Put every linear layer but `keep`, the head, into 4 bits, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child is not keep:
                setattr(module, name, Nf4Linear(child))
