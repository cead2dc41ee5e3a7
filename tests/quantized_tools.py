"""What tests of one-byte rows share: an independent judge of them, and e4m3 for Triton's interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pab_kernels.ops.quantized import Quantized

DTYPES = [pytest.param(torch.float8_e4m3fn, id="fp8"), pytest.param(torch.int8, id="int8")]
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device = "cpu") -> Quantized:
    """Rows that are NaN until they are written."""
    values = torch.full(shape, -128 if dtype == torch.int8 else float("nan"), device=device).to(dtype)
    return Quantized(values, torch.full(shape[:-1], float("nan"), device=device))


def check_rows(actual: Quantized, wanted: Tensor, atol: float = 1e-5) -> None:
    """Each element must be the nearest that its row's scale allows, `wanted` being known up to `atol`."""
    wanted, dtype = wanted.double().cpu(), actual.values.dtype
    row_scale, values = actual.row_scale.double().cpu(), actual.values.cpu().double()
    largest = wanted.abs().amax(-1).clamp(min=1e-30)
    torch.testing.assert_close(row_scale, largest / LARGEST[dtype], rtol=1e-6, atol=atol / LARGEST[dtype])
    exact = wanted / row_scale[..., None]
    if dtype == torch.int8:
        half = torch.full_like(exact, 0.5)
    else:  # 3 bits after the leading one, down to steps of 2**-9
        half = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=2.0**-6))) - 4)
    slack = atol / row_scale[..., None] + 1e-5 * exact.abs()
    excess = (values - exact).abs() - half - slack
    assert not excess.isnan().any()
    assert excess.max() <= 0, f"off by {excess.max()} more than rounding"


def interpret_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter convert to and from e4m3 as torch does: its own code loses carries and NaN."""
    from triton import language as tl
    from triton.runtime import interpreter

    own: Any = vars(interpreter)["_convert_float"]

    def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if tl.float8e4nv not in (source, target):
            return own(data, source, target, rounding)
        if target == tl.float8e4nv:
            assert source == tl.float32, "the kernels round once, from float32"
            exact = torch.from_numpy(np.ascontiguousarray(data))
            return exact.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        wide = torch.from_numpy(np.ascontiguousarray(data)).view(torch.float8_e4m3fn).float().numpy()
        return wide if target == tl.float32 else own(wide, tl.float32, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
