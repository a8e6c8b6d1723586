import math

import pytest
import torch
from scipy.stats import norm
from torch import nn

from itune_ray.model.nf4 import BLOCK, NF4, Nf4Linear, dequantise, quantise, quantise_linear_layers


def test_the_codebook_is_its_closed_form():
    """8 positive and 7 negative quantiles of N(0, 1) up to 0.9677083, an exact 0, divided by the largest."""
    offset = 0.9677083
    positive = [norm.ppf(offset + (0.5 - offset) * i / 8) for i in range(8)]
    negative = [-norm.ppf(offset + (0.5 - offset) * i / 7) for i in range(7)]
    values = sorted([*positive, 0.0, *negative])
    assert [v / max(values) for v in values] == pytest.approx(list(NF4), abs=1e-6)


def test_the_round_trip_of_a_normal_weight_has_the_known_error():
    torch.manual_seed(0)
    weight = torch.randn(256, 512)
    again = dequantise(quantise(weight), (256, 512))
    assert float((again - weight).norm() / weight.norm()) == pytest.approx(0.092, abs=0.003)


def test_codes_and_scales_take_4_127_bits():
    packed = quantise(torch.randn(1024, 1024))
    bits = 8 * sum(t.numel() * t.element_size() for t in packed) / 1024**2
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)


def test_values_of_the_codebook_survive_where_all_magnitudes_are_equal():
    weight = torch.tensor(NF4).repeat(8, BLOCK // 16 * 2)
    torch.testing.assert_close(dequantise(quantise(weight), tuple(weight.shape)), weight, rtol=0, atol=1e-7)


def test_the_second_quantisation_moves_a_magnitude_by_half_a_step_at_most():
    torch.manual_seed(1)
    weight = torch.randn(300, 77) * torch.rand(300, 1)
    packed = quantise(weight)
    blocks = nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    units = packed.units.repeat_interleave(256)[: len(blocks)]
    restored = packed.scales.float() * units + packed.mean
    assert bool(((restored - blocks.abs().amax(1)).abs() <= units / 2 + 1e-6).all())


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 1), (65, 63)])
def test_sizes_that_fill_no_block_and_zeros(shape):
    weight = torch.randn(shape)
    assert dequantise(quantise(weight), shape).shape == shape
    assert torch.equal(dequantise(quantise(torch.zeros(shape)), shape), torch.zeros(shape))


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_computes_with_its_rounded_weight_and_passes_gradients_to_its_input(bias):
    torch.manual_seed(0)
    source = nn.Linear(48, 40, bias=bias)
    layer = Nf4Linear(source)
    x = torch.randn(7, 48, requires_grad=True)
    plain = layer.plain()
    torch.testing.assert_close(layer(x), plain(x))
    (mine,) = torch.autograd.grad(layer(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(plain(x).square().sum(), x)
    torch.testing.assert_close(mine, theirs)
    assert not torch.equal(plain.weight, source.weight)
    assert isinstance(layer, nn.Linear)


def test_weights_stay_what_they_are_however_often_they_are_used():
    """A kernel that repacks weights in place would dequantise to garbage afterwards."""
    layer = Nf4Linear(nn.Linear(64, 64))
    before = layer.weight.clone()
    with torch.no_grad():
        layer.eval()(torch.randn(2, 64))
        layer(torch.randn(2, 64).bfloat16())
    assert torch.equal(layer.weight, before)
    assert not layer.state_dict().keys() - {"bias"}


def test_every_linear_layer_but_the_head_is_rounded():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.Linear(4, 8))
    quantise_linear_layers(model, keep=model[2])
    assert [type(m).__name__ for m in model] == ["Nf4Linear", "Sequential", "Linear"]
    assert isinstance(model[1][0], Nf4Linear)
    assert math.isfinite(model(torch.randn(2, 4)).sum().item())
