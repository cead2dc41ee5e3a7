"""1 / rms of keys against eager torch, in GB/s of the keys read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pab_kernels import ops

from .common import median_ms, record, rotations

SHAPES = {  # B, N, H, D
    "spatial-480p": (30, 1590, 16, 72),
    "latte": (32, 1024, 16, 72),
    "full": (2, 9600, 24, 96),
}


def eager(k: Tensor) -> Tensor:
    return torch.rsqrt(k.float().square().mean(-1) + 1e-6).transpose(1, 2).contiguous()


BACKENDS: dict[str, Callable[[Tensor], Tensor]] = {"triton": ops.key_scales, "eager": eager}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_key_scales(benchmark, shape, backend):
    batch, length, heads, head_dim = SHAPES[shape]

    def draw() -> Tensor:
        return torch.randn(batch, length, 3, heads, head_dim, dtype=torch.bfloat16, device="cuda")[:, :, 1]

    run, k = BACKENDS[backend], draw()
    wanted = (k.double().square().mean(-1) + 1e-6).rsqrt().transpose(1, 2)
    torch.testing.assert_close(run(k)[..., :length].double(), wanted, atol=0, rtol=1e-4)
    nbytes = k.numel() * k.element_size()
    inputs = [k, *(draw() for _ in range(rotations(nbytes) - 1))]
    ms = median_ms(run, inputs)
    rate = nbytes / ms / 1e6
    record("key_scales", f"{shape} {SHAPES[shape]}", backend, ms, rate, "GB/s")
    benchmark.extra_info.update(ms=ms, gb_per_s=rate)

    def once() -> None:
        run(k)
        torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=10, warmup_rounds=2)
