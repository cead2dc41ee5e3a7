"""The pass between two GEMMs: reference and Triton against a float64 formulation of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pab_kernels import ops
from pab_kernels.ops.quantized import Quantized
from pab_kernels.triton_ops import residual_norm_modulate as kernels
from tests.residual_tools import EPS, SIZES, TOLERANCES, WHERE, Case, expected, needs_gpu, needs_interpreter


@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_sizes(backend, device, size, dtype, atol, rtol):
    Case(size, dtype=dtype, device=device).check(backend, atol, rtol)


@pytest.mark.parametrize(("backend", "device"), [WHERE[0], WHERE[2]])
def test_many_rows(backend, device):
    """Too many for the interpreter, which takes 6 ms a row."""
    Case((1, 1590, 72), dtype=torch.bfloat16, device=device).check(backend, 2e-2, 1.6e-2)


@pytest.mark.parametrize("modulated", [True, False], ids=["modulated", "plain"])
@pytest.mark.parametrize("periods", [None, 1, 3, 6], ids=lambda p: f"embed{p}")
@pytest.mark.parametrize(
    "gated", [(), (True,), (False,), (True, False), (False, True, True), (True, True, False, True)], ids=str
)
@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_branches_and_embed(backend, device, gated, periods, modulated):
    case = Case((2, 6, 72), gated, modulated=modulated, periods=periods, device=device)
    before = case.x.clone()
    case.check(backend, 2e-5, 1e-5)
    if not gated and periods is None:
        assert torch.equal(case.x, before), "x was written though there was nothing to add"


def test_reference_keeps_float64():
    Case((2, 63, 72), (True, False), periods=3, dtype=torch.float64).check("reference", 1e-12, 1e-12)


@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_strides(backend, device):
    """x, branches and out cut out of wider tensors, modulation out of one table, a group that all share."""
    case = Case((3, 5, 72), (True, False), device=device)
    wide = torch.full((5, 2, 3, 80), 7.0, device=device)
    cut = [wide.clone().permute(2, 1, 0, 3)[:, 1, :, :72] for _ in range(4)]
    for view, value in zip(cut, (case.x, *case.branches, case.out), strict=True):
        view.copy_(value)
    case.x, *case.branches, case.out = cut
    table = torch.randn(3, 6, 72, device=device)
    case.shift, case.scale, case.gates[0] = table[:, 0], table[:, 1], table[:1, 2].expand(3, 72)
    branches = [branch.clone() for branch in case.branches]
    case.check(backend, 2e-5, 1e-5)
    for branch, before in zip(case.branches, branches, strict=True):
        assert torch.equal(branch, before)
    for view in cut:
        whole = view.as_strided(wide.shape, wide.stride(), 0)
        assert (whole[:, 0] == 7).all(), "wrote between the rows"
        assert (whole[..., 72:] == 7).all(), "wrote beyond the channels"


@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_large_mean(backend, device):
    """A single-pass variance, E[x^2] - E[x]^2, would be off by several percent here."""
    case = Case((1, 3, 1152), (False,), device=device)
    case.x += 1e3
    case.check(backend, 1e-3, 1e-4)


@pytest.mark.parametrize(("backend", "device"), WHERE)
def test_norm_sees_the_unrounded_sum(backend, device):
    """256 + 0.5 rounds back to 256 in bfloat16; the norm must still see the halves."""
    x = torch.full((1, 1, 8), 256.0, dtype=torch.bfloat16, device=device)
    branch = torch.tensor([0.5, -0.5] * 4, dtype=torch.bfloat16, device=device).view(1, 1, 8)
    zero = torch.zeros(1, 8, dtype=torch.bfloat16, device=device)
    y = ops.residual_norm_modulate(x, [branch], shift=zero, scale=zero, backend=backend)
    torch.testing.assert_close(y, branch * 2)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_interpreter)])
def test_any_shape(backend, data):
    periods = data.draw(st.none() | st.integers(1, 3), label="P")
    rows = data.draw(st.integers(1, 4), label="rows of a period") * (periods or 1)
    size = (data.draw(st.integers(1, 3), label="G"), rows, data.draw(st.integers(2, 150), label="C"))
    gated = data.draw(st.lists(st.booleans(), max_size=4), label="gated")
    case = Case(size, gated, modulated=data.draw(st.booleans(), label="modulated"), periods=periods)
    # Rows of two nearly equal channels make any norm ill-conditioned: keep them apart.
    case.x[..., 0] += 4
    case.check(backend, 1e-4, 1e-4)


@needs_interpreter
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 16])
def test_rows_of_a_program(rows):
    case = Case((2, 5, 72))
    _, y = expected(case.x, case.branches, case.gates, case.shift, case.scale)
    kernels.residual_norm_modulate_triton(
        case.x,
        case.branches,
        case.gates,
        case.shift,
        case.scale,
        None,
        "layer",
        None,
        EPS,
        case.out,
        config=kernels.Config(rows, warps=1),
    )
    torch.testing.assert_close(case.out.double(), y, atol=2e-5, rtol=1e-5)


def test_default_configs():
    assert [kernels.default_config(1, channels).warps for channels in (8, 1152, 1153, 2304, 4608)] == [1, 1, 2, 2, 4]
    per_program = [kernels.default_config(rows, 1152).rows for rows in (1, 4320, 47700)]
    assert per_program == sorted(per_program)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_interpreter)])
def test_nothing_to_do(backend):
    x = torch.randn(2, 3, 8)
    before = x.clone()
    assert ops.residual_norm_modulate(x, backend=backend) is x
    assert torch.equal(x, before)
    empty, vector = torch.empty(2, 0, 8), torch.zeros(2, 8)
    assert ops.residual_norm_modulate(empty, shift=vector, scale=vector, backend=backend).shape == (2, 0, 8)


def test_new_output_is_contiguous():
    x, vector = torch.randn(3, 2, 8).transpose(0, 1), torch.zeros(2, 8)
    assert ops.residual_norm_modulate(x, shift=vector, scale=vector).is_contiguous()


X, BRANCH, VECTOR = torch.zeros(2, 6, 8), torch.zeros(2, 6, 8), torch.zeros(2, 8)
BYTES = Quantized.empty((2, 6, 8), torch.int8, "cpu")
ERRORS = {
    "x is no tensor": ((0,), {}, TypeError, r"x: got int, must be a torch\.Tensor"),
    "integer x": ((X.int(),), {}, TypeError, r"x: dtype is torch\.int32, must be one of .*torch\.float32"),
    "x of two dimensions": ((X[0],), {}, ValueError, r"x: shape is \[6, 8\], must be \[G, N, C\]"),
    "strided channels": ((X.mT,), {}, ValueError, r"x: stride of the last dimension is 8, must be 1"),
    "five branches": ((X, [BRANCH] * 5), {}, ValueError, r"branches: got 5, must be at most 4"),
    "gates missing": ((X, [BRANCH], []), {}, ValueError, r"gates: got 0 for 1 branches, must be one each"),
    "branch shape": ((X, [X[:1]]), {}, ValueError, r"branches\[0\]: shape is \[1, 6, 8\], must be \[2, 6, 8\]"),
    "branch dtype": ((X, [BRANCH.half()]), {}, TypeError, r"branches\[0\]: dtype is torch\.float16, must be .*float32"),
    "branch device": ((X, [BRANCH.to("meta")]), {}, ValueError, r"branches\[0\]: device is meta, must be cpu"),
    "gate shape": ((X, [BRANCH], [X]), {}, ValueError, r"gates\[0\]: shape is \[2, 6, 8\], must be \[2, 8\]"),
    "norm": ((X,), {"norm": "batch"}, ValueError, r"norm: got 'batch', must be 'layer', 'rms' or None"),
    "out alone": ((X,), {"out": BRANCH}, ValueError, r"out: got a tensor without a norm, must be None"),
    "shift dtype": ((X, (), None, VECTOR.half()), {}, TypeError, r"shift: dtype is torch\.float16, must be .*float32"),
    "index dtype": (
        (X, [BRANCH], [VECTOR]),
        {"index": torch.zeros(2, 6)},
        ValueError,
        r"index: is torch\.float32 on cpu, must be contiguous torch\.int32 on cpu",
    ),
    "index shape": (
        (X, [BRANCH], [VECTOR]),
        {"index": torch.zeros(12, dtype=torch.int32)},
        ValueError,
        r"index: shape is \[12\], must be \[2, 6\]",
    ),
    "index of two sizes": (
        (X, [BRANCH], [VECTOR], VECTOR[:1]),
        {"index": torch.zeros(2, 6, dtype=torch.int32)},
        ValueError,
        r"index: rows of \{'gates\[0\]': 2, 'shift': 1\} differ, must be the same number",
    ),
    "saved alone": (
        (X,),
        {"saved": BYTES},
        ValueError,
        r"saved: given without branches, must be None where there is nothing to save",
    ),
    "change alone": ((X, [BRANCH]), {"change": BRANCH}, ValueError, r"change: must be None without `saved`"),
    "change of another sort": (
        (X, [BRANCH]),
        {"saved": BYTES, "change": BRANCH},
        ValueError,
        r"change: must be None without `saved`, and Quantized where that is",
    ),
    "saved dtype": (
        (X, [BRANCH]),
        {"saved": Quantized(BRANCH, BYTES.row_scale)},
        TypeError,
        r"saved\.values: dtype is torch\.float32, must be one of torch\.float8_e4m3fn, torch\.int8",
    ),
    "quantized out shape": (
        (X,),
        {"out": BYTES.view(1, 12, 8)},
        ValueError,
        r"out\.values: shape is \[1, 12, 8\], must be \[2, 6, 8\]",
    ),
    "row scale shape": (
        (X, [Quantized(BYTES.values, torch.zeros(2, 5))]),
        {},
        ValueError,
        r"branches\[0\]\.row_scale: shape is \[2, 5\], must be \[2, 6\]",
    ),
    "row scale dtype": (
        (X, [Quantized(BYTES.values, torch.zeros(2, 6, dtype=torch.float64))]),
        {},
        TypeError,
        r"branches\[0\]\.row_scale: is torch\.float64 of strides \(6, 1\), must be contiguous float32",
    ),
    "embed rows": ((X,), {"embed": torch.zeros(4, 8)}, ValueError, r"embed: has 4 rows, must divide the 6 rows of x"),
    "out shape": (
        (X, (), None, VECTOR, VECTOR),
        {"out": X[:1]},
        ValueError,
        r"out: shape is \[1, 6, 8\], must be \[2, 6, 8\]",
    ),
    "backend": (
        (X, [BRANCH]),
        {"backend": "cuda"},
        ValueError,
        r"backend: got 'cuda', must be one of triton, reference",
    ),
    "float64 on triton": (
        (X.double(), [BRANCH.double()]),
        {"backend": "triton"},
        ValueError,
        r"backend: triton got torch\.float64, must be float32, float16 or bfloat16",
    ),
}


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        ops.residual_norm_modulate(*args, **kwargs)


def test_triton_refuses_cpu_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"backend: triton got a tensor on cpu, must be on a CUDA device"):
        ops.residual_norm_modulate(X.clone(), [BRANCH], backend="triton")


@pytest.mark.parametrize("modulated", [True, False], ids=["modulated", "plain"])
def test_opcheck(modulated):
    case = Case((2, 6, 8), (True, False), modulated=modulated, periods=3)
    args: Any = (case.x, case.branches, [None] * 2, case.gates, case.shift, case.scale, case.embed)
    args = (*args, "layer" if modulated else None, None, EPS, case.out, *(None,) * 5, "reference")
    torch.library.opcheck(torch.ops.pab.residual_norm_modulate.default, args)


def test_compiles_into_one_graph():
    def step(x, branch, gate, shift, scale):
        return ops.residual_norm_modulate(x * 2, [branch], [gate], shift, scale, backend="reference") + 1

    case = Case((2, 3, 8), (True,))
    args = (case.x, case.branches[0], case.gates[0], case.shift, case.scale)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), step(*args))


@pytest.mark.gpu
@needs_gpu
def test_cuda_graph():
    """Captured once, replayed on new contents of the same buffers."""
    case = Case((2, 63, 1152), dtype=torch.bfloat16, device="cuda")
    args = (case.x, case.branches, case.gates, case.shift, case.scale)
    ops.residual_norm_modulate(*args, out=case.out, backend="triton")  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.residual_norm_modulate(*args, out=case.out, backend="triton")
    for _ in range(2):
        for tensor in (case.x, *case.branches, case.shift, case.scale):
            tensor.normal_()
        case.out.fill_(float("nan"))
        new_x, y = expected(*args)
        graph.replay()
        torch.testing.assert_close(case.x.double(), new_x, atol=2e-2, rtol=1.6e-2)
        torch.testing.assert_close(case.out.double(), y, atol=2e-2, rtol=1.6e-2)
