"""Ops on planes: convolutions, GroupNorm with SiLU, linear upsampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels.ops.planes import (
    channel_sums,
    conv_planes,
    from_planes,
    group_norm_silu,
    grow_planes,
    pack_upsampled,
    pack_weight,
    softmax_rows,
    to_planes,
)
from pab_kernels.triton_ops import conv_planes as kernels

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
ON_CPU = [("reference", "cpu", torch.float32)]
if kernels.INTERPRETED:
    ON_CPU.append(("triton", "cpu", torch.float32))
ON_GPU = [
    pytest.param(backend, "cuda", torch.bfloat16, marks=[pytest.mark.gpu, needs_gpu])
    for backend in ("triton", "cudnn", "reference")
]
# bfloat16 rounds the result once, and the residual sum with it.
TOLERANCE = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (2e-2, 1e-2)}


def close(planes: Tensor, expected: Tensor) -> None:
    """Planes are the video `expected` [C, T, H, W] in float64, and zeros where they must be."""
    atol, rtol = TOLERANCE[planes.dtype]
    torch.testing.assert_close(from_planes(planes).double(), expected, atol=atol, rtol=rtol)
    assert (planes[:, -1] == 0).all()
    assert (planes[:, :, -1] == 0).all()


def draw(*shape: int, device: str, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(device, dtype)


def padded(video: Tensor, taps: int, front: str) -> Tensor:
    """[1, C, T, H, W] in float64 with what stands before the first frame."""
    before = video[:, :, :1].expand(-1, -1, taps - 1, -1, -1)
    return torch.cat((before if front == "first" else torch.zeros_like(before), video), 2)


# frames, height, width, channels, features, taps in time, side
SHAPES = [(3, 5, 7, 16, 32, 3, 3), (2, 9, 13, 32, 3, 1, 3), (1, 4, 4, 48, 16, 3, 1), (5, 1, 2, 16, 130, 3, 3)]


@pytest.mark.parametrize("front", ["zeros", "first"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "device", "dtype"), [*ON_CPU, *ON_GPU])
def test_conv_planes(backend, device, dtype, shape, front):
    frames, height, width, channels, features, taps, side = shape
    video = draw(channels, frames, height, width, device=device, dtype=dtype)
    weight = draw(features, channels, taps, side, side, device=device, dtype=dtype, scale=0.1)
    bias = draw(features, device=device, dtype=dtype)
    residual = draw(features, frames, height, width, device=device, dtype=dtype)
    exact = F.conv3d(
        padded(video[None].double(), taps, front), weight.double(), bias.double(), padding=(0, side // 2, side // 2)
    )[0]
    given: dict[str, Any] = {"front": front, "backend": backend}
    out, sums = conv_planes(to_planes(video), pack_weight(weight), bias, **given)
    assert sums is None
    close(out, exact)
    out, sums = conv_planes(
        to_planes(video), pack_weight(weight), bias, residual=to_planes(residual), residual_scale=0.5,
        with_sums=True, **given,
    )  # fmt: skip
    exact += 0.5 * residual.double()
    close(out, exact)
    assert sums is not None
    values = exact.transpose(0, 1).flatten(2)
    wanted = torch.stack((values.sum(-1), values.square().sum(-1)), -1)
    torch.testing.assert_close(sums.double(), wanted, atol=TOLERANCE[dtype][0] * height * width, rtol=1e-2)


@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize(("backend", "device", "dtype"), [*ON_CPU, *ON_GPU])
def test_upsampling_folded_into_the_convolution(backend, device, dtype, taps):
    video = draw(16, 2, 5, 9, device=device, dtype=dtype)
    weight = draw(24, 16, taps, 3, 3, device=device, dtype=dtype, scale=0.1)
    grown = F.interpolate(video[None].double(), scale_factor=(1, 2, 2), mode="nearest")
    exact = F.conv3d(padded(grown, taps, "zeros"), weight.double(), padding=(0, 1, 1))[0]
    out, sums = conv_planes(to_planes(video), pack_upsampled(weight), space=2, with_sums=True, backend=backend)
    close(out, exact)
    assert sums is not None
    torch.testing.assert_close(
        sums[..., 0].double(), exact.sum((2, 3)).T, atol=3.0 if device == "cuda" else 1e-3, rtol=0
    )


@pytest.mark.parametrize(("backend", "device", "dtype"), [*ON_CPU, *ON_GPU])
def test_frames_doubled_by_a_convolution(backend, device, dtype):
    video = draw(16, 3, 4, 5, device=device, dtype=dtype)
    weight = draw(2 * 20, 16, 3, 3, 3, device=device, dtype=dtype, scale=0.1)
    bias = draw(2 * 20, device=device, dtype=dtype)
    exact = F.conv3d(padded(video[None].double(), 3, "zeros"), weight.double(), bias.double(), padding=(0, 1, 1))[0]
    exact = exact.unflatten(0, (20, 2)).permute(0, 2, 1, 3, 4).flatten(1, 2)
    packed = pack_weight(weight)[0].unflatten(0, (20, 2)).transpose(0, 1).contiguous()
    bias = bias.unflatten(0, (20, 2)).T.flatten()
    out, sums = conv_planes(to_planes(video), packed, bias, times=2, with_sums=True, backend=backend)
    close(out, exact)
    assert sums is not None
    torch.testing.assert_close(
        sums[..., 0].double(), exact.sum((2, 3)).T, atol=1.0 if device == "cuda" else 1e-3, rtol=0
    )


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("per_frame", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 7, 32, 8), (1, 63, 65, 128, 32), (2, 1, 1, 16, 4)], ids=str)
@pytest.mark.parametrize(("backend", "device", "dtype"), [*ON_CPU, *(p for p in ON_GPU if p.values[0] != "cudnn")])
def test_group_norm_silu(backend, device, dtype, shape, per_frame, silu):
    frames, height, width, channels, groups = shape
    video = draw(channels, frames, height, width, device=device, dtype=dtype) + 2
    weight, bias = (draw(channels, device=device, dtype=dtype) for _ in range(2))
    wide = video.double()
    images = wide.transpose(0, 1) if per_frame else wide[None]
    exact = F.group_norm(images, groups, weight.double(), bias.double(), 1e-6)
    exact = exact.transpose(0, 1) if per_frame else exact[0]
    exact = F.silu(exact) if silu else exact
    planes = to_planes(video)
    given: dict[str, Any] = {"eps": 1e-6, "per_frame": per_frame, "silu": silu, "backend": backend}
    out = group_norm_silu(planes, weight, bias, groups, **given)
    torch.testing.assert_close(
        from_planes(out).double(), exact, atol=4e-2 if dtype == torch.bfloat16 else 5e-4, rtol=2e-2
    )
    assert (out[:, -1] == 0).all()
    assert (out[:, :, -1] == 0).all()
    sums = channel_sums(planes, backend=backend)
    torch.testing.assert_close(sums[..., 0].double(), wide.sum((2, 3)).T, rtol=1e-4, atol=1e-2)
    assert torch.equal(group_norm_silu(planes, weight, bias, groups, sums=sums, **given), out)


@pytest.mark.parametrize("columns", [1, 7, 65, 3600])
@pytest.mark.parametrize(("backend", "device", "dtype"), [*ON_CPU, *(p for p in ON_GPU if p.values[0] != "cudnn")])
def test_softmax_rows(backend, device, dtype, columns):
    scores = draw(2, 3, columns, device=device, dtype=torch.float32, scale=30)
    out = softmax_rows(scores, 0.3, dtype, backend=backend)
    assert out.dtype == dtype
    exact = torch.softmax(scores.double() * 0.3, -1)
    torch.testing.assert_close(out.double(), exact, atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


X, WEIGHT = torch.zeros(2, 3, 4, 16), torch.zeros(1, 8, 3, 3, 3, 16)
ERRORS = {
    "three dimensions": (
        lambda: conv_planes(X[0], WEIGHT),
        ValueError,
        r"x: shape is .*must be \[T, H \+ 1, W \+ 1, C\]",
    ),
    "no pixel": (lambda: conv_planes(X[:, :1].contiguous(), WEIGHT), ValueError, "must have a pixel beside"),
    "strides": (lambda: conv_planes(X.mT, WEIGHT), ValueError, "x: strides are .*must be contiguous"),
    "weight shape": (
        lambda: conv_planes(X, WEIGHT[..., :8]),
        ValueError,
        r"weight: shape is .*must be \[1, N, KT, 3, 3, 16\]",
    ),
    "phases": (lambda: conv_planes(X, WEIGHT, space=2), ValueError, r"must be \[4, N, KT, 2, 2, 16\]"),
    "front": (lambda: conv_planes(X, WEIGHT, front="last"), ValueError, "front: got 'last', must be zeros or first"),
    "bias": (lambda: conv_planes(X, WEIGHT, torch.zeros(7)), ValueError, r"bias: shape is \[7\], must be \[8\]"),
    "residual": (
        lambda: conv_planes(X, WEIGHT, residual=X),
        ValueError,
        r"residual: shape is .*must be \[2, 3, 4, 8\]",
    ),
    "dtype": (lambda: conv_planes(X, WEIGHT.half()), TypeError, "weight: dtype is torch.float16, must be"),
    "backend": (lambda: conv_planes(X, WEIGHT, backend="cuda"), ValueError, "must be one of triton, cudnn, reference"),
    "groups": (
        lambda: group_norm_silu(X, X[0, 0, 0], X[0, 0, 0], 3, eps=1e-6),
        ValueError,
        "groups: got 3, must divide",
    ),
    "times": (lambda: grow_planes(X, 3, 1), ValueError, "times, space: got 3 and 1, must be 1 or 2"),
    "scores": (lambda: softmax_rows(X.mT, 1.0, torch.float32), ValueError, "scores: shape is .*contiguous"),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(("times", "space"), [(2, 2), (2, 1), (1, 2), (1, 1)])
@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize(("backend", "device", "dtype"), [*ON_CPU, *(p for p in ON_GPU if p.values[0] != "cudnn")])
def test_grow_planes(backend, device, dtype, frames, times, space):
    video = draw(16, frames, 3, 5, device=device, dtype=dtype)
    wide = video[None].double()
    exact = F.interpolate(wide[:, :, :1], scale_factor=(1, space, space), mode="trilinear")
    if frames > 1:
        rest = F.interpolate(wide[:, :, 1:], scale_factor=(times, space, space), mode="trilinear")
        exact = torch.cat((exact, rest), 2)
    close(grow_planes(to_planes(video), times, space, backend=backend), exact[0])
