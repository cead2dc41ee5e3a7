"""Linears in fp8 whose input has scales from bounds: what a layer loses by them, and where one channel is large."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from pab_kernels import CrossAttention, Fp8Linear, Linear, Mlp, SelfAttention, ops, text_kv
from pab_kernels.blocks import branches
from pab_kernels.blocks.branches import TextKV, value_scales
from pab_kernels.blocks.linears import balancing_factors
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


def self_weights(sequence: Any) -> SelfAttention:
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


@pytest.mark.parametrize("picture", [False, True], ids=["text", "text and picture"])
def test_projection_of_cross_attention(picture):
    image = branches.ImageKV(random_linear(2 * CHANNELS)) if picture else None
    parts = [random_linear(size) for size in (CHANNELS, 2 * CHANNELS, CHANNELS)]
    weights = CrossAttention(*parts, HEADS, image=image)
    x, source = torch.randn(SHAPE).bfloat16(), torch.randn(2, 9, CHANNELS).bfloat16()
    kv_len = torch.tensor([4, 9], dtype=torch.int32)
    text = text_kv(source, weights, kv_len, image=torch.randn(2, 5, CHANNELS).bfloat16() if picture else None)
    widened = TextKV(text.kv.float(), kv_len, None if text.image is None else text.image.float())

    def result(x: Any, weights: CrossAttention, text: TextKV) -> Tensor:
        return branches.cross_attention(x, weights, text, torch.full(SHAPE, float("nan")).to(text.kv.dtype))

    expected = result(x.float(), wide(weights), widened)
    small = quantize_layer(weights)
    assert isinstance(small, CrossAttention)
    for given in (text, TextKV(text.kv, kv_len, text.image)):  # with its scale, and without
        assert error(result(quantized(x), small, given), expected) < 0.06


def test_scale_of_a_text():
    """Of the values that count; a second text goes where a captured graph reads the first."""
    weights = CrossAttention(*(random_linear(size) for size in (CHANNELS, 2 * CHANNELS, CHANNELS)), HEADS)
    kv_len = torch.tensor([3, 0], dtype=torch.int32)
    text = text_kv(torch.randn(2, 7, CHANNELS).bfloat16(), weights, kv_len)
    assert text.scale is not None
    assert text.scale[0] == text.kv[0, :3, 1].float().abs().max() / 448
    assert 0 < text.scale[1] < 1e-30
    place, before = text.scale.data_ptr(), text.scale.clone()
    again = text_kv(torch.randn(2, 7, CHANNELS).bfloat16() * 3, weights, kv_len, text)
    assert again.scale is not None
    assert again.scale.data_ptr() == place
    assert again.scale[0] > before[0]
    part = again.sequences(slice(1, 2)).scale
    assert part is not None
    assert part.data_ptr() == place + 4


@pytest.mark.parametrize("large_input", [False, True], ids=["", "and one of x"])
@pytest.mark.parametrize("outlier", [8, 30])
def test_mlp_with_one_large_feature(outlier, large_input):
    """It does not cost the other features their digits: they are as near as without it."""
    up, down = random_linear(4 * CHANNELS), random_linear(CHANNELS, 4 * CHANNELS)
    x = torch.randn(200, CHANNELS).bfloat16()
    if large_input:  # as trained models have it: what reads that channel is small, so the bound is a loose one
        x[:, 5] *= 300
        up.weight[:, 5] /= 300
    h = quantized(x[None]).flatten()
    others = torch.arange(4 * CHANNELS) != 9

    def lost(balanced: bool) -> float:
        """Of the other features, against float32 from the same rows and weights."""
        part = quantize_layer(Mlp(up, down)).linears[0] if balanced else Fp8Linear.of(up)
        assert isinstance(part, Fp8Linear)
        bounds = {"weight_sum": part.weight_sum, "bias_max": part.bias_max}
        hidden = fp8_linear.scaled_linear_gelu(h, part.weight, part.bias, factors=part.factors, **bounds)
        got = hidden.values.float() * hidden.row_scale[:, None]
        if part.factors is not None:
            got = got / part.factors
        rows = h.values.float() * h.row_scale[:, None]
        wanted = torch.nn.functional.gelu(branches.linear(rows, wide_float(part)), approximate="tanh")
        return error(got[:, others], wanted[:, others])

    without = lost(False)
    up.weight[9] *= outlier
    assert lost(True) < 1.1 * without
    if large_input and outlier == 30:
        assert lost(False) > 1.3 * without, "the weights are no test"


def wide_float(linear: Fp8Linear) -> Linear:
    return Linear(linear.weight.values.float() * linear.weight.row_scale[:, None], linear.bias.float())


def test_balanced_weights_are_the_same_function():
    """Factors are powers of two: apart from fp8 nothing is rounded, and where no feature stands out they are 1."""
    weights = Mlp(random_linear(4 * CHANNELS), random_linear(CHANNELS, 4 * CHANNELS))
    assert (balancing_factors(weights.up.weight) == 1).all()  # type: ignore[arg-type]
    weights.up.weight[3] *= 17  # type: ignore[index, operator]
    factors = balancing_factors(weights.up.weight)  # type: ignore[arg-type]
    assert factors[3] == 1 / 16
    assert (factors == 1).sum() == len(factors) - 1
    assert torch.equal(balancing_factors(torch.zeros(4, 8)), torch.ones(4))
    down = quantize_layer(weights).linears[1]
    assert isinstance(down, Fp8Linear)
    scaled = weights.down.weight.float() / factors  # type: ignore[union-attr]
    assert error(down.weight.values.float() * down.weight.row_scale[:, None], scaled) < 0.04


def test_errors():
    part = random_linear(CHANNELS)
    with pytest.raises(TypeError, match="proj: is Fp8Linear, must be Linear where qkv is Linear"):
        SelfAttention(random_linear(3 * CHANNELS), Fp8Linear.of(part), HEADS, "spatial")
    with pytest.raises(TypeError, match="h: got Tensor, must be Quantized for a projection in fp8"):
        run(torch.randn(SHAPE).bfloat16(), quantize_layer(self_weights("spatial")))  # type: ignore[arg-type]
