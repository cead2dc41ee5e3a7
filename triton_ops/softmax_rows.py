"""Softmax of rows of scores in Triton: reads four bytes an element, writes two, where PyTorch makes three passes.

For attention with a head too wide for fused kernels: a row is one tile, kept in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _softmax_rows_kernel(
    scores,  # [M, N] contiguous
    out,  # [M, N] contiguous
    scale,
    columns,  # N
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < columns
    value = tl.load(scores + row * columns + at, mask=mask, other=float("-inf")).to(tl.float32) * scale
    value = tl.exp(value - tl.max(value, 0))
    tl.store(out + row * columns + at, (value / tl.sum(value, 0)).to(out.dtype.element_ty), mask=mask)


INTERPRETED = not isinstance(_softmax_rows_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET was set at import: then CPU tensors are fine."""


def softmax_rows_triton(scores: Tensor, scale: float, out: Tensor) -> None:
    """Launch the pass. The arguments are those of `pab_kernels.ops.planes.softmax_rows`, already checked."""
    if scores.dtype == torch.float64:
        raise ValueError("backend: triton got torch.float64, must be float32, float16 or bfloat16")
    if scores.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"backend: triton got a tensor on {scores.device}, must be on a CUDA device")
    columns = scores.shape[-1]
    with torch.cuda.device_of(scores):
        _softmax_rows_kernel[(scores.numel() // columns,)](
            scores, out, scale, columns, BLOCK=triton.next_power_of_2(columns), num_warps=8
        )
