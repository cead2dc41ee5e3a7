"""The pass between two GEMMs in Triton: add branch outputs to the residual stream, then normalise and modulate.

The work is pure memory traffic, so the kernel is laid out around its loads:

- A row is two tiles, `a` and `z`: the largest power of two below C, and the rest (1152 = 1024 + 128). One tile of
  2048 would mask 44% of its lanes away.
- A warp takes 1152 channels, so that the reductions of the common rows are shuffles without a barrier, and many rows
  are in flight on each multiprocessor.
- Gates, shift and scale are read again for every row: they hit L1, and held in registers they would halve the rows in
  flight (216 registers a thread instead of 102 with one gate).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pab_kernels.ops.quantized import Quantized, split
from pab_kernels.triton_ops.quantize import store_row


@triton.jit
def _load(pointer, mask):
    """Values in float32, zero where masked away."""
    if mask is None:
        return tl.load(pointer).to(tl.float32)
    else:
        return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _branch(branch, row_scale, offset, index, columns, mask):
    """One row of a branch, times its scale where it has one byte an element."""
    value = _load(branch + offset + columns, mask)
    if row_scale is None:
        return value
    else:
        return value * tl.load(row_scale + index)


@triton.jit
def _gated(value, gate, columns, mask):
    if gate is None:
        return value
    else:
        return value * _load(gate + columns, mask)


@triton.jit
def _put(values, row_scale, index, a, z, columns_a, columns_z, mask):
    """Write one row, in one byte an element where it has a scale."""
    if row_scale is not None:
        store_row(values, row_scale, index, a, z, columns_a, columns_z, mask)
    else:
        tl.store(values + columns_a, a.to(values.dtype.element_ty))
        tl.store(values + columns_z, z.to(values.dtype.element_ty), mask=mask)


@triton.jit
def _add(total, branch, row_scale, offset, gate, gate_offset, index, columns, mask):
    """Total plus one row of a branch, gated where it has a gate; the total itself where there is no branch."""
    if branch is None:
        return total
    else:
        value = _branch(branch, row_scale, offset, index, columns, mask)
        return total + _gated(value, None if gate is None else gate + gate_offset, columns, mask)


@triton.jit(do_not_specialize=["rows", "blocks", "rows_per_embed"])
def _residual_norm_modulate_kernel(
    x,  # [G, N, C]
    branch0,  # [G, N, C] or None, like the next three
    branch1,
    branch2,
    branch3,
    row_scale0,  # [G, N] contiguous or None, like the next three
    row_scale1,
    row_scale2,
    row_scale3,
    gate0,  # [G, C] (with vectors [R, C]) or None, like the next three
    gate1,
    gate2,
    gate3,
    shift,  # like the gates
    scale,
    embed,  # [P, C] or None
    vectors,  # int32 [G, N] contiguous or None: each row's row of gates, shift and scale
    out,  # [G, N, C] or None
    out_scale,  # [G, N] contiguous or None
    saved,  # [G, N, C] or None: branch0, maybe in one byte an element
    saved_scale,
    change,  # [G, N, C] or None: branch0 without what `saved` held
    change_scale,
    x_g,  # strides in elements, <tensor>_<dimension>
    x_n,
    branch0_g,
    branch0_n,
    branch1_g,
    branch1_n,
    branch2_g,
    branch2_n,
    branch3_g,
    branch3_n,
    gate0_g,
    gate1_g,
    gate2_g,
    gate3_g,
    shift_g,
    scale_g,
    embed_p,
    out_g,
    out_n,
    saved_g,
    saved_n,
    change_g,
    change_n,
    rows,  # N
    blocks,  # programs a group
    rows_per_embed,  # N / P
    eps,
    NORM: tl.constexpr,  # "layer", "rms" or None
    CHANNELS: tl.constexpr,
    A: tl.constexpr,  # columns of tile a
    Z: tl.constexpr,  # columns of tile z, CHANNELS - A of them in use
    ROWS: tl.constexpr,  # rows of one program
):
    program = tl.program_id(0)
    group = (program // blocks).to(tl.int64)
    first = (program % blocks).to(tl.int64) * ROWS
    a = tl.arange(0, A)
    z = A + tl.arange(0, Z)
    if A + Z == CHANNELS:
        mask = None
    else:
        mask = z < CHANNELS
    for step in range(0, tl.minimum(rows - first, ROWS).to(tl.int32)):
        row = first + step
        index = group * rows + row  # among all rows
        if vectors is None:
            vector = group
        else:
            vector = tl.load(vectors + index).to(tl.int64)
        x_row = x + group * x_g + row * x_n
        sum_a = _load(x_row + a, None)
        sum_z = _load(x_row + z, mask)
        offset0 = group * branch0_g + row * branch0_n
        offset1 = group * branch1_g + row * branch1_n
        offset2 = group * branch2_g + row * branch2_n
        offset3 = group * branch3_g + row * branch3_n
        if saved is not None:
            value_a = _branch(branch0, row_scale0, offset0, index, a, None)
            value_z = _branch(branch0, row_scale0, offset0, index, z, mask)
            offset_saved = group * saved_g + row * saved_n
            if change is not None:
                more_a = value_a - _branch(saved, saved_scale, offset_saved, index, a, None)
                more_z = value_z - _branch(saved, saved_scale, offset_saved, index, z, mask)
                _put(change + group * change_g + row * change_n, change_scale, index, more_a, more_z, a, z, mask)
            _put(saved + offset_saved, saved_scale, index, value_a, value_z, a, z, mask)
            sum_a += _gated(value_a, None if gate0 is None else gate0 + vector * gate0_g, a, None)
            sum_z += _gated(value_z, None if gate0 is None else gate0 + vector * gate0_g, z, mask)
        else:
            sum_a = _add(sum_a, branch0, row_scale0, offset0, gate0, vector * gate0_g, index, a, None)
            sum_z = _add(sum_z, branch0, row_scale0, offset0, gate0, vector * gate0_g, index, z, mask)
        sum_a = _add(sum_a, branch1, row_scale1, offset1, gate1, vector * gate1_g, index, a, None)
        sum_z = _add(sum_z, branch1, row_scale1, offset1, gate1, vector * gate1_g, index, z, mask)
        sum_a = _add(sum_a, branch2, row_scale2, offset2, gate2, vector * gate2_g, index, a, None)
        sum_z = _add(sum_z, branch2, row_scale2, offset2, gate2, vector * gate2_g, index, z, mask)
        sum_a = _add(sum_a, branch3, row_scale3, offset3, gate3, vector * gate3_g, index, a, None)
        sum_z = _add(sum_z, branch3, row_scale3, offset3, gate3, vector * gate3_g, index, z, mask)
        if embed is not None:
            sum_a = _add(sum_a, embed, None, row // rows_per_embed * embed_p, None, 0, 0, a, None)
            sum_z = _add(sum_z, embed, None, row // rows_per_embed * embed_p, None, 0, 0, z, mask)
        if branch0 is not None or embed is not None:
            tl.store(x_row + a, sum_a.to(x.dtype.element_ty))
            tl.store(x_row + z, sum_z.to(x.dtype.element_ty), mask=mask)
        if out is not None:
            if NORM is not None:
                # Both passes of the norm run on registers, so the exact one costs no traffic.
                if NORM == "layer":
                    mean = (tl.sum(sum_a, 0) + tl.sum(sum_z, 0)) / CHANNELS
                    sum_a -= mean
                    sum_z -= mean
                    if mask is not None:
                        sum_z = tl.where(mask, sum_z, 0.0)
                rstd = tl.rsqrt((tl.sum(sum_a * sum_a, 0) + tl.sum(sum_z * sum_z, 0)) / CHANNELS + eps)
                sum_a = sum_a * rstd
                sum_z = sum_z * rstd
                if scale is not None:
                    sum_a *= 1 + _load(scale + vector * scale_g + a, None)
                    sum_z *= 1 + _load(scale + vector * scale_g + z, mask)
                if shift is not None:
                    sum_a += _load(shift + vector * shift_g + a, None)
                    sum_z += _load(shift + vector * shift_g + z, mask)
            _put(out + group * out_g + row * out_n, out_scale, index, sum_a, sum_z, a, z, mask)


INTERPRETED = not isinstance(_residual_norm_modulate_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET was set at import: then CPU tensors are fine."""

