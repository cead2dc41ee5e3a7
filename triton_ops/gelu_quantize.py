"""GELU and quantisation between the two GEMMs of an MLP in Triton: reads two bytes an element, writes one.

For GPUs on which `scaled_linear_gelu` does not run. A row is two tiles as in `residual_norm_modulate` (4608 = 4096 +
512), kept in registers between the search for its largest magnitude and the rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pab_kernels.triton_ops.quantize import store_row


@triton.jit
def _gelu(x):
    """x * Phi(x) in its tanh form, as x * sigmoid(2u): the same function with one exponential."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1 + tl.exp(-2 * u))


@triton.jit
def _gelu_quantize_kernel(
    x,  # [M, F]
    factors,  # [F] float32 or None
    values,  # [M, F] contiguous
    row_scale,  # [M]
    x_m,  # stride in elements
    HIDDEN: tl.constexpr,  # F
    A: tl.constexpr,  # columns of tile a
    Z: tl.constexpr,  # columns of tile z, HIDDEN - A of them in use
):
    row = tl.program_id(0).to(tl.int64)
    a = tl.arange(0, A)
    z = A + tl.arange(0, Z)
    mask = z < HIDDEN
    value_a = _gelu(tl.load(x + row * x_m + a).to(tl.float32))
    value_z = _gelu(tl.load(x + row * x_m + z, mask=mask, other=0.0).to(tl.float32))
    if factors is not None:
        value_a *= tl.load(factors + a)
        value_z *= tl.load(factors + z, mask=mask, other=0.0)
    store_row(values + row * HIDDEN, row_scale, row, value_a, value_z, a, z, mask)


INTERPRETED = not isinstance(_gelu_quantize_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET was set at import: then CPU tensors are fine."""

CHANNELS_PER_WARP = 1152
"""Columns of a row that one warp takes."""


class Config(NamedTuple):
    """How a row is laid on the device."""

    warps: int
    """Warps of one program, which takes one row."""


def default_config(hidden: int) -> Config:
    """The config for rows of `hidden` columns."""
    return Config(min(triton.next_power_of_2(triton.cdiv(hidden, CHANNELS_PER_WARP)), 16))


def gelu_quantize_triton(
    x: Tensor, factors: Tensor | None, values: Tensor, row_scale: Tensor, *, config: Config | None = None
) -> None:
    """Launch the pass. The arguments are those of `pab_kernels.ops.fp8_linear.gelu_quantize`, already checked.

    Parameters
    ----------
    config : Config, optional
        Replaces `default_config`, for sweeps.
    """
    if x.dtype == torch.float64:
        raise ValueError("backend: triton got torch.float64, must be float32, float16 or bfloat16")
    if x.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"backend: triton got a tensor on {x.device}, must be on a CUDA device")
    rows, hidden = x.shape
    config = config or default_config(hidden)
    half = max(triton.next_power_of_2(hidden) // 2, 1)
    with torch.cuda.device_of(x):
        _gelu_quantize_kernel[(rows,)](
            x,
            factors,
            values,
            row_scale,
            x.stride(0),
            HIDDEN=hidden,
            A=half,
            Z=triton.next_power_of_2(max(hidden - half, 1)),
            num_warps=config.warps,
        )
