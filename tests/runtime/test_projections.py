"""Projections after self-attention in fp8: what attention gives has a scale that is known before."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from pab_kernels import Fp8Linear, Linear, SelfAttention, ops
from pab_kernels.blocks import branches
from pab_kernels.blocks.branches import value_scales
from pab_kernels.ops import fp8_linear
from pab_kernels.ops.quantized import Quantized
from pab_kernels.runtime.precision import quantize_layer, replaced

HEADS, CHANNELS = 4, 128
SHAPE = (2, 6, 20, CHANNELS)
SEQUENCES: list[Any] = ["spatial", "temporal", "full"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random_linear(features: int, channels: int = CHANNELS) -> Linear:
    weight = torch.randn(features, channels) * channels**-0.5
    return Linear(weight.bfloat16(), (torch.randn(features) * 0.1).bfloat16())


def self_weights(sequence: Any) -> Any:
    return SelfAttention(random_linear(3 * CHANNELS), random_linear(CHANNELS), HEADS, sequence)


def quantized(x: Tensor) -> Quantized:
    rows = x.flatten(1, -2)
    out = Quantized.empty(tuple(rows.shape), fp8_linear.E4M3, x.device)
    return ops.residual_norm_modulate(rows, out=out).view(*x.shape)


def wide(weights: Any) -> Any:
    """The weights in float32."""
    parts = {name: Linear(x.weight.float(), x.bias.float()) for name, x in vars(weights).items() if type(x) is Linear}
    return replaced(weights, parts)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def run(x: Any, weights: SelfAttention, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return branches.self_attention(x, weights, torch.full(SHAPE, float("nan"), dtype=dtype))


@pytest.mark.parametrize("outlier", [None, 30.0], ids=str)
@pytest.mark.parametrize("sequence", SEQUENCES)
def test_projection_of_self_attention(sequence, outlier):
    """Its rounding adds little to that of the QKV linear, and the bound nothing to that of exact scales."""
    x, weights = torch.randn(SHAPE).bfloat16(), self_weights(sequence)
    if outlier is not None:
        weights.qkv.weight[-3] *= outlier  # of a value
    small = quantize_layer(weights)
    assert isinstance(small, SelfAttention)
    assert isinstance(small.proj, Fp8Linear)
    expected = run(x.float(), wide(weights), torch.float32)
    h = quantized(x)
    without = run(h, dataclasses.replace(weights, qkv=Fp8Linear.of(weights.qkv)))
    exact = run(h, dataclasses.replace(small, proj=wide_again(small.proj)))
    result = run(h, small)
    assert error(result, expected) < 1.35 * error(without, expected)
    assert error(result, exact) < 0.04, "more than rounding the input once"


def wide_again(linear: Fp8Linear) -> Linear:
    weight = linear.weight.values.float() * linear.weight.row_scale[:, None]
    return Linear(weight.to(linear.bias.dtype), linear.bias)


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_the_bound_is_reached_and_not_passed(sequence):
    """Weights and rows of one sign: then a value is as large as it may be, and so is what attention gives."""
    weights = self_weights(sequence)
    weights.qkv.weight.fill_(1.0)
    weights.qkv.bias.fill_(0.5)
    weights.proj.weight.copy_(torch.eye(CHANNELS))
    x = torch.full(SHAPE, 3.0).bfloat16()
    small = quantize_layer(weights)
    assert isinstance(small, SelfAttention)
    largest = 3 * CHANNELS + 0.5
    torch.testing.assert_close(448 * value_scales(quantized(x), small), torch.full(SHAPE[:3], largest))
    torch.testing.assert_close(run(quantized(x), small), torch.full(SHAPE, largest).bfloat16() + weights.proj.bias)


def test_scales_are_those_of_a_sequence():
    x = torch.randn(SHAPE).bfloat16()
    x[1, 2, 7] *= 50
    h = quantized(x)
    for sequence, along in zip(SEQUENCES, ((2,), (1,), (1, 2)), strict=True):
        small = quantize_layer(self_weights(sequence))
        assert isinstance(small, SelfAttention)
        assert isinstance(small.qkv, Fp8Linear)
        scales = value_scales(h, small)
        wanted = h.row_scale.amax(along, keepdim=True) * small.qkv.weight_sum + small.qkv.bias_max / 448
        torch.testing.assert_close(scales, wanted.expand(SHAPE[:3]))
        assert scales.is_contiguous()
        values = branches.linear(h, small.qkv)[..., -CHANNELS:].float().abs().amax(-1)
        assert (values <= 448 * scales).all()


def test_rows_of_other_ranks_are_not_bounded(monkeypatch):
    """Then attention is in bfloat16, and a pass after it finds the scales."""
    monkeypatch.setattr(branches, "value_scales", None)

    class Alone:
        """One rank, which exchanges with none."""

        def around(self, shape, split, width, like, project, attend, finish):
            everything = slice(None), slice(None)
            qkv = project(everything, None)
            assert qkv.shape == torch.Size(shape)
            finish(everything, attend(qkv, None))

    x, weights = torch.randn(SHAPE).bfloat16(), self_weights("temporal")
    out = torch.full(SHAPE, float("nan")).bfloat16()
    shards: Any = Alone()
    small: Any = quantize_layer(weights)
    result = branches.self_attention(quantized(x), small, out, shards=shards)
    assert error(result, run(x, weights)) < 0.08


def test_errors():
    part = random_linear(CHANNELS)
    with pytest.raises(TypeError, match="proj: is Fp8Linear, must be Linear where qkv is Linear"):
        SelfAttention(random_linear(3 * CHANNELS), Fp8Linear.of(part), HEADS, "spatial")
    with pytest.raises(TypeError, match="h: got Tensor, must be Quantized for a projection in fp8"):
        run(torch.randn(SHAPE).bfloat16(), quantize_layer(self_weights("spatial")))  # type: ignore[arg-type]