CHANNELS_PER_WARP = 1152
"""Widest row for one warp; wider rows take the next power of two of warps."""

ROWS_PER_PROGRAM = ((2048, 2), (0, 1))
"""(least rows G * N, rows of one program): few rows are spread over all multiprocessors, many save launches."""


class Config(NamedTuple):
    """How rows are laid on the device."""

    rows: int
    """Rows of one program."""
    warps: int
    """Warps of one program; all of them share each row."""


def default_config(rows: int, channels: int) -> Config:
    """The config for `rows` = G * N rows, from the tables above."""
    per_program = next(count for least, count in ROWS_PER_PROGRAM if rows >= least)
    return Config(per_program, min(triton.next_power_of_2(triton.cdiv(channels, CHANNELS_PER_WARP)), 32))


def residual_norm_modulate_triton(
    x: Tensor,
    branches: Sequence[Tensor | Quantized],
    gates: list[Tensor | None],
    shift: Tensor | None,
    scale: Tensor | None,
    embed: Tensor | None,
    norm: str | None,
    index: Tensor | None,
    eps: float,
    out: Tensor | Quantized | None,
    saved: Tensor | Quantized | None = None,
    change: Tensor | Quantized | None = None,
    *,
    config: Config | None = None,
) -> None:
    """Launch the pass. The arguments are those of `pab_kernels.ops.residual_norm_modulate`, already checked.

    Parameters
    ----------
    config : Config, optional
        Replaces `default_config`, for sweeps.
    """
    if x.dtype == torch.float64:
        raise ValueError("backend: triton got torch.float64, must be float32, float16 or bfloat16")
    if x.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"backend: triton got a tensor on {x.device}, must be on a CUDA device")
    if not branches and embed is None and out is None:
        return
    groups, rows, channels = x.shape
    if config is None:
        config = default_config(groups * rows, channels)
    blocks = triton.cdiv(rows, config.rows)
    absent = 4 - len(branches)
    parts = [split(branch) for branch in branches]
    values = [value for value, _ in parts]
    row_scales = [row_scale for _, row_scale in parts]
    out_values, out_scale = split(out)
    saved_values, saved_scale = split(saved)
    change_values, change_scale = split(change)
    half = max(triton.next_power_of_2(channels) // 2, 1)
    with torch.cuda.device_of(x):
        _residual_norm_modulate_kernel[(groups * blocks,)](
            x,
            *values,
            *(None,) * absent,
            *row_scales,
            *(None,) * absent,
            *gates,
            *(None,) * absent,
            shift,
            scale,
            embed,
            index,
            out_values,
            out_scale,
            saved_values,
            saved_scale,
            change_values,
            change_scale,
            x.stride(0),
            x.stride(1),
            *(stride for value in values for stride in _row_strides(value)),
            *(0, 0) * absent,
            *(0 if gate is None else gate.stride(0) for gate in gates),
            *(0,) * absent,
            0 if shift is None else shift.stride(0),
            0 if scale is None else scale.stride(0),
            0 if embed is None else embed.stride(0),
            *_row_strides(out_values),
            *_row_strides(saved_values),
            *_row_strides(change_values),
            rows,
            blocks,
            1 if embed is None else rows // embed.shape[0],
            eps,
            NORM=norm,
            CHANNELS=channels,
            A=half,
            Z=triton.next_power_of_2(max(channels - half, 1)),
            ROWS=config.rows,
            num_warps=config.warps,
        )


def _row_strides(values: Tensor | None) -> tuple[int, int]:
    """Of the dimensions G and N."""
    return (0, 0) if values is None else (values.stride(0), values.stride(1))
