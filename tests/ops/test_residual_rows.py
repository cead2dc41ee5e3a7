"""The pass between two GEMMs on rows of one byte an element: written, saved, and read back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pab_kernels import ops
from pab_kernels.ops.quantized import Quantized
from pab_kernels.triton_ops import residual_norm_modulate as kernels
from tests.quantized_tools import DTYPES, check_rows, interpret_e4m3, poisoned
from tests.residual_tools import EPS, WHERE, Case, expected


@pytest.fixture
def _e4m3(monkeypatch):
    if kernels.INTERPRETED:
        interpret_e4m3(monkeypatch)


@pytest.mark.usefixtures("_e4m3")
@pytest.mark.parametrize("modulated", [True, False], ids=["modulated", "plain"])
@pytest.mark.parametrize("byte", DTYPES)
@pytest.mark.parametrize("size", [(2, 1, 8), (1, 3, 72), (2, 3, 1152), (1, 2, 5376), (3, 5, 100), (2, 3, 1)], ids=str)
@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_quantized_output(backend, device, size, byte, modulated):
    """Modulated rows, or a copy of the stream, in one byte an element; x itself as ever."""
    case = Case(size, modulated=modulated, device=device)
    case.x[..., 0] += 4  # rows of few nearly equal channels make any norm ill-conditioned
    args = (case.x, case.branches, case.gates, case.shift, case.scale)
    new_x, y = expected(*args)
    out = poisoned(size, byte, device)
    assert ops.residual_norm_modulate(*args, eps=EPS, out=out, backend=backend) is out
    torch.testing.assert_close(case.x.double(), new_x, atol=2e-5, rtol=1e-5)
    check_rows(out, new_x if y is None else y, atol=5e-5)


@pytest.mark.usefixtures("_e4m3")
@pytest.mark.parametrize("byte", DTYPES)
@pytest.mark.parametrize("gated", [(True,), (False, True), (True, True, False, True)], ids=str)
@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_saved_and_read_back(backend, device, gated, byte):
    """The first branch is saved without its gate; as a branch of another call it stands for what was saved."""
    size = (2, 5, 72)
    case = Case(size, gated, device=device)
    args = (case.x, case.branches, case.gates, case.shift, case.scale)
    new_x, y = expected(*args)
    saved = poisoned(size, byte, device)
    result = ops.residual_norm_modulate(*args, eps=EPS, out=case.out, saved=saved, backend=backend)
    torch.testing.assert_close(case.x.double(), new_x, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(result.double(), y, atol=2e-5, rtol=1e-5)
    check_rows(saved, case.branches[0], atol=0)

    wide = saved.values.double() * saved.row_scale.double()[..., None]
    for place in range(len(gated)):
        branches: list[Tensor | Quantized] = list(case.branches)
        exact = [branch.double() for branch in case.branches]
        branches[place], exact[place] = saved, wide
        x = torch.randn(size, device=device)
        new_x, y = expected(x, exact, case.gates, case.shift, case.scale)
        result = ops.residual_norm_modulate(x, branches, case.gates, case.shift, case.scale, eps=EPS, backend=backend)
        torch.testing.assert_close(x.double(), new_x, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(result.double(), y, atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("_e4m3")
@pytest.mark.parametrize("byte", DTYPES)
@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_quantized_rows_hide_nothing(backend, device, byte):
    """A row of zeros stays one, and a NaN makes its whole row NaN, but no other."""
    case = Case((1, 3, 72), (False,), modulated=False, device=device)
    case.x.zero_()
    case.branches[0][0, 0] = 0
    case.branches[0][0, 2, 70] = float("nan")
    saved, out = (poisoned((1, 3, 72), byte, device) for _ in range(2))
    ops.residual_norm_modulate(case.x, case.branches, out=out, saved=saved, backend=backend)
    for rows in (saved, out):
        wide = rows.values.float() * rows.row_scale[..., None]
        assert (wide[0, 0] == 0).all()
        check_rows(Quantized(rows.values[:, 1], rows.row_scale[:, 1]), case.branches[0][:, 1])
        assert wide[0, 2].isnan().all()


@pytest.mark.usefixtures("_e4m3")
@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_quantized_strides(backend, device):
    """Values cut out of wider tensors; nothing is written beyond them."""
    case = Case((3, 5, 72), (False,), device=device)
    wide = torch.full((2, 5, 3, 80), 7, dtype=torch.int8, device=device)
    out, saved = (Quantized(w.transpose(0, 1)[..., :72], torch.empty(3, 5, device=device)) for w in wide)
    args = (case.x, case.branches, case.gates, case.shift, case.scale)
    _, y = expected(*args)
    ops.residual_norm_modulate(*args, eps=EPS, out=out, saved=saved, backend=backend)
    assert y is not None
    check_rows(out, y, atol=5e-5)
    check_rows(saved, case.branches[0], atol=0)
    assert (wide[..., 72:] == 7).all()
