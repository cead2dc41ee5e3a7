"""1 / rms of keys in Triton: what RMSNorm does to them, without writing them. Bound by reading them once."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 8
"""Of one program: so many float32 in a row of the result are one sector of memory."""


@triton.jit(do_not_specialize=["tokens", "pitch"])
def _key_scales_kernel(
    k,  # [B, N, H, D]
    out,  # [B, H, pitch] float32
    stride_b,  # of k, in units of UNIT elements: Triton itself trusts no stride but multiples of 16
    stride_n,
    stride_h,
    tokens,  # N
    pitch,
    eps,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    A: tl.constexpr,  # columns of the first tile
    Z: tl.constexpr,  # columns of the second: 72 are 64 and 8
    ROWS: tl.constexpr,  # heads, up to a power of two
    TOKENS: tl.constexpr,
):
    batch = tl.program_id(1)
    row = tl.arange(0, TOKENS * ROWS)
    token, head = tl.program_id(0) * TOKENS + row // ROWS, row % ROWS
    inside = (token < tokens) & (head < HEADS)
    start = k + tl.cast(batch, tl.int64) * stride_b * UNIT + tl.cast(token, tl.int64) * stride_n * UNIT
    start += head * stride_h * UNIT
    a = tl.arange(0, A)
    x = tl.load(start[:, None] + a[None, :], mask=inside[:, None] & (a < D)[None, :], other=0.0).to(tl.float32)
    squares = tl.sum(x * x, 1)
    if D > A:
        z = A + tl.arange(0, Z)
        x = tl.load(start[:, None] + z[None, :], mask=inside[:, None] & (z < D)[None, :], other=0.0).to(tl.float32)
        squares += tl.sum(x * x, 1)
    target = out + (tl.cast(batch, tl.int64) * HEADS + head) * pitch + token
    tl.store(target, tl.rsqrt(squares / D + eps), mask=inside)


INTERPRETED = not isinstance(_key_scales_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET was set at import: then CPU tensors are fine."""


def key_scales_triton(k: Tensor, eps: float, out: Tensor, *, tokens: int = TOKENS, warps: int = 4) -> None:
    """Launch the pass. The arguments are those of `pab_kernels.ops.key_scales`, already checked.

    Parameters
    ----------
    tokens, warps : int
        Of one program, for sweeps.
    """
    if k.dtype == torch.float64:
        raise ValueError("backend: triton got torch.float64, must be float32, float16 or bfloat16")
    if k.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"backend: triton got a tensor on {k.device}, must be on a CUDA device")
    batch, length, heads, head_dim = k.shape
    unit = math.gcd(16 // k.element_size(), *k.stride()[:3])
    first = 1 << (head_dim.bit_length() - 1)  # the largest power of two in it
    with torch.cuda.device_of(k):
        _key_scales_kernel[(triton.cdiv(length, tokens), batch)](
            k,
            out,
            *(stride // unit for stride in k.stride()[:3]),
            length,
            out.shape[-1],
            eps,
            HEADS=heads,
            D=head_dim,
            UNIT=unit,
            A=first,
            Z=triton.next_power_of_2(max(head_dim - first, 1)),
            ROWS=triton.next_power_of_2(heads),
            TOKENS=tokens,
            num_warps=warps,
        )
