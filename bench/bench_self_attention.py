"""Self-attention with RMSNorm of queries and keys: on load, in a pass of its own, and without."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels import ops

from .bench_attention import SHAPES
from .common import median_ms, record, rotations

NAMES = ("spatial-240p", "spatial-360p", "spatial-480p", "spatial-720p", "latte", "full")


def on_load(qkv: Tensor, weight: Tensor) -> Tensor:
    return ops.self_attention(qkv, q_weight=weight, k_weight=weight)


def in_a_pass(qkv: Tensor, weight: Tensor) -> Tensor:
    ops.qk_norm_rope(qkv, q_weight=weight, k_weight=weight)
    return ops.attention(*qkv.unbind(2))


def without(qkv: Tensor, weight: Tensor) -> Tensor:
    return ops.self_attention(qkv)


RUNS: dict[str, Callable[..., Tensor]] = {
    "no norm": without,
    "norm on load": on_load,
    "norm in a pass": in_a_pass,
}


def check(name: str, qkv: Tensor, weight: Tensor) -> None:
    """The first 64 queries of two heads in each batch row against float32."""
    y = RUNS[name](qkv.clone(), weight)[:, :64, -2 * weight.numel() :].float()
    q, k, v = (t[:, :, -2:].float().transpose(1, 2) for t in qkv.unbind(2))
    if name != "no norm":
        q, k = (F.rms_norm(t, t.shape[-1:], weight.float(), 1e-6) for t in (q, k))
    wanted = torch.softmax(q[:, :, :64] @ k.mT * weight.numel() ** -0.5, dim=-1) @ v
    torch.testing.assert_close(y, wanted.transpose(1, 2).flatten(2), atol=1e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", NAMES)
def test_self_attention(benchmark, shape):
    sizes = SHAPES[shape]
    kwargs: Any = {"dtype": torch.bfloat16, "device": "cuda"}
    first = torch.randn(sizes.batch, sizes.queries, 3, sizes.heads, sizes.head_dim, **kwargs)
    weight = torch.rand(sizes.head_dim, **kwargs) + 0.5
    inputs = [first, *(torch.randn_like(first) for _ in range(rotations(first.nbytes) - 1))]
    times: dict[str, list[float]] = {name: [] for name in RUNS}
    for name in RUNS:
        check(name, first, weight)
    for name in 3 * tuple(RUNS):  # in turn, for the clock falls as the GPU warms up
        times[name].append(median_ms(functools.partial(RUNS[name], weight=weight), inputs, replays=4))
    for name in RUNS:
        ms = statistics.median(times[name])
        rate = sizes.flop / ms / 1e9
        record("self_attention", f"{shape} {sizes}", name, ms, rate, "TFLOP/s")
        benchmark.extra_info[name] = {"ms": ms, "tflop_per_s": rate}

    def once() -> None:
        on_load(first, weight)
        torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=10, warmup_rounds=2)
