"""Convolutions and norms of video planes against cuDNN and eager torch, at the sizes of Open-Sora's decoder at 480p."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels.ops.planes import conv_planes, from_planes, group_norm_silu, pack_weight, to_planes

from .common import median_ms, record

CONVS = {  # frames, height, width, channels, features, taps in time
    "2d-60x106": (4, 60, 106, 512, 512, 1),
    "2d-240x424": (4, 240, 424, 256, 256, 1),
    "2d-480x848": (4, 480, 848, 128, 128, 1),
    "3d-60x106": (20, 60, 106, 256, 256, 3),
}
NORMS = {"480x848": (4, 480, 848, 128), "240x424": (4, 240, 424, 512)}


def cudnn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Channels last, frames in front padded beforehand."""
    if weight.shape[2] == 1:
        return F.conv2d(x[0].transpose(0, 1), weight[:, :, 0], bias, padding=1)
    return F.conv3d(x, weight, bias, padding=(0, 1, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cudnn"])
@pytest.mark.parametrize("shape", CONVS)
def test_conv_planes(benchmark, shape, backend):
    frames, height, width, channels, features, taps = CONVS[shape]
    video = torch.randn(channels, frames, height, width, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(features, channels, taps, 3, 3, dtype=torch.bfloat16, device="cuda") * 0.02
    bias = torch.randn(features, dtype=torch.bfloat16, device="cuda")
    padded = F.pad(video, (0, 0, 0, 0, taps - 1, 0))[None].contiguous(memory_format=torch.channels_last_3d)
    planes, packed = to_planes(video), pack_weight(weight)
    kernel = weight.contiguous(memory_format=torch.channels_last_3d)
    wanted = cudnn(padded.float(), weight.float(), bias.float())
    wanted = wanted if taps == 3 else wanted.transpose(0, 1)[None]
    close = from_planes(conv_planes(planes, packed, bias)[0])[None]
    torch.testing.assert_close(close.float(), wanted, atol=5e-2, rtol=2e-2)
    run: Callable[[Tensor], object]
    if backend == "triton":
        run, given = (lambda x: conv_planes(x, packed, bias)), planes
    else:
        run, given = (lambda x: cudnn(x, kernel, bias)), padded
    ms = median_ms(run, [given])
    rate = 2 * frames * height * width * features * channels * taps * 9 / ms / 1e9
    record("conv_planes", f"{shape} {CONVS[shape]}", backend, ms, rate, "TFLOP/s")
    benchmark.extra_info.update(ms=ms, tflop_per_s=rate)

    def once() -> None:
        run(given)
        torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=5, warmup_rounds=1)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("shape", NORMS)
def test_group_norm_silu(benchmark, shape, backend):
    frames, height, width, channels = NORMS[shape]
    planes = to_planes(torch.randn(channels, frames, height, width, dtype=torch.bfloat16, device="cuda"))
    weight = torch.randn(channels, dtype=torch.bfloat16, device="cuda")
    images = from_planes(planes).transpose(0, 1).contiguous()

    def eager(_: Tensor) -> Tensor:
        return F.silu(F.group_norm(images, 32, weight, weight, 1e-6))

    def ours(x: Tensor) -> Tensor:
        return group_norm_silu(x, weight, weight, 32, eps=1e-6, per_frame=True)

    torch.testing.assert_close(from_planes(ours(planes)).transpose(0, 1), eager(planes), atol=5e-2, rtol=2e-2)
    run = ours if backend == "triton" else eager
    ms = median_ms(run, [planes])
    rate = 3 * planes.nbytes / ms / 1e6  # sums read, the pass reads and writes
    record("group_norm_silu", f"{shape} {NORMS[shape]}", backend, ms, rate, "GB/s")
    benchmark.extra_info.update(ms=ms, gb_per_s=rate)

    def once() -> None:
        run(planes)
        torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=5, warmup_rounds=1)
