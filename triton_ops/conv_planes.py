"""Convolutions of video planes as GEMMs of shifted rows, in Triton.

A plane has a row and a column of zeros at its end (`pab_kernels.ops.planes`), so in memory every tap of the kernel is
the same matrix of pixels, begun some rows earlier or later: a tile of it is one box of the copy engine, which also
fills in zeros before the first row and beyond the last. There is no im2col, no padded copy, and no gather.

The epilogue adds bias and residual, puts the zeros of the plane back, and sums each channel for the norm that follows.
Upsampled planes are never made: each of the pixels that one becomes has its own kernel of 2 x 2 taps ("phases").
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


# Neither sizes nor widths are constants: a decoder has dozens of them, and each kernel takes seconds to compile.
@triton.jit(do_not_specialize=["residual_scale", "frames", "height", "width", "tiles"])
def _conv_planes_kernel(
    x,  # tensor descriptors of x [T * H * W, C] and weight [P * N, TAPS * C]; H and W count the zeros
    weight,
    bias,  # [TIMES * N] or None
    residual,  # as out, or None
    out,  # [T * TIMES, H', W', N]
    sums,  # [T * TIMES, tiles * SPACE**2, N, 2] or None
    residual_scale,
    frames,  # T
    height,  # H
    width,  # W
    tiles,  # row tiles of a frame
    channels,  # C
    features,  # N
    FRAMES: tl.constexpr,  # taps in time, the last of them the frame itself
    SIDE: tl.constexpr,  # taps in height and width
    FIRST: tl.constexpr,  # whether the first frame stands before itself; otherwise zeros
    TIMES: tl.constexpr,  # frames that one becomes
    SPACE: tl.constexpr,  # 2: each pixel becomes 2 x 2; 1
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    columns = tl.cdiv(features, BN)
    phases: tl.constexpr = TIMES * SPACE * SPACE
    chunks = channels // BK
    pixels = height * width
    for tile in tl.range(tl.program_id(0), frames * tiles * phases * columns, PROGRAMS, flatten=FLATTEN):
        n = tile % columns * BN
        phase = tile // columns % phases
        m = tile // (columns * phases) % tiles * BM
        frame = tile // (columns * phases) // tiles
        later, down, right = phase // (SPACE * SPACE), phase // SPACE % SPACE, phase % SPACE
        top = down - 1 if SPACE == 2 else -(SIDE // 2)
        left = right - 1 if SPACE == 2 else -(SIDE // 2)
        if FIRST:
            start = 0
        else:
            start = tl.maximum(FRAMES - 1 - frame, 0) * SIDE * SIDE * chunks  # taps before the video are zeros
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(start, FRAMES * SIDE * SIDE * chunks):
            tap, chunk = k // chunks, k % chunks
            source = tl.maximum(frame + tap // (SIDE * SIDE) - (FRAMES - 1), 0)
            shift = (tap // SIDE % SIDE + top) * width + tap % SIDE + left
            a = x.load([source * pixels + m + shift, chunk * BK])
            b = weight.load([phase * features + n, k * BK])
            total = tl.dot(a, b.T, total)
        at_m, at_n = m + tl.arange(0, BM), n + tl.arange(0, BN)
        row, column = at_m // width, at_m % width
        inside = (row < height - 1) & (column < width - 1)
        if bias is not None:
            total += tl.load(bias + later * features + at_n, mask=at_n < features, other=0.0).to(tl.float32)[None, :]
        out_width = SPACE * (width - 1) + 1
        out_pixels = out_width * (SPACE * (height - 1) + 1)
        out_row, out_column = SPACE * row + down, SPACE * column + right
        # The zeros of a plane that grew are those of its first phases.
        written = (at_m < pixels) & (out_row <= SPACE * (height - 1)) & (out_column < out_width)
        mask = written[:, None] & (at_n < features)[None, :]
        at = (frame * TIMES + later).to(tl.int64) * out_pixels + out_row * out_width + out_column
        at = at[:, None] * features + at_n[None, :]
        if residual is not None:
            total += residual_scale * tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        total = tl.where(inside[:, None], total, 0.0)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)
        if sums is not None:
            part = (frame * TIMES + later) * tiles * SPACE * SPACE + m // BM * SPACE * SPACE + phase % (SPACE * SPACE)
            at_sum = sums + (part * features + at_n) * 2
            tl.store(at_sum, tl.sum(total, 0), mask=at_n < features)
            tl.store(at_sum + 1, tl.sum(total * total, 0), mask=at_n < features)


INTERPRETED = not isinstance(_conv_planes_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET was set at import: then CPU tensors are fine."""


class Config(NamedTuple):
    """A tile, and how it is worked on."""

    bm: int = 256
    bn: int = 128
    bk: int = 64
    warps: int = 8
    stages: int = 4
    flatten: bool = True


def default_config(weight: Tensor) -> Config:
    """The config for a weight [P, N, KT, K, K, C].

    Measured on an H200 with bias, residual and sums: where a tile has few products, its epilogue counts, and two small
    programs a multiprocessor cover each other's; where it has many, a large tile reads less.
    """
    features, channels = weight.shape[1], weight.shape[-1]
    bk = next(size for size in (64, 32, 16) if channels % size == 0)
    steps = weight[0, 0].numel() // bk
    if features <= 16:
        return Config(128, 16, bk, warps=4)
    if steps <= 16 or (steps <= 36 and features <= 128):
        return Config(128, 128, bk, warps=4, stages=3)
    return Config(256, 128, bk, flatten=False)


def row_tiles(pixels: int, config: Config) -> int:
    """Tiles of a frame."""
    return triton.cdiv(pixels, config.bm)


def conv_planes_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_scale: float,
    first: bool,
    times: int,
    space: int,
    out: Tensor,
    sums: Tensor | None,
    *,
    config: Config | None = None,
) -> None:
    """Launch the convolution. The arguments are those of `pab_kernels.ops.planes.conv_planes`, already checked.

    Parameters
    ----------
    sums : Tensor, optional
        float32 [T * times, parts, N, 2]; `parts` is `row_tiles` times `space` squared.
    config : Config, optional
        Replaces `default_config`, for sweeps.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    if x.dtype not in (torch.float16, torch.bfloat16) and not INTERPRETED:
        raise ValueError(f"backend: triton got {x.dtype}, must be float16 or bfloat16")
    if x.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"backend: triton got a tensor on {x.device}, must be on a CUDA device")
    frames, height, width, channels = x.shape
    phases, features, taps_in_time, side = weight.shape[:4]
    config = config or default_config(weight)
    tiles = row_tiles(height * width, config)
    work = frames * tiles * phases * triton.cdiv(features, config.bn)
    processors = 2 if INTERPRETED else torch.cuda.get_device_properties(x.device).multi_processor_count
    programs = processors * (2 if config.warps == 4 else 1)  # whatever the size: it is part of the compiled kernel
    with torch.cuda.device_of(x):
        _conv_planes_kernel[(min(work, programs),)](
            TensorDescriptor.from_tensor(x.view(-1, channels), [config.bm, config.bk]),
            TensorDescriptor.from_tensor(weight.view(phases * features, -1), [config.bn, config.bk]),
            bias,
            residual,
            out,
            sums,
            residual_scale,
            frames,
            height,
            width,
            tiles,
            channels,
            features,
            FRAMES=taps_in_time,
            SIDE=side,
            FIRST=first,
            TIMES=times,
            SPACE=space,
            BM=config.bm,
            BN=config.bn,
            BK=config.bk,
            PROGRAMS=programs,
            FLATTEN=config.flatten,
            num_warps=config.warps,
            num_stages=config.stages,
        )
