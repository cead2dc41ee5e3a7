"""RMSNorm and rotary embedding of queries and keys in Triton, in place in the QKV GEMM's output.

Pure memory traffic: two thirds of the tensor are read and written once.

- A program is one warp with some tokens. It takes q, then k of a token, some heads at a time, in 16-byte accesses, and
  needs so few registers that enough other warps are in flight meanwhile.
- The pairs of a head are two tiles, `a` and `z`: 36 = 32 + 4. One tile of 64 would mask 44% of its lanes away.
- Interleaved pairs are loaded together and split, which stays within a thread. Others are two loads, the first and
  the second of each pair, so that they meet in one thread as well.
- Heads that are normed together come as one wide head, in more warps; tables of a single head's width repeat along it.
- Strides come divided by UNIT elements (16 bytes where they allow it) and are multiplied back. Triton itself asks for
  a multiple of 16 elements before it trusts a stride, and would load rows of 72 elements 2 bytes at a time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _columns(pair, S: tl.constexpr):
    """The columns of the first channels of pairs; the second ones are S further."""
    return pair // S * (2 * S) + pair % S


@triton.jit
def _load(rows, inside, first, PAIRS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, S: tl.constexpr):
    """First and second channels, each [ROWS, COLUMNS] float32, of the pairs from `first` on."""
    pair = first + tl.arange(0, COLUMNS)
    if S == 1:
        column = 2 * first + tl.arange(0, 2 * COLUMNS)
        mask = inside[:, None] & (column < 2 * PAIRS)[None, :]
        both = tl.load(rows[:, None] + column[None, :], mask=mask, other=0.0)
        x, y = tl.split(tl.reshape(both, (ROWS, COLUMNS, 2)))
    else:
        mask = inside[:, None] & (pair < PAIRS)[None, :]
        start = rows[:, None] + _columns(pair, S)[None, :]
        x = tl.load(start, mask=mask, other=0.0)
        y = tl.load(start + S, mask=mask, other=0.0)
    return x.to(tl.float32), y.to(tl.float32)


@triton.jit
def _store(rows, inside, first, x, y, PAIRS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, S: tl.constexpr):
    """The counterpart of `_load`."""
    x = x.to(rows.dtype.element_ty)
    y = y.to(rows.dtype.element_ty)
    pair = first + tl.arange(0, COLUMNS)
    if S == 1:
        column = 2 * first + tl.arange(0, 2 * COLUMNS)
        mask = inside[:, None] & (column < 2 * PAIRS)[None, :]
        tl.store(rows[:, None] + column[None, :], tl.reshape(tl.join(x, y), (ROWS, 2 * COLUMNS)), mask=mask)
    else:
        mask = inside[:, None] & (pair < PAIRS)[None, :]
        start = rows[:, None] + _columns(pair, S)[None, :]
        tl.store(start, x, mask=mask)
        tl.store(start + S, y, mask=mask)


@triton.jit
def _scale_rotate(
    x,
    y,
    rstd,
    weight,
    cos,
    sin,
    first,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    S: tl.constexpr,
    PERIOD: tl.constexpr,
):
    """Norm and rotation of one tile."""
    pair = first + tl.arange(0, COLUMNS)
    mask = pair < PAIRS
    if weight is not None:
        start = weight + _columns(pair, S)
        x = x * rstd[:, None] * tl.load(start, mask=mask, other=0.0).to(tl.float32)[None, :]
        y = y * rstd[:, None] * tl.load(start + S, mask=mask, other=0.0).to(tl.float32)[None, :]
    if cos is not None:
        c = tl.load(cos + pair % PERIOD, mask=mask, other=0.0)[None, :]
        s = tl.load(sin + pair % PERIOD, mask=mask, other=0.0)[None, :]
        return x * c - y * s, y * c + x * s
    else:
        return x, y


@triton.jit
def _norm_rope(
    part,  # [H, D], the queries or keys of one token
    stride_h,
    weight,  # [D] or None
    cos,  # [PERIOD] float32 or None
    sin,
    eps,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    PERIOD: tl.constexpr,
    S: tl.constexpr,
    A: tl.constexpr,
    Z: tl.constexpr,
    ROWS: tl.constexpr,
):
    if weight is not None or cos is not None:
        for head in tl.static_range(0, HEADS, ROWS):
            row = head + tl.arange(0, ROWS)
            inside = row < HEADS
            rows = part + row * stride_h
            x_a, y_a = _load(rows, inside, 0, PAIRS, A, ROWS, S)
            x_z, y_z = _load(rows, inside, A, PAIRS, Z, ROWS, S)
            rstd = None
            if weight is not None:
                squares = tl.sum(x_a * x_a + y_a * y_a, 1) + tl.sum(x_z * x_z + y_z * y_z, 1)
                rstd = tl.rsqrt(squares / (2 * PAIRS) + eps)
            x_a, y_a = _scale_rotate(x_a, y_a, rstd, weight, cos, sin, 0, PAIRS, A, S, PERIOD)
            x_z, y_z = _scale_rotate(x_z, y_z, rstd, weight, cos, sin, A, PAIRS, Z, S, PERIOD)
            _store(rows, inside, 0, x_a, y_a, PAIRS, A, ROWS, S)
            _store(rows, inside, A, x_z, y_z, PAIRS, Z, ROWS, S)


@triton.jit(do_not_specialize=["positions", "tokens"])
def _qk_norm_rope_kernel(
    qkv,  # [B, N, P, H, D]
    q_weight,  # [D] or None
    k_weight,
    cos,  # [N, PERIOD] float32 or None
    sin,
    stride_b,  # of qkv, in units of UNIT elements
    stride_n,
    stride_3,
    stride_h,
    positions,  # N
    tokens,  # B * N
    eps,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,  # D / 2
    PERIOD: tl.constexpr,  # pairs after which the tables repeat
    S: tl.constexpr,  # distance between the channels of a pair
    UNIT: tl.constexpr,
    A: tl.constexpr,  # pairs of tile a
    Z: tl.constexpr,  # pairs of tile z
    ROWS: tl.constexpr,  # heads taken at a time
    TOKENS: tl.constexpr,  # tokens of one program
    QUERIES: tl.constexpr,  # whether q is normed and rotated
    KEYS: tl.constexpr,  # whether there are keys
):
    begin = tl.program_id(0) * TOKENS
    for token in range(begin, tl.minimum(begin + TOKENS, tokens)):
        position = token % positions
        q = qkv + (tl.cast(token // positions, tl.int64) * stride_b + tl.cast(position, tl.int64) * stride_n) * UNIT
        k = q + tl.cast(stride_3, tl.int64) * UNIT
        cos_row = None
        sin_row = None
        if cos is not None:
            cos_row = cos + position * PERIOD
            sin_row = sin + position * PERIOD
        if QUERIES:
            _norm_rope(q, stride_h * UNIT, q_weight, cos_row, sin_row, eps, HEADS, PAIRS, PERIOD, S, A, Z, ROWS)
        if KEYS:
            _norm_rope(k, stride_h * UNIT, k_weight, cos_row, sin_row, eps, HEADS, PAIRS, PERIOD, S, A, Z, ROWS)


INTERPRETED = not isinstance(_qk_norm_rope_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET was set at import: then CPU tensors are fine."""


