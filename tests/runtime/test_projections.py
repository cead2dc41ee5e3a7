"""Projections after self-attention in fp8: what attention gives has a scale that is known before."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from pab_kernels import Fp8Linear, Linear, SelfAttention, ops
from pab_kernels.blocks import sharded
from pab_kernels.blocks.linears import linear
from pab_kernels.blocks.self_attention import self_attention, value_scales
from pab_kernels.blocks.sharded import Shards
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
    return self_attention(x, weights, torch.full(SHAPE, float("nan"), dtype=dtype))


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
        values = linear(h, small.qkv)[..., -CHANNELS:].float().abs().amax(-1)
        assert (values <= 448 * scales).all()


class Together:
    """Exchanges between ranks that are threads of this process."""

    apart = True

    def __init__(self, rank: int, count: int, barrier: threading.Barrier, given: dict[Any, Tensor]) -> None:
        self.rank, self.count, self.barrier, self.given = rank, count, barrier, given
        self.sent: list[int] = []

    def buffer(self, *_: Any) -> None:
        return None

    def begin(self, name, x, give, take, out=None, *, dense=False):
        x, dtype = x.view(torch.uint8) if x.element_size() == 1 else x, x.dtype
        self.given[self.rank] = x
        self.sent.append(x.nbytes // x.shape[give.dim] * (sum(give.sizes) - give.sizes[self.rank]))
        self.barrier.wait()
        parts = [
            self.given[rank].narrow(give.dim, give.starts[self.rank], give.sizes[self.rank])
            for rank in range(self.count)
        ]
        found = torch.cat(parts, take.dim)
        self.barrier.wait()
        if out is None:
            return lambda: found.view(dtype)
        for start, part in zip(take.starts, parts, strict=True):
            out.narrow(take.dim, start, part.shape[take.dim]).copy_(part)
        return lambda: out


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sequence", SEQUENCES[1:])
def test_ranks_take_the_scales_of_one(sequence, batch, pieces, monkeypatch):
    """Of temporal attention: the largest row may be another rank's, and the result goes back in e4m3.

    Of full attention a pass finds the exact ones afterwards.
    """
    monkeypatch.setattr(sharded, "PIECE", 1 if pieces else 2**30)
    x = torch.randn(batch, *SHAPE[1:]).bfloat16()
    x[0, 5, 7] *= 50
    small = quantize_layer(self_weights(sequence))
    assert isinstance(small, SelfAttention)
    expected = self_attention(quantized(x), small, torch.empty_like(x))
    sizes, barrier = (4, 2), threading.Barrier(2, timeout=60)
    given: dict[Any, Tensor] = {}
    exchanges = [Together(rank, 2, barrier, given) for rank in range(2)]
    h = quantized(x)

    def rank(number: int) -> Tensor:
        shards, own = Shards(sizes, number, exchanges[number]), slice(0, 4) if number == 0 else slice(4, 6)
        part = Quantized(h.values[:, own].contiguous(), h.row_scale[:, own].contiguous())
        out = torch.full_like(x[:, own], float("nan"))
        result = self_attention(part, small, out, shards=shards)
        assert result is out
        assert list(small.sent((batch, own.stop - own.start, *SHAPE[2:]), shards, 2)) == exchanges[number].sent
        return out

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(rank, range(2)))
    assert error(torch.cat(found, 1), expected) < (1e-3 if sequence == "temporal" else 4e-2)


def test_errors():
    part = random_linear(CHANNELS)
    with pytest.raises(TypeError, match="proj: is Fp8Linear, must be Linear where qkv is Linear"):
        SelfAttention(random_linear(3 * CHANNELS), Fp8Linear.of(part), HEADS, "spatial")
    with pytest.raises(TypeError, match="h: got Tensor, must be Quantized for a projection in fp8"):
        run(torch.randn(SHAPE).bfloat16(), quantize_layer(self_weights("spatial")))  # type: ignore[arg-type]
