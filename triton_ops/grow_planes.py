"""Linear upsampling of video planes in Triton: Open-Sora-Plan 1.2's before a convolution, and 1.1's in time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 8192
"""Elements of a program."""


@triton.jit
def _neighbours(at, last):
    """What pixel `at` of an axis of twice the length lies between, and how near the second is; `last` is the end."""
    near = at // 2
    other = tl.where(at % 2 == 0, near - 1, near + 1)
    return near, tl.minimum(tl.maximum(other, 0), last)


@triton.jit(do_not_specialize=["frames", "height", "width"])
def _grow_planes_kernel(
    x,  # [T, H, W, C]; H and W count the zeros
    out,  # [T', H', W', C]
    frames,
    height,
    width,
    CHANNELS: tl.constexpr,
    SPACE: tl.constexpr,
    TIMES: tl.constexpr,
    ROWS: tl.constexpr,
):
    frame = tl.program_id(1)
    c = tl.arange(0, CHANNELS)
    out_width, out_height = SPACE * (width - 1) + 1, SPACE * (height - 1) + 1
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, column = pixel // out_width, pixel % out_width
    inside = (row < out_height - 1) & (column < out_width - 1)
    if SPACE == 2:
        near_row, other_row = _neighbours(row, height - 2)
        near_column, other_column = _neighbours(column, width - 2)
    else:
        near_row, other_row, near_column, other_column = row, row, column, column
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    if TIMES == 2:
        # The first frame stays one, the others are an axis of their own.
        near, other = _neighbours(tl.maximum(frame - 1, 0), frames - 2)
        near, other = tl.where(frame > 0, near + 1, 0), tl.where(frame > 0, other + 1, 0)
    else:
        near, other = frame, frame
    for t in tl.static_range(TIMES):
        time = other if t == 1 else near
        share_t = (0.25 if t == 1 else 0.75) if TIMES == 2 else 1.0
        for down in tl.static_range(SPACE):
            for right in tl.static_range(SPACE):
                at_row = other_row if down == 1 else near_row
                at_column = other_column if right == 1 else near_column
                share = share_t
                if SPACE == 2:
                    share = share * (0.25 if down == 1 else 0.75) * (0.25 if right == 1 else 0.75)
                at = (time.to(tl.int64) * height + at_row) * width + at_column
                at = at[:, None] * CHANNELS + c[None, :]
                total += share * tl.load(x + at, mask=inside[:, None], other=0.0).to(tl.float32)
    at = frame.to(tl.int64) * out_height * out_width + pixel
    tl.store(
        out + at[:, None] * CHANNELS + c[None, :],
        total.to(out.dtype.element_ty),
        mask=(pixel < out_height * out_width)[:, None],
    )


INTERPRETED = not isinstance(_grow_planes_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET was set at import: then CPU tensors are fine."""


def grow_planes_triton(x: Tensor, times: int, space: int, out: Tensor) -> None:
    """Launch the pass. The arguments are those of `pab_kernels.ops.planes.grow_planes`, already checked."""
    if x.dtype == torch.float64:
        raise ValueError("backend: triton got torch.float64, must be float32, float16 or bfloat16")
    if x.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"backend: triton got a tensor on {x.device}, must be on a CUDA device")
    frames, height, width, channels = x.shape
    rows = max(1, TILE // channels)
    pixels = out.shape[1] * out.shape[2]
    with torch.cuda.device_of(x):
        _grow_planes_kernel[(triton.cdiv(pixels, rows), out.shape[0])](
            x, out, frames, height, width, CHANNELS=channels, SPACE=space, TIMES=times, ROWS=rows, num_warps=8
        )
