"""Attention of all queries on all keys: each SDPA backend forced, and the op as it chooses, in TFLOP/s."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pab_kernels import ops

from .common import median_ms, record

SHAPES = {
    "open-sora spatial 480p": (30, 1590, 1590, 16, 72),
    "latte spatial": (32, 1024, 1024, 16, 72),
    "open-sora cross 480p": (2, 23850, 300, 16, 72),
    "open-sora-plan 1.2 full": (2, 9600, 9600, 24, 96),
}
"""Batch, queries, keys, heads, head_dim."""

FORCED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

Inputs = tuple[Tensor, Tensor, Tensor]


def make(batch: int, queries: int, keys: int, heads: int, head_dim: int) -> Inputs:
    """Strided as in the models: cut out of one QKV product, or a key-value product where lengths differ."""
    kwargs: Any = {"dtype": torch.bfloat16, "device": "cuda"}
    if queries == keys:
        q, k, v = torch.randn(batch, queries, 3, heads, head_dim, **kwargs).unbind(2)
    else:
        q = torch.randn(batch, queries, heads, head_dim, **kwargs)
        k, v = torch.randn(batch, keys, 2, heads, head_dim, **kwargs).unbind(2)
    return q, k, v


def run_op(inputs: Inputs) -> Tensor:
    return ops.attention(*inputs)


def run_sdpa(inputs: Inputs) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in inputs)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def check(actual: Tensor, inputs: Inputs) -> None:
    """Compare a few heads with float32: the scores of all would not fit."""
    q, k, v = (t[:1, :, :2].float().transpose(1, 2) for t in inputs)
    wanted = torch.softmax(q[:, :, :256] @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v
    head_dim = q.shape[-1]
    torch.testing.assert_close(
        actual[:1, :256, : 2 * head_dim].float(), wanted.transpose(1, 2).flatten(2), atol=1e-2, rtol=2e-2
    )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["op", *FORCED])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(benchmark, shape, backend):
    batch, queries, keys, heads, head_dim = SHAPES[shape]
    inputs = [make(*SHAPES[shape]) for _ in range(2)]
    run = run_op if backend == "op" else run_sdpa
    with sdpa_kernel([FORCED[backend]] if backend in FORCED else list(FORCED.values())):
        try:
            check(run(inputs[0]), inputs[0])
        except RuntimeError as error:
            pytest.skip(f"{backend} does not take {shape}: {error}")
        ms = median_ms(run, inputs)
        rate = 4 * batch * heads * queries * keys * head_dim / ms / 1e9
        record("attention", f"{shape} {SHAPES[shape]}", backend, ms, rate, "TFLOP/s")
        benchmark.extra_info.update(ms=ms, tflop_per_s=rate)

        def once() -> None:
            run(inputs[0])
            torch.cuda.synchronize()

        benchmark.pedantic(once, rounds=10, warmup_rounds=2)
