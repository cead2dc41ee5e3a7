"""GroupNorm and SiLU of video planes in Triton: sums of channels, and the pass that applies them.

Pure memory traffic: the sums read the planes once (where the convolution before has not left them already), the second
pass reads and writes them once and keeps their zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 8192
"""Elements of a tile; a program takes several, one after the other."""


@triton.jit(do_not_specialize=["pixels"])
def _channel_sums_kernel(
    x,  # [T, P, C] with P pixels a frame, its zeros among them
    sums,  # [T, blocks, C, 2]
    pixels,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,  # of a tile
    STEPS: tl.constexpr,  # tiles of a program
):
    frame, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    c = tl.arange(0, CHANNELS)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    for step in range(STEPS):
        row = (block * STEPS + step) * ROWS + tl.arange(0, ROWS)
        at = (frame * pixels + row)[:, None] * CHANNELS + c[None, :]
        value = tl.load(x + at, mask=(row < pixels)[:, None], other=0.0).to(tl.float32)
        total += value
        squares += value * value
    at_sum = sums + ((frame * tl.num_programs(0) + block) * CHANNELS + c) * 2
    tl.store(at_sum, tl.sum(total, 0))
    tl.store(at_sum + 1, tl.sum(squares, 0))


@triton.jit(do_not_specialize=["pixels", "width", "height", "sum_t", "count"])
def _group_norm_silu_kernel(
    x,  # [T, P, C]
    sums,  # [T or 1, C, 2]
    weight,  # [C]
    bias,
    out,  # [T, P, C]
    pixels,  # P = height * width, the zeros among them
    width,
    height,
    sum_t,  # stride in elements; 0 where all frames share their sums
    count,  # values of a group
    eps,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    frame, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    c = tl.arange(0, CHANNELS)
    each: tl.constexpr = CHANNELS // GROUPS
    at_sum = sums + frame * sum_t + c * 2
    mean = tl.sum(tl.load(at_sum).reshape(GROUPS, each), 1) / count
    square = tl.sum(tl.load(at_sum + 1).reshape(GROUPS, each), 1) / count
    rstd = tl.rsqrt(tl.maximum(square - mean * mean, 0.0) + eps)
    mean = tl.broadcast_to(mean[:, None], (GROUPS, each)).reshape(CHANNELS)
    rstd = tl.broadcast_to(rstd[:, None], (GROUPS, each)).reshape(CHANNELS)
    scale = rstd * tl.load(weight + c).to(tl.float32)
    shift = tl.load(bias + c).to(tl.float32) - mean * scale
    for step in range(STEPS):
        row = (block * STEPS + step) * ROWS + tl.arange(0, ROWS)
        at = (frame * pixels + row)[:, None] * CHANNELS + c[None, :]
        mask = (row < pixels)[:, None]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
        if SILU:
            value = value / (1 + tl.exp(-value))
        inside = (row // width < height - 1) & (row % width < width - 1)
        tl.store(out + at, tl.where(inside[:, None], value, 0.0).to(out.dtype.element_ty), mask=mask)


INTERPRETED = not isinstance(_group_norm_silu_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET was set at import: then CPU tensors are fine."""


def _rows_and_steps(channels: int, steps: int) -> tuple[int, int]:
    return max(1, TILE // channels), steps


def _check(x: Tensor) -> None:
    if x.dtype == torch.float64:
        raise ValueError("backend: triton got torch.float64, must be float32, float16 or bfloat16")
    if x.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"backend: triton got a tensor on {x.device}, must be on a CUDA device")


def channel_sums_triton(x: Tensor, *, steps: int = 8) -> Tensor:
    """Sums and sums of squares [T, parts, C, 2] of planes x [T, H, W, C], whose zeros add nothing."""
    _check(x)
    frames, channels, pixels = x.shape[0], x.shape[3], x.shape[1] * x.shape[2]
    rows, steps = _rows_and_steps(channels, steps)
    blocks = triton.cdiv(pixels, rows * steps)
    sums = torch.empty(frames, blocks, channels, 2, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _channel_sums_kernel[(blocks, frames)](x, sums, pixels, CHANNELS=channels, ROWS=rows, STEPS=steps, num_warps=8)
    return sums


def group_norm_silu_triton(
    x: Tensor,
    sums: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    out: Tensor,
    *,
    steps: int = 8,
) -> None:
    """Launch the pass. The arguments are those of `pab_kernels.ops.planes.group_norm_silu`, already checked."""
    _check(x)
    frames, height, width, channels = x.shape
    rows, steps = _rows_and_steps(channels, steps)
    real = (height - 1) * (width - 1) * channels // groups
    with torch.cuda.device_of(x):
        _group_norm_silu_kernel[(triton.cdiv(height * width, rows * steps), frames)](
            x,
            sums,
            weight,
            bias,
            out,
            height * width,
            width,
            height,
            0 if sums.shape[0] == 1 else sums.stride(0),
            float(real * (frames if sums.shape[0] == 1 else 1)),
            eps,
            CHANNELS=channels,
            GROUPS=groups,
            SILU=silu,
            ROWS=rows,
            STEPS=steps,
            num_warps=8,
        )
