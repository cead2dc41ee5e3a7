"""Attention whose result is in e4m3, by scales that are known before: each backend against float64."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import Tensor

from pab_kernels import ops
from tests.hopper_tools import EPS, draw, expected, int32, normed
from tests.ops.test_temporal_attention import Case
from tests.quantized_tools import interpret_e4m3

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
ON_CPU = ["reference", pytest.param("triton", marks=interpreted)]


@pytest.fixture(autouse=True)
def _e4m3(monkeypatch):
    if INTERPRETED:
        interpret_e4m3(monkeypatch)


def scales(v: Tensor, *along: int) -> Tensor:
    """Of values v [..., H, D], with dimensions `along` the tokens that see each other: the least that fit."""
    return (v.float().abs().amax((-1, -2)).amax(along, keepdim=True) / 448).expand(v.shape[:-2]).contiguous()


def check(y: Tensor, scale: Tensor, wanted: Tensor, slack: float = 2**-7) -> None:
    """e4m3 within its rounding; `slack`: weights and values of 16 bits before."""
    assert y.dtype == torch.float8_e4m3fn
    got = y.double() * scale.double()[..., None]
    step = scale.double()[..., None] * 2**-9
    assert not got.isnan().any()
    largest = wanted.abs().amax(-1, keepdim=True)
    assert ((got - wanted).abs() <= 2**-4 * wanted.abs() + step + slack * largest).all()
    assert ((got - wanted).norm() / wanted.norm()).item() < 0.035


def check_dense(device: str, backend: str | None, shape: tuple[int, ...], lengths: list[int] | None = None) -> None:
    batch, queries, keys, heads, head_dim = shape
    q, k, v = draw(batch, queries, keys, heads, head_dim, torch.bfloat16, device)
    wanted = expected(q, k, v, lengths)
    scale = scales(v, 1)[:, :1].expand(batch, queries).contiguous()
    y = ops.attention(
        q, k, v, kv_len=None if lengths is None else int32(lengths, device), out_scale=scale, backend=backend
    )
    check(y, scale, wanted)


@pytest.mark.parametrize("backend", [*ON_CPU, "sdpa"])
def test_attention(backend):
    check_dense("cpu", backend, (2, 37, 37, 3, 72))
    check_dense("cpu", backend, (2, 20, 70, 2, 96), [70, 13])


def test_attention_without_keys_or_with_one():
    """Zeros, and a value itself: the largest is 448 times the scale."""
    q, k, v = draw(2, 5, 3, 2, 72, torch.bfloat16, "cpu")
    scale = scales(v[:, :1], 1).expand(2, 5).contiguous()
    y = ops.attention(q, k, v, kv_len=int32([0, 1], "cpu"), out_scale=scale, backend="reference")
    assert (y[0].float() == 0).all()
    assert y[1].float().abs().max() == 448
    empty = ops.attention(q, k[:, :0], v[:, :0], out_scale=scale)
    assert empty.dtype == y.dtype
    assert (empty.float() == 0).all()


def check_self(device: str, head_dim: int, backend: str | None, tokens: int, heads: int) -> None:
    torch.manual_seed(head_dim + tokens)
    qkv = torch.randn(2, tokens, 3, heads, head_dim, device=device).bfloat16()
    weights = (1 + 0.2 * torch.randn(2, head_dim, device=device)).bfloat16()
    q, k, v = qkv.unbind(2)
    scale = scales(v, 1)
    wanted = expected(normed(q, weights[0]), normed(k, weights[1]), v)
    options = {"q_weight": weights[0], "k_weight": weights[1], "eps": EPS, "backend": backend}
    check(ops.self_attention(qkv, out_scale=scale, **options), scale, wanted, 2**-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", [*ON_CPU, "sdpa"])
def test_self_attention(backend):
    check_self("cpu", 72, backend, 33, 2)


def test_self_attention_in_fp8_finds_the_scales_itself():
    qkv = torch.randn(1, 40, 3, 2, 72).bfloat16()
    scale = torch.full((1, 40), float("nan"))
    y = ops.self_attention(qkv.clone(), precision="fp8", out_scale=scale, backend="reference")
    wanted = ops.self_attention(qkv, precision="fp8", backend="reference")
    check(y, scale, wanted.double())
    assert (y.float().abs().amax(-1) == 448).all()


def check_temporal(device: str, shape: tuple[int, ...], backend: str, **options: bool) -> None:
    case = Case.random(shape, torch.bfloat16, device, **options)
    scale = scales(case.qkv[:, :, :, 2], 1)
    out = torch.full(case.output_shape(), float("nan"), device=device).to(torch.float8_e4m3fn)
    y = case.run(backend, out_scale=scale, out=out)
    assert y is out
    check(y, scale, case.expected(), 2**-6)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("frames", [1, 15, 17])
def test_temporal(frames, backend):
    check_temporal("cpu", (2, frames, 3, 2, 72), backend, norm=True, rope=True)


def test_errors():
    q = torch.zeros(1, 8, 2, 8)
    qkv, scale = torch.zeros(1, 3, 4, 3, 2, 8), torch.ones(1, 3, 4)
    with pytest.raises(ValueError, match=r"out_scale: shape is \[1, 7\], must be \[1, 8\]"):
        ops.attention(q, q, q, out_scale=torch.ones(1, 7))
    with pytest.raises(TypeError, match=r"out_scale: is torch\.float64 of strides .* must be contiguous float32"):
        ops.attention(q, q, q, out_scale=torch.ones(1, 8).double())
    with pytest.raises(ValueError, match=r"out_scale: shape is \[1, 3\], must be \[1, 3, 4\]"):
        ops.temporal_attention(qkv, out_scale=torch.ones(1, 3))
    with pytest.raises(TypeError, match=r"out: is torch\.float32 on cpu, must be torch\.float8_e4m3fn on cpu"):
        ops.temporal_attention(qkv, out_scale=scale, out=torch.empty(1, 3, 4, 16))


def test_opcheck():
    utils = ("test_autograd_registration", "test_faketensor")
    q, scale = torch.randn(1, 5, 2, 8), torch.ones(1, 5)
    args = (q, q, q, None, 0.3, None, None, None, 0.0, None, None, 1, scale, "reference")
    torch.library.opcheck(torch.ops.pab.attention.default, args, test_utils=utils)


# On the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [72, 96, 128])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 129, 193, 1590])
def test_hopper(length, head_dim, hopper):
    check_dense(hopper, "cuda", (2, length, length, 3, head_dim))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [72, 96, 128])
def test_hopper_cross(head_dim, hopper):
    check_dense(hopper, "cuda", (3, 1000, 300, 16, head_dim), [300, 17, 129])
    check_dense(hopper, "triton", (3, 1000, 300, 16, head_dim), [300, 17, 129])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [72, 96, 128])
def test_hopper_norm(head_dim, hopper):
    check_self(hopper, head_dim, None, 700, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128])
@pytest.mark.parametrize("frames", [1, 15, 16, 17, 60, 128])
def test_temporal_on_a_gpu(frames, head_dim, hopper):
    for options in ({}, {"norm": True}, {"norm": True, "rope": True}):
        check_temporal(hopper, (2, frames, 7, 3, head_dim), "cuda", **options)


@pytest.mark.gpu
def test_temporal_triton(hopper):
    check_temporal(hopper, (2, 15, 7, 3, 72), "triton", norm=True, rope=True)
