"""Attention of any queries on any keys in Triton: spatial, full 3D, and cross-attention on padded text.

The forward pass of flash attention (arXiv:2205.14135, 2307.08691), laid out around three things:

- head_dim is two tiles, `a` and `z`: 72 = 64 + 8 and 96 = 64 + 32. Tensor cores want multiples of 16 columns, so only
  the second tile is padded, and not the whole row to 128: a head_dim of 72 costs 80 columns.
- Strides come divided by UNIT elements (16 bytes where they allow it) and are multiplied back. Triton itself asks for
  a multiple of 16 elements before it trusts a stride, and would load rows of 72 elements 2 bytes at a time.
- Softmax of one warpgroup overlaps with the tensor cores only where another warpgroup is at its products. Hence
  configs with two programs on a multiprocessor, which means at most 128 registers for 8 warps.

Only the last keys of a row are masked, under a branch that all threads take together. Keys beyond `kv_len` are not
read, so they may hold anything.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _load(pointer, rows, columns, stride, limit, HEAD_DIM: tl.constexpr):
    """A tile of rows and columns, zero from row `limit` and column HEAD_DIM on."""
    mask = (rows < limit)[:, None] & (columns < HEAD_DIM)[None, :]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store(pointer, rows, columns, stride, limit, value, HEAD_DIM: tl.constexpr):
    """The counterpart of `_load`."""
    mask = (rows < limit)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(pointer + rows[:, None] * stride + columns[None, :], value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _dot(x, y, total, WIDE: tl.constexpr):
    """Matrix product plus total, exact for float32; WIDE multiplies in float32 whatever the operands are."""
    if WIDE:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, total, input_precision="ieee")


@triton.jit(do_not_specialize=["queries", "keys", "blocks"])
def _attention_kernel(
    q,  # [B, Lq, H, D]
    k,  # [B, Lk, H, D]
    v,
    kv_len,  # [B] int32 or None
    out,  # [B, Lq, H * D]
    out_scale,  # [B, Lq] float32, alike for all of b, where out is in e4m3; or None
    q_b,  # strides in units of UNIT elements, <tensor>_<dimension>
    q_n,
    q_h,
    k_b,
    k_n,
    k_h,
    v_b,
    v_n,
    v_h,
    queries,  # Lq
    keys,  # Lk
    blocks,  # programs of a head
    scale,  # softmax_scale / ln 2 for exp2, positive
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    UNIT: tl.constexpr,
    A: tl.constexpr,  # columns of tile a
    Z: tl.constexpr,  # columns of tile z
    M: tl.constexpr,  # queries of one program
    N: tl.constexpr,  # keys of one step
    WIDE_DOT: tl.constexpr,
):
    # Neighbouring programs share a head, so that its keys and values stay in L2.
    program = tl.program_id(0)
    first = program % blocks * M
    head = program // blocks % HEADS
    batch = (program // blocks // HEADS).to(tl.int64)
    limit = keys
    if kv_len is not None:
        limit = tl.minimum(tl.load(kv_len + batch), keys)
    q += (batch * q_b + first.to(tl.int64) * q_n + head.to(tl.int64) * q_h) * UNIT
    k += (batch * k_b + head.to(tl.int64) * k_h) * UNIT
    v += (batch * v_b + head.to(tl.int64) * v_h) * UNIT
    out += ((batch * queries + first) * HEADS + head) * HEAD_DIM
    row = tl.arange(0, M)
    column = tl.arange(0, N)
    a = tl.arange(0, A)
    z = A + tl.arange(0, Z)
    q_a = _load(q, row, a, q_n * UNIT, queries - first, HEAD_DIM)
    q_z = _load(q, row, z, q_n * UNIT, queries - first, HEAD_DIM)
    total_a = tl.zeros((M, A), tl.float32)
    total_z = tl.zeros((M, Z), tl.float32)
    largest = tl.full((M,), float("-inf"), tl.float32)
    norm = tl.zeros((M,), tl.float32)
    for start in range(0, limit, N):
        left = limit - start
        k_step = k + tl.cast(start, tl.int64) * k_n * UNIT
        v_step = v + tl.cast(start, tl.int64) * v_n * UNIT
        k_a = _load(k_step, column, a, k_n * UNIT, left, HEAD_DIM)
        k_z = _load(k_step, column, z, k_n * UNIT, left, HEAD_DIM)
        v_a = _load(v_step, column, a, v_n * UNIT, left, HEAD_DIM)
        v_z = _load(v_step, column, z, v_n * UNIT, left, HEAD_DIM)
        scores = _dot(q_a, tl.trans(k_a), None, WIDE_DOT)
        scores = _dot(q_z, tl.trans(k_z), scores, WIDE_DOT)
        if left < N:
            scores = tl.where((column < left)[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        decay = tl.exp2((largest - new) * scale)
        largest = new
        # One fused multiply-add and one exp2 for each score.
        weights = tl.exp2(scores * scale - (new * scale)[:, None])
        norm = norm * decay + tl.sum(weights, 1)
        weights = weights.to(v_a.dtype)
        total_a = _dot(weights, v_a, total_a * decay[:, None], WIDE_DOT)
        total_z = _dot(weights, v_z, total_z * decay[:, None], WIDE_DOT)
    # Without any key the totals are zero, and so is the result.
    inverse = 1 / tl.where(norm == 0, 1.0, norm)[:, None]
    if out_scale is not None:
        inverse /= tl.load(out_scale + batch * queries)
    _store(out, row, a, HEADS * HEAD_DIM, queries - first, total_a * inverse, HEAD_DIM)
    _store(out, row, z, HEADS * HEAD_DIM, queries - first, total_z * inverse, HEAD_DIM)


INTERPRETED = not isinstance(_attention_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET was set at import: then CPU tensors are fine."""

