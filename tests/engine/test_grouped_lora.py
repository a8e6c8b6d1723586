"""The grouped operators against vLLM's own, which gather weights per token."""

import pytest
import torch

from itune_ray.engine import grouped_lora

T, K, R, D, SLOTS = 37, 24, 5, 40, 3


def tensors(seed: int = 0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    a, b = torch.randn(SLOTS, 1, R, K), torch.randn(SLOTS, 1, D, R)
    return torch.randn(T, K), torch.randn(T, R), a, b, torch.randn(T, D + 3)


@pytest.mark.parametrize("adapters", [torch.arange(T) % SLOTS, torch.full((T,), 1)], ids=["mixed", "one"])
def test_every_operator_equals_vllms(adapters):
    pytest.importorskip("vllm")
    from vllm.lora.ops.torch_ops import lora_ops as theirs

    x, h, a, b, y = tensors()
    got, wanted = torch.zeros(T, R + 2), torch.zeros(T, R + 2)
    grouped_lora.shrink(x, a, got, adapters, 0.5)
    theirs.bgmv_shrink(x, a, wanted, adapters, 0.5)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    for add in (True, False):
        got, wanted = y.clone(), y.clone()
        grouped_lora.expand(h, b, got, adapters, add)
        theirs.bgmv_expand(h, b, wanted, adapters, add)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        got, wanted = y.clone(), y.clone()
        grouped_lora.expand_slice(h, b, got, adapters, 2, D, add)
        theirs.bgmv_expand_slice(h, b, wanted, adapters, 2, D, add)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_row_without_adapter_is_left_alone():
    _, h, _, b, y = tensors()
    adapters = torch.full((T,), 2)
    adapters[::2] = -1
    got = y.clone()
    grouped_lora.expand(h, b, got, adapters)
    assert torch.equal(got[::2], y[::2])
    assert not torch.equal(got[1::2], y[1::2])
