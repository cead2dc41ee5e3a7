"""Queries, keys and values in e4m3 for attention on Hopper (csrc/attention_fp8.cuh), in Triton.

Three passes: over some keys and values, for their mean, some columns at a time; over values, in blocks, once for the
largest and once to write, when they are in L2; over queries and keys, 128 at a time. Queries get a scale each. Keys
have the mean taken out, which the softmax does not see, and get a scale for every 128. Values have theirs taken out,
which attention adds to its result; they get a scale for a block, and are written transposed, the tokens of every 16 in
the order in which the attention kernel's lanes hold their weights.

To what attention adds goes the mean of what rounding took from values: by simulation that makes the result's error on
Gaussian data 5 % smaller. Where weights are not nearly alike it is no gain, and a value far larger than the others must
not have a part in it, or rows would see it that do not attend to it: so what counts is limited by the mean magnitude.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pab_kernels.triton_ops.quantize import E4M3_LIMIT, LEAST

NORM = tl.constexpr(240.0)
"""What the norm of a query, and the largest norm of the keys of a step, become. Rounding makes them 2**-4 longer at
most (what e4m3 cannot hold in full is too small to count), so a score is at most 255**2 = 65025, and float16 holds it.
"""
SMALLEST = tl.constexpr(1e-16)
"""A norm below counts as this: squares of what is less than 1e-19 are lost."""
STEP = 128
"""Tokens that share a scale of keys, and are written at a time."""
BLOCK = 1024
"""Tokens that share a scale of values."""
PART, SAMPLED = 32, 512
"""Columns of a mean that a block finds, and tokens that it reads at once: whole heads are too few blocks for a GPU."""
AT_ONCE = 32
"""Values of a head that are written at once. On an H200, 64 took 1.25 times as long for 40 heads of 128 and 24 of 96,
0.95 times for 12 of 128; with 8 warps it took 1.35 to 1.7 times as long."""


@triton.jit
def _load(pointer, tokens, columns, stride, limit, HEAD_DIM: tl.constexpr, middle):
    """Rows less `middle`, zeros beyond the last one."""
    mask = (tokens < limit)[:, None] & (columns < HEAD_DIM)[None, :]
    at = pointer + tokens.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.where(mask, tl.load(at, mask=mask, other=0.0).to(tl.float32) - middle[None, :], 0.0)


@triton.jit
def _norms(x):
    """Of rows; NaN where one is not finite, or too large for its square."""
    norms = tl.maximum(tl.sqrt(tl.sum(x * x, 1)), SMALLEST, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(norms < float("inf"), norms, float("nan"))


@triton.jit
def _mean(pointer, column, stride, every, samples, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr):
    total = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, samples, STEP):
        token = first + tl.arange(0, STEP)
        total += tl.sum(_load(pointer, token, column, stride * every, samples, HEAD_DIM, tl.zeros_like(total)), 0)
    return total / samples


@triton.jit(do_not_specialize=["every", "samples"])
def _centers_kernel(
    k,  # [B, N, H, D]
    v,
    center_k,  # [B, H, D] float32, contiguous: the mean of every so many-th token
    center_v,
    k_b,  # strides in elements, <tensor>_<dimension>
    k_n,
    k_h,
    v_b,
    v_n,
    v_h,
    every,
    samples,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # columns of a block
    STEP: tl.constexpr,
):
    head, batch, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    column = part // 2 * WIDTH + tl.arange(0, WIDTH)
    at = (batch * HEADS + head) * HEAD_DIM + column
    if part % 2 == 0:
        mean = _mean(k + batch * k_b + head * k_h, column, k_n, every, samples, HEAD_DIM, WIDTH, STEP)
        tl.store(center_k + at, mean, mask=column < HEAD_DIM)
    else:
        mean = _mean(v + batch * v_b + head * v_h, column, v_n, every, samples, HEAD_DIM, WIDTH, STEP)
        tl.store(center_v + at, mean, mask=column < HEAD_DIM)


@triton.jit(do_not_specialize=["tokens"])
def _quantize_qk_kernel(
    q,  # [B, N, H, D]
    k,
    center_k,  # [B, H, D] float32, contiguous: what is taken out of the keys
    center_v,  # [B, H, D] float32: of the values; their error's mean is added here
    v_error,  # [B, H, blocks, D] float32
    q8,  # [B, N, H, COLUMNS] e4m3, contiguous, like all results
    k8,
    q_scale,  # [B, H, N] float32
    k_scale,  # [B, H, steps]
    q_b,  # strides in elements, <tensor>_<dimension>
    q_n,
    q_h,
    k_b,
    k_n,
    k_h,
    tokens,  # N
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # a power of two, COLUMNS or more
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    step, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    pair = batch * HEADS + head
    column = tl.arange(0, WIDTH)
    token = step * STEP + tl.arange(0, STEP)
    written = (token < tokens)[:, None] & (column < COLUMNS)[None, :]
    at = ((batch * tokens + token.to(tl.int64)) * HEADS + head)[:, None] * COLUMNS + column[None, :]
    middle = tl.load(center_k + pair * HEAD_DIM + column, mask=column < HEAD_DIM, other=0.0)
    x = _load(q + batch * q_b + head * q_h, token, column, q_n, tokens, HEAD_DIM, tl.zeros_like(middle))
    y = _load(k + batch * k_b + head * k_h, token, column, k_n, tokens, HEAD_DIM, middle)
    scales = _norms(x) / NORM
    tl.store(q8 + at, (x * (1 / scales)[:, None]).to(tl.float8e4nv), mask=written)
    tl.store(q_scale + pair * tokens + token, scales, mask=token < tokens)
    norms = _norms(y)
    scale = (tl.max(norms) + 0.0 * tl.sum(norms)) / NORM  # NaN if one is: a maximum may pass over it
    tl.store(k8 + at, (y * (1 / scale)).to(tl.float8e4nv), mask=written)
    tl.store(k_scale + pair * tl.cdiv(tokens, STEP) + step, scale)
    if step == 0:
        blocks = tl.cdiv(tokens, BLOCK)
        total = tl.zeros_like(middle)
        for first in range(0, blocks, 32):
            block = first + tl.arange(0, 32)
            mask = (block < blocks)[:, None] & (column < HEAD_DIM)[None, :]
            total += tl.sum(
                tl.load(v_error + (pair * blocks + block[:, None]) * HEAD_DIM + column, mask=mask, other=0.0), 0
            )
        place, exists = pair * HEAD_DIM + column, column < HEAD_DIM
        center = tl.load(center_v + place, mask=exists, other=0.0)
        tl.store(center_v + place, center + total / tokens, mask=exists)


@triton.jit(do_not_specialize=["tokens", "pitch"])
def _quantize_v_kernel(
    v,  # [B, N, H, D]
    center_v,  # [B, H, D] float32, contiguous: what is taken out of the values
    v8,  # [B, H, D, pitch] e4m3, contiguous
    v_scale,  # [B, H, blocks] float32
    v_error,  # [B, H, blocks, D] float32: what rounding took, in all
    v_b,  # strides in elements, <tensor>_<dimension>
    v_n,
    v_h,
    tokens,  # N
    pitch,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # a power of two, HEAD_DIM or more
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    v += batch * v_b + head * v_h
    pair = batch * HEADS + head
    column = tl.arange(0, WIDTH)
    middle = tl.load(center_v + pair * HEAD_DIM + column, mask=column < HEAD_DIM, other=0.0)
    largest = tl.full((), LEAST, tl.float32)
    size = tl.zeros((8, WIDTH), tl.float32)  # of every eighth token: what one thread has, as a rule
    for first in range(block * BLOCK, tl.minimum((block + 1) * BLOCK, tokens), STEP):
        x = tl.abs(_load(v, first + tl.arange(0, STEP), column, v_n, tokens, HEAD_DIM, middle))
        largest = tl.maximum(largest, tl.max(x))
        size += tl.sum(tl.reshape(x, (STEP // 8, 8, WIDTH)), 0)
    scale = largest / E4M3_LIMIT
    # A third of the mean magnitude is more than rounding takes from Gaussian values. The mean is that of the smallest
    # eighth, for one value may be larger than all others together.
    limit = (8 * tl.min(size, 0) / (3 * tl.minimum(BLOCK, tokens - block * BLOCK)) / scale)[None, :]
    tl.store(v_scale + pair * tl.cdiv(tokens, BLOCK) + block, scale)
    error = tl.zeros((8, WIDTH), tl.float32)
    # To the pitch, zeros behind the last token: the attention kernel reads it all.
    for first in range(block * BLOCK, tl.minimum((block + 1) * BLOCK, pitch), STEP):
        # Place 4c + u of 16 has token 2c + u % 2 + u // 2 * 8.
        place = tl.arange(0, STEP)
        token = first + place // 16 * 16 + place % 16 // 4 * 2 + place % 2 + place % 4 // 2 * 8
        x = _load(v, token, column, v_n, tokens, HEAD_DIM, middle) * (1 / scale)
        x8 = x.to(tl.float8e4nv)
        taken = tl.maximum(tl.minimum(x - x8.to(tl.float32), limit), -limit)
        error += tl.sum(tl.reshape(taken, (STEP // 8, 8, WIDTH)), 0)
        at = v8 + (pair * HEAD_DIM + column.to(tl.int64))[:, None] * pitch + (first + place)[None, :]
        tl.store(at, tl.trans(x8), mask=(column < HEAD_DIM)[:, None] & (place < STEP)[None, :])
    at = v_error + (pair * tl.cdiv(tokens, BLOCK) + block) * HEAD_DIM + column
    tl.store(at, tl.sum(error, 0) * scale, mask=column < HEAD_DIM)


INTERPRETED = not isinstance(_quantize_v_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET was set at import: then CPU tensors are fine."""


