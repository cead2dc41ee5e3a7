"""Self-attention along T in Triton, straight from the QKV GEMM's output.

Sequences are short (15 frames) and many (51,000), so bytes are all that matters:

- A program has just enough rows for a sequence, and a warp for every 16, so that many programs are in flight. What
  is shorter than 16 frames is packed: whole (batch, token, head) sequences, the scores between them masked.
- head_dim is two tiles, `a` and `z`: 72 = 64 + 8. `tl.dot` wants at least 16 columns, so only the second tile is
  padded, to 16, and not the whole row to 128.
- Strides come divided by UNIT elements (16 bytes where they allow it) and are multiplied back. Triton itself asks
  for a multiple of 16 elements before it trusts a stride, and would load rows of 72 elements 2 bytes at a time.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _load(pointer, offsets, columns, valid, HEAD_DIM: tl.constexpr):
    """A tile of the rows at `offsets`, zero beyond head_dim and in rows that hold no sequence."""
    mask = valid[:, None] & (columns < HEAD_DIM)[None, :]
    return tl.load(pointer + offsets[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store(pointer, offsets, columns, valid, value, HEAD_DIM: tl.constexpr):
    """The counterpart of `_load`."""
    mask = valid[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(pointer + offsets[:, None] + columns[None, :], value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _dot(x, y, WIDE: tl.constexpr):
    """Matrix product, exact for float32; WIDE multiplies in float32 whatever the operands are."""
    if WIDE:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def _rotate(x, cos, sin, frame, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rotate the interleaved pairs of a tile that starts at column `first`. A pair never leaves its thread."""
    pairs = first // 2 + tl.arange(0, COLUMNS // 2)
    offsets = frame[:, None] * (HEAD_DIM // 2) + pairs[None, :]
    mask = (pairs < HEAD_DIM // 2)[None, :]
    c = tl.load(cos + offsets, mask=mask, other=0.0)
    s = tl.load(sin + offsets, mask=mask, other=0.0)
    even, odd = tl.split(tl.reshape(x, (ROWS, COLUMNS // 2, 2)))
    return tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (ROWS, COLUMNS))


@triton.jit
def _prepare(
    x_a,
    x_z,
    weight,
    cos,
    sin,
    frame,
    eps,
    HEAD_DIM: tl.constexpr,
    A: tl.constexpr,
    Z: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Norm and rotation of queries or keys in float32, rounded back once."""
    y_a = x_a.to(tl.float32)
    y_z = x_z.to(tl.float32)
    if weight is not None:
        a = tl.arange(0, A)
        z = A + tl.arange(0, Z)
        rstd = tl.rsqrt((tl.sum(y_a * y_a, 1) + tl.sum(y_z * y_z, 1)) / HEAD_DIM + eps)
        weight_a = tl.load(weight + a, mask=a < HEAD_DIM, other=0.0).to(tl.float32)
        weight_z = tl.load(weight + z, mask=z < HEAD_DIM, other=0.0).to(tl.float32)
        y_a = y_a * rstd[:, None] * weight_a[None, :]
        y_z = y_z * rstd[:, None] * weight_z[None, :]
    if cos is not None:
        y_a = _rotate(y_a, cos, sin, frame, 0, ROWS, A, HEAD_DIM)
        y_z = _rotate(y_z, cos, sin, frame, A, ROWS, Z, HEAD_DIM)
    return y_a.to(x_a.dtype), y_z.to(x_z.dtype)


@triton.jit(
    do_not_specialize=["stride_b", "stride_t", "stride_s", "stride_3", "stride_h", "tokens", "sequences"],
)
def _temporal_attention_kernel(
    qkv,  # [B, T, S, 3, H, D]
    q_weight,  # [D] or None
    k_weight,
    cos,  # [T, D / 2] float32 or None
    sin,
    out_scale,  # [B, T, S] float32 where out is in e4m3, or None
    out,  # [B, T, S, H * D]
    stride_b,  # of qkv, in units of UNIT elements
    stride_t,
    stride_s,
    stride_3,
    stride_h,
    tokens,  # S
    sequences,  # B * S * H
    eps,
    scale,  # softmax_scale / ln 2, for exp2
    FRAMES: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    UNIT: tl.constexpr,
    A: tl.constexpr,  # columns of tile a
    Z: tl.constexpr,  # columns of tile z
    ROWS: tl.constexpr,  # rows of one program, ROWS // FRAMES sequences
    WIDE_DOT: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    column = tl.arange(0, ROWS)
    member = row // FRAMES
    frame = row % FRAMES
    sequence = tl.program_id(0) * (ROWS // FRAMES) + member
    valid = (member < ROWS // FRAMES) & (sequence < sequences)
    # 32 bits for the slow divisions, 64 for what they find.
    head = sequence % HEADS
    token = (sequence // HEADS % tokens).to(tl.int64)
    batch = (sequence // HEADS // tokens).to(tl.int64)
    a = tl.arange(0, A)
    z = A + tl.arange(0, Z)
    # All loads come before the first use.
    offsets = (batch * stride_b + frame * stride_t.to(tl.int64) + token * stride_s + head * stride_h) * UNIT
    k = qkv + stride_3.to(tl.int64) * UNIT
    v = k + stride_3.to(tl.int64) * UNIT
    q_a = _load(qkv, offsets, a, valid, HEAD_DIM)
    q_z = _load(qkv, offsets, z, valid, HEAD_DIM)
    k_a = _load(k, offsets, a, valid, HEAD_DIM)
    k_z = _load(k, offsets, z, valid, HEAD_DIM)
    v_a = _load(v, offsets, a, valid, HEAD_DIM)
    v_z = _load(v, offsets, z, valid, HEAD_DIM)
    q_a, q_z = _prepare(q_a, q_z, q_weight, cos, sin, frame, eps, HEAD_DIM, A, Z, ROWS)
    k_a, k_z = _prepare(k_a, k_z, k_weight, cos, sin, frame, eps, HEAD_DIM, A, Z, ROWS)
    scores = (_dot(q_a, tl.trans(k_a), WIDE_DOT) + _dot(q_z, tl.trans(k_z), WIDE_DOT)) * scale
    # Rows without a sequence see each other, so that no row is without keys.
    scores = tl.where(member[:, None] == (column // FRAMES)[None, :], scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    norm = 1 / tl.sum(weights, 1)[:, None]
    weights = weights.to(v_a.dtype)
    y_a = _dot(weights, v_a, WIDE_DOT) * norm
    y_z = _dot(weights, v_z, WIDE_DOT) * norm
    out_rows = (batch * FRAMES + frame) * tokens + token
    if out_scale is not None:
        factor = 1 / tl.load(out_scale + out_rows, mask=valid, other=1.0)[:, None]
        y_a *= factor
        y_z *= factor
    offsets = out_rows * (HEADS * HEAD_DIM) + head * HEAD_DIM
    _store(out, offsets, a, valid, y_a, HEAD_DIM)
    _store(out, offsets, z, valid, y_z, HEAD_DIM)


INTERPRETED = not isinstance(_temporal_attention_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET was set at import: then CPU tensors are fine."""

MAX_FRAMES = 128
"""Most rows of one program, and so the longest sequence."""


def temporal_attention_triton(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    softmax_scale: float,
    out_scale: Tensor | None,
    out: Tensor,
) -> None:
    """Launch the attention. The arguments are those of `pab_kernels.ops.temporal_attention`, already checked."""
    batch, frames, tokens, _, heads, head_dim = qkv.shape
    if qkv.dtype == torch.float64:
        raise ValueError("backend: triton got torch.float64, must be float32, float16 or bfloat16")
    if qkv.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"backend: triton got a tensor on {qkv.device}, must be on a CUDA device")
    if frames > MAX_FRAMES:
        raise ValueError(f"backend: triton got {frames} frames, must be at most {MAX_FRAMES}")
    rows = max(triton.next_power_of_2(frames), 16)
    unit = math.gcd(16 // qkv.element_size(), *qkv.stride()[:5])
    half = max(triton.next_power_of_2(head_dim) // 2, 16)
    sequences = batch * tokens * heads
    with torch.cuda.device_of(qkv):
        _temporal_attention_kernel[(triton.cdiv(sequences, rows // frames),)](
            qkv,
            q_weight,
            k_weight,
            cos,
            sin,
            out_scale,
            out,
            *(stride // unit for stride in qkv.stride()[:5]),
            tokens,
            sequences,
            eps,
            softmax_scale / math.log(2),
            FRAMES=frames,
            HEADS=heads,
            HEAD_DIM=head_dim,
            UNIT=unit,
            A=half,
            Z=max(triton.next_power_of_2(max(head_dim - half, 1)), 16),
            ROWS=rows,
            WIDE_DOT=INTERPRETED,  # Triton's interpreter has no bfloat16 dot
            # 16 rows are what a warp's matrix instruction takes; float32 has none and would run out of registers.
            num_warps=min(rows // (8 if qkv.dtype == torch.float32 else 16), 16),
        )
