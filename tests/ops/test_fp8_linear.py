"""The ops of fp8 linears: each backend against a float64 formulation of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pab_kernels.ops import fp8_linear as fp8_linear
from pab_kernels.ops.quantized import Quantized
from pab_kernels.triton_ops import gelu_quantize as kernels
from tests.quantized_tools import check_rows, interpret_e4m3

E4M3 = torch.float8_e4m3fn
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
has_fp8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
needs_fp8 = pytest.mark.skipif(not has_fp8, reason="no GPU with fp8 tensor cores")
GELU = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param(
        "triton",
        "cpu",
        id="triton-interpreted",
        marks=pytest.mark.skipif(not kernels.INTERPRETED, reason="Triton's interpreter is off"),
    ),
    pytest.param("triton", "cuda", id="triton-compiled", marks=[pytest.mark.gpu, needs_gpu]),
]


@pytest.fixture(autouse=True)
def _e4m3(monkeypatch):
    if kernels.INTERPRETED:
        interpret_e4m3(monkeypatch)


def gelu(x):
    x = x.double()
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (3, 64), (5, 100), (3, 4608), (1, 9216)], ids=str)
@pytest.mark.parametrize(("backend", "device"), GELU)
def test_gelu_quantize(backend, device, size, dtype):
    x = (torch.randn(size) * 3).to(dtype).to(device)
    check_rows(fp8_linear.gelu_quantize(x, backend=backend), gelu(x), atol=1e-5)


@pytest.mark.parametrize(("backend", "device"), GELU)
def test_gelu_quantize_factors(backend, device):
    x, factors = torch.randn(7, 100).to(device) * 3, torch.exp2(-torch.arange(100.0) % 5).to(device)
    check_rows(fp8_linear.gelu_quantize(x, factors=factors, backend=backend), gelu(x) * factors.double(), atol=1e-5)


@pytest.mark.parametrize(("backend", "device"), GELU)
def test_gelu_quantize_extremes(backend, device):
    """A strided input, far tails, a row that is all but zero, and a NaN."""
    x = torch.randn(4, 200, device=device)[:, 10:110]
    x[0, :4] = torch.tensor([-1e4, 1e4, -10.0, 0.0])
    x[1] = -60.0  # GELU gives -0
    x[2, 5] = float("nan")
    result = fp8_linear.gelu_quantize(x, backend=backend)
    for row in (0, 1, 3):
        check_rows(Quantized(result.values[row], result.row_scale[row]), gelu(x[row]))
    assert result.row_scale[2].isnan()


def quantized(rows: int, channels: int, device: str) -> Quantized:
    values = (torch.randn(rows, channels) * 100).clamp(-448, 448).to(E4M3).to(device)
    return Quantized(values, torch.rand(rows).add(0.1).to(device))


LINEAR = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("scaled_mm", "cuda", id="scaled_mm", marks=[pytest.mark.gpu, needs_fp8]),
]


@pytest.mark.parametrize("given", [True, False], ids=["into out", "new"])
@pytest.mark.parametrize("size", [(1, 16, 16), (37, 144, 48), (1590, 1152, 3456), (4321, 4608, 1152)], ids=str)
@pytest.mark.parametrize(("backend", "device"), LINEAR)
def test_scaled_linear(backend, device, size, given):
    rows, channels, features = size
    x, weight = quantized(rows, channels, device), quantized(features, channels, device)
    bias = torch.randn(features).bfloat16().to(device)
    wide_x, wide_weight = (each.values.double() * each.row_scale.double()[:, None] for each in (x, weight))
    out = torch.full((rows, features), float("nan"), dtype=torch.bfloat16, device=device) if given else None
    result = fp8_linear.scaled_linear(x, weight, bias, out, backend=backend)
    assert out is None or result is out
    wanted = wide_x @ wide_weight.T + bias.double()
    assert ((result.double() - wanted).norm() / wanted.norm()).item() < 3e-3  # bfloat16 keeps 8 bits
    torch.testing.assert_close(result.double(), wanted, rtol=1.6e-2, atol=float(wanted.abs().max()) * 4e-3)


LINEAR_GELU = [
    LINEAR[0],
    pytest.param(
        "triton",
        "cpu",
        id="triton-interpreted",
        marks=pytest.mark.skipif(not kernels.INTERPRETED, reason="Triton's interpreter is off"),
    ),
    pytest.param("triton", "cuda", id="triton-compiled", marks=[pytest.mark.gpu, needs_fp8]),
    LINEAR[1],
]


@pytest.mark.parametrize("given", [False, True], ids=["", "factors"])
@pytest.mark.parametrize("size", [(1, 16, 16), (37, 144, 48), (300, 160, 272), (1590, 1152, 4608)], ids=str)
@pytest.mark.parametrize(("backend", "device"), LINEAR_GELU)
def test_scaled_linear_gelu(backend, device, size, given):
    """In e4m3 within its rounding, whatever scale a backend takes, and nothing near the end of its range lost."""
    rows, channels, features = size
    if backend == "triton" and device == "cpu" and rows > 300:
        pytest.skip("too large for the interpreter")
    x = fp8_linear.quantize_weight(torch.randn(rows, channels).to(device))
    weight = fp8_linear.quantize_weight(torch.randn(features, channels).to(device) * channels**-0.5)
    bias = torch.randn(features).bfloat16().to(device)
    wide_x, wide_weight = (each.values.double() * each.row_scale.double()[:, None] for each in (x, weight))
    factors = torch.exp2(-torch.randint(0, 4, (features,)).float()).to(device)
    bounds = {
        "weight_sum": float((wide_weight.abs().sum(1) * factors).max()),
        "bias_max": float((bias.abs() * factors).max()),
    }
    if not given:
        bounds = {"weight_sum": float(wide_weight.abs().sum(1).max()), "bias_max": float(bias.abs().max())}
    options: dict[str, Any] = {**bounds, "factors": factors if given else None, "backend": backend}
    result = fp8_linear.scaled_linear_gelu(x, weight, bias, **options)
    wanted = gelu(wide_x @ wide_weight.T + bias.double()) * (factors.double() if given else 1)
    got = result.values.double() * result.row_scale.double()[:, None]
    # Half a step of e4m3: 2**-4 of a value, 2**-10 of the scale below its normal range; bfloat16 in between; and
    # tensor cores keep about 13 bits of a sum of many products.
    allowed = (2**-4 + 2**-7) * wanted.abs() + result.row_scale.double()[:, None] * 2**-9 + 1e-2
    assert ((got - wanted).abs() <= allowed).all()
    if wanted.numel() > 1000:  # of few values one alone may be off by more
        assert ((got - wanted).norm() / wanted.norm()).item() < 0.03


def test_quantized_weight():
    weight = torch.randn(24, 40) * torch.rand(24, 1)
    check_rows(fp8_linear.quantize_weight(weight), weight, atol=0)


ROWS = quantized(3, 16, "cpu")
WEIGHT = quantized(8, 16, "cpu")
BIAS = torch.zeros(8)
ERRORS = {
    "channels": (ROWS, quantized(8, 32, "cpu"), BIAS, {}, ValueError, r"weight\.values: shape is \[8, 32\]"),
    "int8": (
        Quantized(ROWS.values.to(torch.int8), ROWS.row_scale),
        WEIGHT,
        BIAS,
        {},
        TypeError,
        r"x\.values: is torch\.int8 of strides \(16, 1\), must be contiguous torch\.float8_e4m3fn",
    ),
    "bias": (ROWS, WEIGHT, BIAS[:4], {}, ValueError, r"bias: shape is \[4\], must be \[8\]"),
    "out": (
        ROWS,
        WEIGHT,
        BIAS,
        {"out": torch.zeros(3, 8).half()},
        TypeError,
        r"out: is torch\.float16 on cpu, must be",
    ),
    "backend": (ROWS, WEIGHT, BIAS, {"backend": "triton"}, ValueError, r"must be one of scaled_mm, reference"),
}


@pytest.mark.parametrize(("x", "weight", "bias", "kwargs", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(x, weight, bias, kwargs, error, message):
    with pytest.raises(error, match=message):
        fp8_linear.scaled_linear(x, weight, bias, **kwargs)


def test_opcheck():
    """But for its comparison of values, which torch has not for e4m3."""
    utils = ("test_autograd_registration", "test_faketensor")
    x, out = torch.randn(3, 16), Quantized.empty((3, 16), E4M3, "cpu")
    gelu_args = (x, None, out.values, out.row_scale, "reference")
    torch.library.opcheck(torch.ops.pab.gelu_quantize.default, gelu_args, test_utils=utils)
    args: tuple[object, ...] = (
        ROWS.values,
        ROWS.row_scale,
        WEIGHT.values,
        WEIGHT.row_scale,
        BIAS,
        torch.empty(3, 8),
        "reference",
    )
    torch.library.opcheck(torch.ops.pab.scaled_linear.default, args, test_utils=utils)
    out = Quantized.empty((3, 8), E4M3, "cpu")
    args = (*args[:5], torch.ones(8), 1.0, 1.0, out.values, out.row_scale, "reference")
    torch.library.opcheck(torch.ops.pab.scaled_linear_gelu.default, args, test_utils=utils)


def test_no_rows():
    empty = Quantized.empty((0, 16), E4M3, "cpu")
    assert fp8_linear.scaled_linear(empty, WEIGHT, BIAS).shape == (0, 8)
    assert fp8_linear.gelu_quantize(torch.empty(0, 16)).shape == (0, 16)