def quantize_qkv_triton(q: Tensor, k: Tensor, v: Tensor, every: int, results: tuple[Tensor, ...]) -> None:
    """Launch the passes. `results` are center_k and center_v, the means of every so many-th key and value, the latter
    with what is to be added to the result besides, then q8, k8, v8, q_scale, k_scale, v_scale, all as the kernels'
    comments say.
    """
    if q.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"backend: triton got a tensor on {q.device}, must be on a CUDA device")
    batch, tokens, heads, head_dim = q.shape
    center_k, center_v, q8, k8, v8, q_scale, k_scale, v_scale = results
    columns = q8.shape[-1]
    sizes = {"HEADS": heads, "HEAD_DIM": head_dim}
    wide = sizes | {"WIDTH": triton.next_power_of_2(columns)}
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    with torch.cuda.device_of(q):
        samples = triton.cdiv(tokens, every)
        _centers_kernel[(heads, batch, 2 * triton.cdiv(head_dim, PART))](
            k, v, center_k, center_v, *strides[3:], every, samples, **sizes, WIDTH=PART, STEP=SAMPLED, num_warps=8
        )
        v_error = center_v.new_empty(batch, heads, v_scale.shape[-1], head_dim)
        _quantize_v_kernel[(v_scale.shape[-1], heads, batch)](
            v,
            center_v,
            v8,
            v_scale,
            v_error,
            *strides[6:],
            tokens,
            v8.shape[-1],
            **wide,
            STEP=AT_ONCE,
            BLOCK=BLOCK,
            num_warps=4,
        )
        _quantize_qk_kernel[(triton.cdiv(tokens, STEP), heads, batch)](
            q,
            k,
            center_k,
            center_v,
            v_error,
            q8,
            k8,
            q_scale,
            k_scale,
            *strides[:6],
            tokens,
            **wide,
            STEP=STEP,
            COLUMNS=columns,
            BLOCK=BLOCK,
            num_warps=8,
        )
