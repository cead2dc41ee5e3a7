"""Queries, keys and values in e4m3 for attention on Hopper (csrc/attention_fp8.cuh), in Triton: one pass over them.

A program takes 256 tokens of one head, 128 at a time, once for the largest value and once to write; the second time
they are in L2. Queries get a scale each. Keys have a constant row taken out, which the softmax does not see, and get a
scale for every 128; values one for 256, and are written transposed, the tokens of every 16 in the order in which the
attention kernel's lanes hold their weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pab_kernels.triton_ops.quantize import E4M3_LIMIT, LEAST

STEP = 128
"""Tokens that share a scale of keys, and are written at a time."""
BLOCK = 256
"""Tokens that share a scale of values."""


@triton.jit
def _load(pointer, tokens, columns, stride, limit, HEAD_DIM: tl.constexpr):
    mask = (tokens < limit)[:, None] & (columns < HEAD_DIM)[None, :]
    at = pointer + tokens.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "pitch"])
def _quantize_qkv_kernel(
    q,  # [B, N, H, D]
    k,
    v,
    center,  # [B, H, D] float32, contiguous: what is taken out of the keys
    q8,  # [B, N, H, COLUMNS] e4m3, contiguous, like all results
    k8,
    v8,  # [B, H, D, pitch]
    q_scale,  # [B, H, N] float32
    k_scale,  # [B, H, steps]
    v_scale,  # [B, H, blocks]
    q_b,  # strides in elements, <tensor>_<dimension>
    q_n,
    q_h,
    k_b,
    k_n,
    k_h,
    v_b,
    v_n,
    v_h,
    tokens,  # N
    pitch,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,  # a power of two, COLUMNS or more
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q += batch * q_b + head * q_h
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    pair = batch * HEADS + head
    steps = tl.cdiv(tokens, STEP)
    column = tl.arange(0, WIDTH)
    middle = tl.load(center + pair * HEAD_DIM + column, mask=column < HEAD_DIM, other=0.0)
    largest = tl.full((), LEAST, tl.float32)
    for first in range(block * BLOCK, tl.minimum((block + 1) * BLOCK, tokens), STEP):
        token = first + tl.arange(0, STEP)
        largest = tl.maximum(largest, tl.max(tl.abs(_load(v, token, column, v_n, tokens, HEAD_DIM))))
    scale_of_v = largest / E4M3_LIMIT
    tl.store(v_scale + pair * tl.cdiv(tokens, BLOCK) + block, scale_of_v)
    for first in range(block * BLOCK, tl.minimum((block + 1) * BLOCK, tokens), STEP):
        token = first + tl.arange(0, STEP)
        written = (token < tokens)[:, None] & (column < COLUMNS)[None, :]
        at = ((batch * tokens + token.to(tl.int64)) * HEADS + head)[:, None] * COLUMNS + column[None, :]
        x = _load(q, token, column, q_n, tokens, HEAD_DIM)
        scales = tl.maximum(tl.max(tl.abs(x), 1), LEAST) / E4M3_LIMIT
        tl.store(q8 + at, (x * (1 / scales)[:, None]).to(tl.float8e4nv), mask=written)
        tl.store(q_scale + pair * tokens + token, scales, mask=token < tokens)
        x = _load(k, token, column, k_n, tokens, HEAD_DIM)
        x = tl.where((token < tokens)[:, None], x - middle[None, :], 0.0)
        scale = tl.maximum(tl.max(tl.abs(x)), LEAST) / E4M3_LIMIT
        tl.store(k8 + at, (x * (1 / scale)).to(tl.float8e4nv), mask=written)
        tl.store(k_scale + pair * steps + first // STEP, scale)
        # Place 4c + u of 16 has token 2c + u % 2 + u // 2 * 8.
        place = tl.arange(0, STEP)
        token = first + place // 16 * 16 + place % 16 // 4 * 2 + place % 2 + place % 4 // 2 * 8
        x = _load(v, token, column, v_n, tokens, HEAD_DIM) * (1 / scale_of_v)
        at_v = v8 + (pair * HEAD_DIM + column.to(tl.int64))[:, None] * pitch + (first + place)[None, :]
        tl.store(at_v, tl.trans(x).to(tl.float8e4nv), mask=(column < HEAD_DIM)[:, None] & (place < STEP)[None, :])


INTERPRETED = not isinstance(_quantize_qkv_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET was set at import: then CPU tensors are fine."""


def quantize_qkv_triton(
    q: Tensor, k: Tensor, v: Tensor, center: Tensor, results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
) -> None:
    """Launch the pass. `results` are q8, k8, v8, q_scale, k_scale, v_scale as the kernel's comments say."""
    if q.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"backend: triton got a tensor on {q.device}, must be on a CUDA device")
    batch, tokens, heads, head_dim = q.shape
    with torch.cuda.device_of(q):
        _quantize_qkv_kernel[(triton.cdiv(tokens, BLOCK), heads, batch)](
            q,
            k,
            v,
            center,
            *results,
            *(stride for x in (q, k, v) for stride in x.stride()[:3]),
            tokens,
            results[2].shape[-1],
            HEADS=heads,
            HEAD_DIM=head_dim,
            COLUMNS=results[0].shape[-1],
            WIDTH=triton.next_power_of_2(results[0].shape[-1]),
            STEP=STEP,
            BLOCK=BLOCK,
            num_warps=8,
        )
