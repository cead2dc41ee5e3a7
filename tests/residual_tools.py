"""Inputs of the pass between two GEMMs, and what it must give, by a float64 formulation of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels import ops
from pab_kernels.triton_ops import residual_norm_modulate as kernels

EPS = 1e-6
TOLERANCES = [
    pytest.param(torch.float32, 2e-5, 1e-5, id="float32"),
    pytest.param(torch.float16, 2e-3, 2e-3, id="float16"),
    pytest.param(torch.bfloat16, 2e-2, 1.6e-2, id="bfloat16"),
]
needs_interpreter = pytest.mark.skipif(not kernels.INTERPRETED, reason="Triton's interpreter is off")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
WHERE = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("triton", "cpu", id="triton-interpreted", marks=needs_interpreter),
    pytest.param("triton", "cuda", id="triton-compiled", marks=[pytest.mark.gpu, needs_gpu]),
]
SIZES = [
    (2, 1, 8), (1, 3, 72), (2, 63, 144), (1, 63, 1152), (2, 3, 2304), (1, 3, 4608), (1, 3, 5120), (2, 1, 5376),
    (1, 2, 13824), (3, 5, 100), (2, 3, 1),
]  # fmt: skip


def expected(
    x, branches=(), gates=(), shift=None, scale=None, embed=None, eps=EPS, norm="layer", index=None
) -> tuple[Tensor, Any]:
    """The new x and the modulated rows, in float64; None for the rows where there is neither shift nor scale."""
    if index is None:
        index = torch.arange(x.shape[0], device=x.device)[:, None].expand(x.shape[:2])
    none, one = (torch.full((1, 1), value, dtype=torch.float64, device=x.device) for value in (0.0, 1.0))

    def of_rows(vector: Tensor | None, otherwise: Tensor) -> Tensor:
        return otherwise if vector is None else vector.double()[index.long()]

    total = x.double()
    for branch, gate in zip(branches, gates, strict=True):
        total = torch.addcmul(total, branch.double(), of_rows(gate, one))
    if embed is not None:
        rows = torch.arange(x.shape[1], device=x.device) * embed.shape[0] // x.shape[1]
        total = total + embed.double()[rows]
    if shift is None and scale is None:
        return total, None
    normed = (F.layer_norm if norm == "layer" else F.rms_norm)(total, total.shape[-1:], eps=eps)
    return total, torch.addcmul(of_rows(shift, none), normed, 1 + of_rows(scale, none))


class Case:
    """Inputs of one call. Made on the CPU, so that all backends see the same numbers."""

    def __init__(self, size, gated=(True, False), *, modulated=True, periods=None, dtype=torch.float32, device="cpu"):
        groups, rows, channels = size
        torch.manual_seed(groups * rows + channels)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape).to(dtype).to(device)

        self.x = draw(*size)
        self.branches = [draw(*size) for _ in gated]
        self.gates = [draw(groups, channels) if gate else None for gate in gated]
        self.shift: Any = draw(groups, channels) if modulated else None
        self.scale: Any = draw(groups, channels) if modulated else None
        self.embed = None if periods is None else draw(periods, channels)
        self.out: Any = torch.full(size, float("nan"), dtype=dtype, device=device) if modulated else None

    def check(self, backend: str, atol: float, rtol: float) -> None:
        args = (self.x, self.branches, self.gates, self.shift, self.scale)
        new_x, y = expected(*args, embed=self.embed)
        result = ops.residual_norm_modulate(*args, embed=self.embed, eps=EPS, out=self.out, backend=backend)
        torch.testing.assert_close(self.x.double(), new_x, atol=atol, rtol=rtol)
        if y is None:
            assert result is self.x
        else:
            assert result is self.out
            torch.testing.assert_close(result.double(), y, atol=atol, rtol=rtol)