class Config(NamedTuple):
    """How tokens are laid on the device."""

    rows: int
    """Heads taken at a time, a power of two."""
    tokens: int
    """Tokens of one program."""
    warps: int
    """Warps of one program."""


MAX_ROWS = 16
"""Most heads that one warp takes at a time: 16 of 72 are 36 registers a thread."""


CHANNELS_PER_WARP = 1024
"""Of a wide head: 32 channels a thread, for each of two tiles."""
MOST_WARPS = 8


def default_config(heads: int, head_dim: int = 128) -> Config:
    """The config for `heads` heads. A program of one token and two warps was best or near it at every size measured.

    A wide head, which is really several, takes more warps.
    """
    # Heads in whole tiles where that is possible: 24 are 3 tiles of 8, and not 2 of 16 with a quarter masked away.
    divisor = heads & -heads
    rows = divisor if divisor >= 4 else triton.next_power_of_2(heads)
    warps = min(max(2, triton.next_power_of_2(triton.cdiv(head_dim, CHANNELS_PER_WARP))), MOST_WARPS)
    return Config(min(rows, MAX_ROWS), tokens=1, warps=warps)


def qk_norm_rope_triton(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    pair_stride: int,
    eps: float,
    queries: bool = True,
    *,
    config: Config | None = None,
) -> None:
    """Launch the pass. The arguments are those of `pab_kernels.ops.qk_norm_rope`, already checked.

    Parameters
    ----------
    config : Config, optional
        Replaces `default_config`, for sweeps.
    """
    if qkv.dtype == torch.float64:
        raise ValueError("backend: triton got torch.float64, must be float32, float16 or bfloat16")
    if qkv.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"backend: triton got a tensor on {qkv.device}, must be on a CUDA device")
    batch, positions, parts, heads, head_dim = qkv.shape
    if config is None:
        config = default_config(heads, head_dim)
    unit = math.gcd(16 // qkv.element_size(), *qkv.stride()[:4])
    pairs = head_dim // 2
    half = max(triton.next_power_of_2(pairs) // 2, 1)
    with torch.cuda.device_of(qkv):
        _qk_norm_rope_kernel[(triton.cdiv(batch * positions, config.tokens),)](
            qkv,
            q_weight,
            k_weight,
            cos,
            sin,
            *(stride // unit for stride in qkv.stride()[:4]),
            positions,
            batch * positions,
            eps,
            HEADS=heads,
            PAIRS=pairs,
            PERIOD=pairs if cos is None else cos.shape[1],
            S=pair_stride,
            UNIT=unit,
            A=half,
            Z=triton.next_power_of_2(max(pairs - half, 1)),
            ROWS=config.rows,
            TOKENS=config.tokens,
            QUERIES=queries,
            KEYS=parts > 1,
            num_warps=config.warps,
        )
