"""Rows of one byte an element, each with a scale of its own: what fp8 linears read, and what small slots keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""The largest magnitude of each one-byte dtype; that of a row is scaled to it."""
DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""What settings call them."""
TINY = 1e-30
"""Least magnitude that a row is scaled by, so that a row of zeros has a scale too."""


@dataclass(frozen=True)
class Quantized:
    """Rows [..., C]: ``values * row_scale[..., None]``.

    Parameters
    ----------
    values : Tensor
        [..., C], float8_e4m3fn or int8.
    row_scale : Tensor
        [...] float32, contiguous.
    """

    values: Tensor
    row_scale: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Quantized:
        """Room for rows of `shape`; ValueError for a dtype that is not in `LIMITS`."""
        if dtype not in LIMITS:
            raise ValueError(f"dtype: got {dtype}, must be one of {', '.join(map(str, LIMITS))}")
        values = torch.empty(shape, dtype=dtype, device=device)
        return cls(values, torch.empty(shape[:-1], dtype=torch.float32, device=device))

    @property
    def shape(self) -> torch.Size:
        """Of the values."""
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.row_scale.nbytes

    def view(self, *shape: int) -> Quantized:
        """The same rows under another leading shape."""
        return Quantized(self.values.view(shape), self.row_scale.view(shape[:-1]))

    def flatten(self) -> Quantized:
        """All rows as one list: [M, C]."""
        return self.view(self.row_scale.numel(), self.shape[-1])


def split(rows: Tensor | Quantized | None) -> tuple[Tensor | None, Tensor | None]:
    """Values and row scales, as the schema of an op and the arguments of a kernel have them."""
    return (rows.values, rows.row_scale) if isinstance(rows, Quantized) else (rows, None)


def join(values: Tensor | None, row_scale: Tensor | None) -> Tensor | Quantized | None:
    """What `split` took apart."""
    return values if values is None or row_scale is None else Quantized(values, row_scale)
