"""Temporal attention: the backends, eager PyTorch, and SDPA on rearranged copies, in GB/s of the bytes it must move."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels import ops
from pab_kernels.ops import backends, reference

from .common import copy_bandwidth, median_ms, record, rotations

SHAPES = {
    "open-sora 480p 2s": ((2, 15, 1590, 16, 72), True),
    "open-sora 480p 8s": ((2, 60, 1590, 16, 72), True),
    "latte": ((2, 16, 1024, 16, 72), False),
    "open-sora 144p 2s": ((2, 15, 144, 16, 72), True),
}
"""(B, T, S, H, D), and whether there are QK norm and RoPE."""


@dataclass
class Inputs:
    qkv: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    rope: tuple[Tensor, Tensor] | None
    out: Tensor


def make(shape: tuple[int, int, int, int, int], prepared: bool) -> Inputs:
    batch, frames, tokens, heads, head_dim = shape
    qkv = torch.randn(batch, frames, tokens, 3, heads, head_dim, dtype=torch.bfloat16, device="cuda")
    out = torch.full((batch, frames, tokens, heads * head_dim), float("nan"), dtype=qkv.dtype, device="cuda")
    if not prepared:
        return Inputs(qkv, None, None, None, out)
    q_weight, k_weight = (1 + 0.1 * torch.randn(2, head_dim, device="cuda")).to(qkv.dtype)
    angles = torch.arange(frames)[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    return Inputs(qkv, q_weight, k_weight, (angles.cos().cuda(), angles.sin().cuda()), out)


def run_sdpa(x: Inputs) -> Tensor:
    """The usual way: norm, RoPE, one copy each of q, k and v with T innermost, SDPA, and a copy back."""
    q, k, v = x.qkv.unbind(3)
    batch, frames, tokens, heads, head_dim = q.shape
    if x.q_weight is not None and x.k_weight is not None:
        q = F.rms_norm(q, (head_dim,), x.q_weight, 1e-6)
        k = F.rms_norm(k, (head_dim,), x.k_weight, 1e-6)
    if x.rope is not None:
        cos, sin = (table[:, None, None, :] for table in x.rope)
        q, k = (reference.rotate_pairs_ref(each.float(), cos, sin).to(v.dtype) for each in (q, k))
    q, k, v = (each.permute(0, 2, 3, 1, 4).reshape(batch * tokens, heads, frames, head_dim) for each in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v)
    return y.unflatten(0, (batch, tokens)).permute(0, 3, 1, 2, 4).reshape(batch, frames, tokens, heads * head_dim)


def run_op(x: Inputs, backend: str) -> Tensor:
    return ops.temporal_attention(
        x.qkv, q_weight=x.q_weight, k_weight=x.k_weight, rope=x.rope, out=x.out, backend=backend
    )


def check(actual: Tensor, x: Inputs) -> None:
    """Compare with the reference in float32 on a few tokens: all of them would take minutes of memory traffic."""
    some = slice(0, None, max(1, x.qkv.shape[2] // 64))
    wanted = reference.temporal_attention_ref(
        x.qkv[:, :, some].float(),
        q_weight=None if x.q_weight is None else x.q_weight.float(),
        k_weight=None if x.k_weight is None else x.k_weight.float(),
        rope=x.rope,
    )
    torch.testing.assert_close(actual[:, :, some].float(), wanted, atol=3e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "sdpa", "reference"])
@pytest.mark.parametrize("shape", SHAPES)
def test_temporal_attention(benchmark, shape, backend):
    if backend == "cuda" and backends._C is None:
        pytest.skip("the CUDA kernels were left out of this build")
    size, prepared = SHAPES[shape]
    first = make(size, prepared)
    nbytes = first.qkv.nbytes + first.out.nbytes
    inputs = [first, *(make(size, prepared) for _ in range(rotations(nbytes) - 1))]

    def run(x: Inputs) -> Tensor:
        return run_sdpa(x) if backend == "sdpa" else run_op(x, backend)

    check(run(first), first)
    ms = median_ms(run, inputs)
    rate = nbytes / ms / 1e6
    record("temporal_attention", f"{shape} {size}", backend, ms, rate, "GB/s")
    benchmark.extra_info.update(ms=ms, gb_per_s=rate, of_copy=rate / copy_bandwidth())
    print(f"  {rate / copy_bandwidth():.1%} of a copy at {copy_bandwidth():.0f} GB/s")

    def once() -> None:
        run(first)
        torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=10, warmup_rounds=2)
