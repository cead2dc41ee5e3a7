"""What the kernels that write one byte an element share."""

from __future__ import annotations

import triton
import triton.language as tl

from pab_kernels.ops.quantized import LIMITS, TINY

E4M3_LIMIT = tl.constexpr(next(limit for dtype, limit in LIMITS.items() if dtype.is_floating_point))
INT8_LIMIT = tl.constexpr(next(limit for dtype, limit in LIMITS.items() if not dtype.is_floating_point))
LEAST = tl.constexpr(TINY)
ROUNDER = tl.constexpr(1.5 * 2**23)
"""Added to a float32 below 2**22 and taken away again, it leaves the nearest integer, halves to even."""


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_limits(a, z, E4M3: tl.constexpr):
    """For the row in tiles `a` and `z`, zero where masked away: what to multiply it by, and its scale."""
    largest = _larger(tl.reduce(tl.abs(a), 0, _larger), tl.reduce(tl.abs(z), 0, _larger))
    largest = _larger(largest, LEAST)
    limit: tl.constexpr = E4M3_LIMIT if E4M3 else INT8_LIMIT
    return limit / largest, largest / limit


@triton.jit
def to_byte(scaled, E4M3: tl.constexpr):
    """Scaled float32 values in one byte, rounded to nearest even."""
    if E4M3:
        return scaled.to(tl.float8e4nv)
    else:
        return ((scaled + ROUNDER) - ROUNDER).to(tl.int8)


@triton.jit
def store_row(values, row_scale, index, a, z, columns_a, columns_z, mask):
    """Write the row in tiles `a` and `z` to `values`, which points to its first column, and its scale."""
    E4M3: tl.constexpr = values.dtype.element_ty == tl.float8e4nv
    factor, scale = row_limits(a, z, E4M3)
    tl.store(values + columns_a, to_byte(a * factor, E4M3))
    tl.store(values + columns_z, to_byte(z * factor, E4M3), mask=mask)
    tl.store(row_scale + index, scale)
