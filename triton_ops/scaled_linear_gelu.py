"""The first GEMM of an MLP in fp8, with bias, GELU and quantisation in its epilogue, in Triton.

What cuBLASLt's scaled matmul leaves undone here: it has no GELU for scales of rows, and its bfloat16 result would be
written, read and written again. The epilogue cannot know a row's largest magnitude, which lies in other tiles, so it
scales by a bound on it (`ops.fp8_linear.scaled_linear_gelu` says which, and why that costs next to nothing).

Persistent programs walk over tiles in groups that share rows of x; the flattened loop lets the next tile's loads run
under an epilogue.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pab_kernels.triton_ops.quantize import E4M3_LIMIT


@triton.jit
def _tanh(x, HARDWARE: tl.constexpr):
    """Within 2**-11, the GPU's own; e4m3 keeps 4 bits. The interpreter has no inline assembly."""
    if HARDWARE:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 2 / (1 + tl.exp(-2 * x)) - 1


@triton.jit
def _scaled_linear_gelu_kernel(
    x,  # tensor descriptors of x [M, C], weight [F, C], values [M, F]
    weight,
    values,
    row_scale,  # [M] of x
    weight_scale,  # [F]
    bias,  # [F]
    factors,  # [F] float32 or None
    out_scale,  # [M]
    weight_sum,
    bias_max,
    rows,  # M
    CHANNELS: tl.constexpr,  # C
    FEATURES: tl.constexpr,  # F
    BM: tl.constexpr,  # rows, features and channels of a tile
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,  # row tiles of a group
    PROGRAMS: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    columns: tl.constexpr = (FEATURES + BN - 1) // BN
    row_tiles = tl.cdiv(rows, BM)
    for tile in tl.range(tl.program_id(0), row_tiles * columns, PROGRAMS, flatten=True):
        first = tile // (GROUP * columns) * GROUP
        height = tl.minimum(row_tiles - first, GROUP)
        m = (first + tile % (GROUP * columns) % height) * BM
        n = tile % (GROUP * columns) // height * BN
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(0, CHANNELS, BK):
            total = tl.dot(x.load([m, k]), weight.load([n, k]).T, total)
        at_m, at_n = m + tl.arange(0, BM), n + tl.arange(0, BN)
        in_scale = tl.load(row_scale + at_m, mask=at_m < rows, other=1.0)
        scale = in_scale * weight_sum + bias_max / E4M3_LIMIT
        columns_scale = tl.load(weight_scale + at_n, mask=at_n < FEATURES, other=0.0)
        added = tl.load(bias + at_n, mask=at_n < FEATURES, other=0.0).to(tl.float32)
        h = total * in_scale[:, None] * columns_scale[None, :] + added[None, :]
        u = 0.7978845608028654 * h * (1 + 0.044715 * h * h)
        y = h * (1 / scale)[:, None]
        if factors is not None:
            half = 0.5 * tl.load(factors + at_n, mask=at_n < FEATURES, other=0.0)
            y *= half[None, :] + half[None, :] * _tanh(u, HARDWARE)
        else:
            y *= 0.5 + 0.5 * _tanh(u, HARDWARE)
        values.store([m, n], y.to(tl.float8e4nv))
        tl.store(out_scale + at_m, scale, mask=at_m < rows)  # every tile of these rows writes the same


INTERPRETED = not isinstance(_scaled_linear_gelu_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET was set at import: then CPU tensors are fine."""


class Config(NamedTuple):
    """A tile, and how it is worked on."""

    bm: int = 128
    bn: int = 256
    bk: int = 128
    group: int = 8
    warps: int = 8
    stages: int = 3


def scaled_linear_gelu_triton(
    x: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    factors: Tensor | None,
    weight_sum: float,
    bias_max: float,
    values: Tensor,
    out_scale: Tensor,
    *,
    config: Config | None = None,
) -> None:
    """Launch the GEMM. The arguments are those of `pab_kernels.ops.fp8_linear.scaled_linear_gelu`, already checked.

    Parameters
    ----------
    config : Config, optional
        Replaces the default, for sweeps.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    if x.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"backend: triton got a tensor on {x.device}, must be on a CUDA device")
    config = config or Config()
    (rows, channels), features = x.shape, weight.shape[0]
    tiles = triton.cdiv(rows, config.bm) * triton.cdiv(features, config.bn)
    processors = 2 if INTERPRETED else torch.cuda.get_device_properties(x.device).multi_processor_count
    programs = min(tiles, processors)
    with torch.cuda.device_of(x):
        _scaled_linear_gelu_kernel[(programs,)](
            TensorDescriptor.from_tensor(x, [config.bm, config.bk]),
            TensorDescriptor.from_tensor(weight, [config.bn, config.bk]),
            TensorDescriptor.from_tensor(values, [config.bm, config.bn]),
            row_scale,
            weight_scale,
            bias,
            factors,
            out_scale,
            weight_sum,
            bias_max,
            rows,
            CHANNELS=channels,
            FEATURES=features,
            BM=config.bm,
            BN=config.bn,
            BK=config.bk,
            GROUP=config.group,
            PROGRAMS=programs,
            HARDWARE=not INTERPRETED,
            num_warps=config.warps,
            num_stages=config.stages,
        )
