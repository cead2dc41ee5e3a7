"""The pass between two GEMMs also keeps a branch, and how it has changed since it was kept before."""

import pytest
import torch
from torch import Tensor

from pab_kernels import ops
from pab_kernels.ops.quantized import Quantized
from tests.ops.test_residual_norm_modulate import WHERE
from tests.quantized_tools import DTYPES, check_rows, interpret_e4m3, poisoned

SIZES = [(2, 3, 8), (1, 5, 72), (2, 3, 1152), (3, 5, 100), (1, 2, 1)]


@pytest.fixture(autouse=True)
def _e4m3(monkeypatch):
    interpret_e4m3(monkeypatch)


def rows(size: tuple[int, ...], device: str) -> Tensor:
    return torch.randn(size, device=device)


@pytest.mark.parametrize("modulated", [True, False], ids=["modulated", "plain"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_a_branch_and_its_change_are_kept(backend, device, size, modulated):
    """`saved` becomes the branch, `change` what it has gained; the stream and the modulated rows are as ever."""
    x, branch, old, other = (rows(size, device) for _ in range(4))
    gates = [rows((size[0], size[2]), device), None]
    shift, scale = (rows((size[0], size[2]), device) for _ in range(2)) if modulated else (None, None)
    saved, change = old.clone(), torch.full(size, float("nan"), device=device)
    expected = x.clone()
    wanted = ops.residual_norm_modulate(expected, [branch, other], gates, shift, scale, backend="reference")
    found = ops.residual_norm_modulate(
        x, [branch, other], gates, shift, scale, saved=saved, change=change, backend=backend
    )
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
    assert torch.equal(saved, branch)
    torch.testing.assert_close(change, branch - old)


@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_a_first_copy_needs_no_change(backend, device):
    x, branch = rows((2, 3, 72), device), rows((2, 3, 72), device)
    saved = torch.full((2, 3, 72), float("nan"), device=device)
    ops.residual_norm_modulate(x, [branch], saved=saved, backend=backend)
    assert torch.equal(saved, branch)


@pytest.mark.parametrize("byte", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_in_one_byte_an_element(backend, device, size, byte):
    """The change is against what was kept, rounding included, so an error made once is not carried on."""
    x, branch = rows(size, device), rows(size, device)
    saved, change = poisoned(size, byte, device), poisoned(size, byte, device)
    first = rows(size, device)
    ops.residual_norm_modulate(rows(size, device), [first], saved=saved, backend=backend)
    kept = saved.values.float() * saved.row_scale[..., None]
    ops.residual_norm_modulate(x, [branch], saved=saved, change=change, backend=backend)
    check_rows(saved, branch, atol=0)
    check_rows(change, branch - kept, atol=1e-6)


@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_strides(backend, device):
    """Rows cut out of wider tensors; nothing is written beyond them."""
    wide = torch.full((2, 5, 3, 80), 7.0, device=device)
    saved, change = (w[..., :72].transpose(0, 1) for w in wide.unbind(0))
    x, branch = rows((3, 5, 72), device), rows((3, 5, 72), device)
    ops.residual_norm_modulate(x, [branch], saved=saved, change=change, backend=backend)
    assert torch.equal(saved, branch)
    torch.testing.assert_close(change, branch - 7)
    assert (wide[..., 72:] == 7).all()


def test_quantized_halves_of_a_slot():
    """The first rows of a slot, for a batch whose other half does not run."""
    slot = poisoned((4, 3, 8), torch.int8)
    half = Quantized(slot.values[2:], slot.row_scale[2:])
    branch = rows((2, 3, 8), "cpu")
    ops.residual_norm_modulate(rows((2, 3, 8), "cpu"), [branch], saved=half)
    check_rows(half, branch, atol=0)
    assert slot.row_scale[:2].isnan().all()
