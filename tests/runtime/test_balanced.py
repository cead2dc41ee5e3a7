"""MLPs in fp8, whose hidden features are scaled by a bound: what one large feature costs the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels import Fp8Linear, Linear, Mlp, ops
from pab_kernels.blocks.branches import mlp
from pab_kernels.blocks.linears import balancing_factors
from pab_kernels.ops import fp8_linear
from pab_kernels.ops.quantized import Quantized
from pab_kernels.ops.reference import dequantize_ref
from pab_kernels.runtime.precision import quantize_layer

CHANNELS = 128


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random_linear(features: int, channels: int = CHANNELS) -> Linear:
    weight = torch.randn(features, channels) * channels**-0.5
    return Linear(weight.bfloat16(), (torch.randn(features) * 0.1).bfloat16())


def in_fp8(weights: Mlp) -> tuple[Fp8Linear, Fp8Linear]:
    up, down = quantize_layer(weights).linears
    assert isinstance(up, Fp8Linear)
    assert isinstance(down, Fp8Linear)
    return up, down


def quantized(x: Tensor) -> Quantized:
    out = Quantized.empty((1, *x.shape), fp8_linear.E4M3, x.device)
    return ops.residual_norm_modulate(x[None], out=out).flatten()


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("large_input", [False, True], ids=["", "and one of x"])
@pytest.mark.parametrize("outlier", [8, 30])
def test_mlp_with_one_large_feature(outlier, large_input):
    """It does not cost the other features their digits: they are nearly as near as without it."""
    up, down = random_linear(4 * CHANNELS), random_linear(CHANNELS, 4 * CHANNELS)
    x = torch.randn(200, CHANNELS).bfloat16()
    if large_input:  # as trained models have it: what reads that channel is small, so the bound is a loose one
        x[:, 5] *= 300
        up.weight[:, 5] /= 300
    h = quantized(x)
    others = torch.arange(4 * CHANNELS) != 9

    def lost(part: Fp8Linear) -> float:
        """Of the other features, against float32 from the same rows and weights."""
        bounds: dict[str, Any] = {"weight_sum": part.weight_sum, "bias_max": part.bias_max}
        hidden = dequantize_ref(
            fp8_linear.scaled_linear_gelu(h, part.weight, part.bias, factors=part.factors, **bounds)
        )
        if part.factors is not None:
            hidden = hidden / part.factors
        wide = F.linear(dequantize_ref(h), dequantize_ref(part.weight), part.bias.float())
        return error(hidden[:, others], F.gelu(wide, approximate="tanh")[:, others])

    without = lost(Fp8Linear.of(up))
    up.weight[9] *= outlier
    assert lost(in_fp8(Mlp(up, down))[0]) < 1.1 * without
    if large_input and outlier == 30:
        assert lost(Fp8Linear.of(up)) > 1.3 * without, "the weights are no test"


def test_the_result_is_that_of_the_weights():
    weights = Mlp(random_linear(4 * CHANNELS), random_linear(CHANNELS, 4 * CHANNELS))
    weights.up.weight[9] *= 30  # type: ignore[index]
    x = torch.randn(50, CHANNELS).bfloat16()
    up, down = in_fp8(weights)
    got = mlp(quantized(x), Mlp(up, down), torch.full((50, CHANNELS), float("nan")).bfloat16())
    wanted = mlp(x, weights, torch.empty(50, CHANNELS).bfloat16())
    assert error(got, wanted) < 0.08


@pytest.mark.parametrize("outlier", [1, 1e4])
@pytest.mark.parametrize("bias", [0, 1])
@pytest.mark.parametrize("share", [0.4, 0.6, 1])
def test_weights_that_are_zero(share, bias, outlier):
    """Pruned features say nothing of the others, also where they are most of them, or all."""
    weights = Mlp(random_linear(4 * CHANNELS), random_linear(CHANNELS, 4 * CHANNELS))
    weights.up.weight[: int(share * 4 * CHANNELS)] = 0  # type: ignore[index]
    weights.up.weight[-1] *= outlier  # type: ignore[index]
    weights.up.bias.mul_(bias)
    weights.down.weight[:, 7] = 0  # type: ignore[index]
    x = torch.randn(50, CHANNELS).bfloat16()
    got = mlp(quantized(x), Mlp(*in_fp8(weights)), torch.full((50, CHANNELS), float("nan")).bfloat16())
    wanted = mlp(x, weights, torch.empty(50, CHANNELS).bfloat16())
    assert (got.double() - wanted.double()).norm() < 0.1 * wanted.double().norm() + 1e-6


def test_factors():
    """Powers of two: apart from fp8 nothing is rounded, and where no feature stands out they are 1."""
    weight = torch.randn(4 * CHANNELS, CHANNELS)
    assert (balancing_factors(weight) == 1).all()
    weight[3] *= 17
    factors = balancing_factors(weight)
    assert factors[3] == 1 / 16
    assert (factors == 1).sum() == len(factors) - 1
    assert torch.equal(balancing_factors(torch.zeros(4, 8)), torch.ones(4))
    weight[:300] = 0
    assert (balancing_factors(weight) == 1).all()
