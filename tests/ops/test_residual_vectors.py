"""The pass between two GEMMs: kinds of norm, vectors left out or in float32, and an index that names them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels import ops
from tests.quantized_tools import check_rows, poisoned
from tests.residual_tools import EPS, WHERE, Case, expected, needs_interpreter

NORMS = ["layer", "rms"]
VECTORS = ["both", "shift", "scale", "neither"]


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [(2, 5, 72), (1, 3, 1152), (1, 2, 5376), (3, 2, 1)], ids=str)
@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_norms(backend, device, size, norm, vectors):
    case = Case(size, device=device)
    case.x += 4  # a mean that RMSNorm must keep and LayerNorm take away
    case.shift = case.shift if vectors in ("both", "shift") else None
    case.scale = case.scale if vectors in ("both", "scale") else None
    args = (case.x, case.branches, case.gates, case.shift, case.scale)
    new_x, y = expected(*args, norm=norm)
    if y is None:
        y = (F.layer_norm if norm == "layer" else F.rms_norm)(new_x, new_x.shape[-1:], eps=EPS)
    result = ops.residual_norm_modulate(*args, norm=norm, eps=EPS, out=case.out, backend=backend)
    assert result is case.out
    torch.testing.assert_close(case.x.double(), new_x, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(result.double(), y, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("backend", "device"), [WHERE[0], WHERE[2]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_vectors_are_not_rounded(backend, device, dtype):
    """A gate of 2**-12 more than 1 on a branch that cancels the stream: in the stream's dtype nothing would be left."""
    x = torch.full((1, 2, 8), -256.0, dtype=dtype, device=device)
    gate = torch.full((1, 8), 1 + 2.0**-12, device=device)
    ops.residual_norm_modulate(x, [-x], [gate], backend=backend)
    assert (x == 256 * 2.0**-12).all()


@pytest.mark.parametrize(("backend", "device"), WHERE)
@pytest.mark.parametrize("wide", [False, True], ids=["same dtype", "float32 vectors"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [(2, 7, 72), (1, 5, 1152), (1, 3, 5120)], ids=str)
def test_index(backend, device, size, norm, wide):
    """Each row names its vectors, in no order; some vectors are named by none, some by many."""
    case = Case(size, (True, False, True), periods=1, dtype=torch.float16 if wide else torch.float32, device=device)
    groups, rows, channels = size
    draw = torch.Generator().manual_seed(groups)
    index = torch.randint(0, 5, (groups, rows), generator=draw, dtype=torch.int32).to(device)

    def vector() -> Tensor:
        drawn = torch.randn(6, channels, generator=draw).to(device)
        drawn[5] = float("nan")  # named by none
        return drawn if wide else drawn.to(case.x.dtype)

    case.gates = [vector(), None, vector()]
    case.shift, case.scale = vector(), vector()
    args: Any = (case.x, case.branches, case.gates, case.shift, case.scale)
    options: Any = {"embed": case.embed, "norm": norm, "index": index}
    new_x, y = expected(*args, **options)
    saved = poisoned(size, torch.int8, device)
    ops.residual_norm_modulate(*args, **options, eps=EPS, out=case.out, saved=saved, backend=backend)
    tolerance: Any = {"atol": 4e-3, "rtol": 2e-3} if wide else {"atol": 1e-4, "rtol": 1e-5}
    torch.testing.assert_close(case.x.double(), new_x, **tolerance)
    torch.testing.assert_close(case.out.double(), y, **tolerance)
    check_rows(saved, case.branches[0], atol=0)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_interpreter)])
def test_an_index_of_groups_gives_the_same_bits_as_none(backend):
    one, two = Case((3, 4, 72)), Case((3, 4, 72))
    index = torch.arange(3, dtype=torch.int32)[:, None].repeat(1, 4)
    for case, given in ((one, None), (two, index)):
        args = (case.x, case.branches, case.gates, case.shift, case.scale)
        ops.residual_norm_modulate(*args, index=given, out=case.out, backend=backend)
    assert torch.equal(one.x, two.x)
    assert torch.equal(one.out, two.out)
