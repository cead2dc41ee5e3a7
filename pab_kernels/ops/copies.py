"""Copies of strided rows: by a kernel, or by the copy engines beside kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from pab_kernels.ops import backends

ROW = 2**10
"""Least bytes of a row that the copy engines move as fast as a kernel does: seen on an H200 from 1,536 on."""


def copy_beside(to: Tensor, source: Tensor) -> None:
    """Copy `source` into `to`, both of one shape and dtype, by the copy engines if rows are long.

    They leave the multiprocessors to what runs beside: on an H200 four GEMMs took 386 to 394 us, 409 us with such a
    copy from another GPU beside them, and 641 us with one by a kernel, which took 264 us by itself.
    """
    layout = _rows(to, source)
    if backends._C is None or not to.is_cuda or layout is None or layout[0][2] < ROW:
        copy_rows(to, source)
        return
    shape, to_strides, source_strides = layout
    backends._C.copy_rows(
        to=to.data_ptr(),
        to_strides=to_strides,
        source=source.data_ptr(),
        source_strides=source_strides,
        shape=shape,
        device=to.device.index,
        stream=torch.cuda.current_stream(to.device).cuda_stream,
    )


def _rows(to: Tensor, source: Tensor) -> tuple[list[int], list[int], list[int]] | None:
    """Blocks, rows and bytes of a row that is dense in both, and their strides in bytes; None if it is more nested."""
    size = to.element_size()
    width = size
    nested: list[tuple[int, ...]] = []  # from within: the number and both strides of what is not dense
    for number, *strides in zip(*(reversed(each) for each in (to.shape, to.stride(), source.stride())), strict=True):
        if number == 1:
            continue
        steps = [stride * size for stride in strides]
        if nested and all(step == inner * nested[-1][0] for step, inner in zip(steps, nested[-1][1:], strict=True)):
            nested[-1] = (nested[-1][0] * number, *nested[-1][1:])
        elif not nested and all(step == width for step in steps):
            width *= number
        else:
            nested.append((number, *steps))
    if len(nested) > 2:
        return None
    rows, blocks = [*nested, *[(1, width, width)] * 2][:2]
    return [blocks[0], rows[0], width], [blocks[1], rows[1]], [blocks[2], rows[2]]


def copy_rows(to: Tensor, source: Tensor) -> None:
    """Copy, 8 bytes at a time where the layouts allow it: torch moves strided tensors element by element."""
    pair = [to, source]
    per = 8 // to.element_size()
    wide = all(
        tensor.ndim > 0
        and tensor.stride(-1) == 1
        and not (tensor.shape[-1] % per or tensor.storage_offset() % per or any(s % per for s in tensor.stride()[:-1]))
        for tensor in pair
    )
    if per > 1 and wide:
        to, source = (tensor.view(torch.int64) for tensor in pair)
    to.copy_(source)