MAX_HEAD_DIM = 128
"""Beyond it the totals do not fit in registers."""


class Config(NamedTuple):
    """How a head's queries and keys are cut."""

    queries: int
    """Queries of one program."""
    keys: int
    """Keys of one step."""
    warps: int
    """Warps of one program; four are a warpgroup."""
    stages: int
    """Steps whose keys and values are in shared memory or on their way."""
    registers: int | None
    """Most registers a thread, None for what the compiler likes."""


FEW_QUERIES = 256
"""Up to here a head is a few blocks only, and small ones fill the GPU better."""

CONFIGS = (
    (72, FEW_QUERIES, Config(64, 64, 4, 2, 128)),
    (96, None, Config(128, 64, 8, 3, 128)),
    (128, None, Config(128, 64, 8, 2, 128)),
)
"""(largest head_dim, most queries or None for any, config); the first that fits. Measured on an H100 at head_dim 72 and
96; 128 is reasoned."""

FLOAT32 = Config(32, 32, 4, 1, None)
"""For float32, which has no tensor cores here: for tests, not for speed."""


def default_config(dtype: torch.dtype, head_dim: int, queries: int) -> Config:
    """The config for `queries` queries a head, from the table above."""
    if dtype == torch.float32:
        return FLOAT32
    return next(config for dim, most, config in CONFIGS if head_dim <= dim and (most is None or queries <= most))


def attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    softmax_scale: float,
    out: Tensor | None = None,
    *,
    out_scale: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Launch the attention. The arguments are those of `pab_kernels.ops.attention`, already checked.

    Parameters
    ----------
    out : Tensor, optional
        Contiguous [B, Lq, H * D] in the dtype of q, or e4m3 with `out_scale`; made where there is none.
    config : Config, optional
        Replaces `default_config`, for sweeps.

    Returns
    -------
    Tensor
        `out`.
    """
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    if q.dtype == torch.float64:
        raise ValueError("backend: triton got torch.float64, must be float32, float16 or bfloat16")
    if q.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"backend: triton got a tensor on {q.device}, must be on a CUDA device")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"backend: triton got a head_dim of {head_dim}, must be at most {MAX_HEAD_DIM}")
    if config is None:
        config = default_config(q.dtype, head_dim, queries)
    for name, value, rows in (("q", q, config.queries), ("k", k, config.keys), ("v", v, config.keys)):
        if value.stride(1) * rows >= 2**31:
            raise ValueError(f"backend: triton got a stride of {value.stride(1)} for {name}, too long for 32 bits")
    if out is None:
        out = q.new_empty(batch, queries, heads * head_dim, dtype=q.dtype if out_scale is None else torch.float8_e4m3fn)
    if softmax_scale <= 0:
        # The largest score must belong to the largest product, so the sign goes into the queries.
        q, softmax_scale = q * math.copysign(softmax_scale != 0, softmax_scale), abs(softmax_scale) or 1.0
    strides = [stride for t in (q, k, v) for stride in t.stride()[:3]]
    unit = math.gcd(16 // q.element_size(), *strides)
    half = max(triton.next_power_of_2(head_dim) // 2, 16)
    blocks = triton.cdiv(queries, config.queries)
    with torch.cuda.device_of(q):
        _attention_kernel[(blocks * heads * batch,)](
            q,
            k,
            v,
            None if kv_len is None else kv_len.contiguous(),
            out,
            out_scale,
            *(stride // unit for stride in strides),
            queries,
            keys,
            blocks,
            softmax_scale / math.log(2),
            HEADS=heads,
            HEAD_DIM=head_dim,
            UNIT=unit,
            A=half,
            Z=max(triton.next_power_of_2(max(head_dim - half, 1)), 16),
            M=config.queries,
            N=config.keys,
            WIDE_DOT=INTERPRETED,  # Triton's interpreter has no bfloat16 dot
            num_warps=config.warps,
            num_stages=config.stages,
            maxnreg=config.registers,
        )
    return out
