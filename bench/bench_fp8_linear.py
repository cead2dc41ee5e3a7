"""Linears in fp8 against those in bfloat16, in TFLOP/s: the GEMM alone, and the MLP's first with GELU and quantisation.

`pytest -m gpu bench/bench_fp8_linear.py`. Rows are those of Open-Sora 480p, 360p, 144p and Latte; "mlp up" is timed
as what an MLP needs of it: GELU applied, and for fp8 the rows quantised again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels.blocks.linears import Fp8Linear, Linear, Rows, linear
from pab_kernels.ops import fp8_linear as fp8_linear
from pab_kernels.ops.backends import no_fp8
from pab_kernels.ops.quantized import Quantized
from pab_kernels.ops.reference import dequantize_ref, quantize_ref

from .common import median_ms, record, rotations

ROWS = {"480p": 47700, "latte": 32768, "360p": 27600, "144p": 4320}
GEMMS = {"qkv": (1152, 3456), "cross q": (1152, 1152), "mlp down": (4608, 1152)}
needs_fp8 = pytest.mark.skipif(
    not torch.cuda.is_available() or no_fp8(torch.device("cuda")) is not None, reason="no GPU with fp8 tensor cores"
)


@dataclass
class Inputs:
    """One linear both ways, and its input both ways."""

    wide: Tensor
    rows: Quantized
    linear: Linear
    fp8: Fp8Linear
    out: Tensor

    @classmethod
    def make(cls, rows: int, channels: int, features: int) -> Inputs:
        wide = torch.randn(rows, channels, dtype=torch.bfloat16, device="cuda")
        weight = torch.randn(features, channels, dtype=torch.bfloat16, device="cuda") * channels**-0.5
        plain = Linear(weight, torch.randn(features, dtype=torch.bfloat16, device="cuda"))
        quantized = quantize_ref(wide, Quantized.empty((rows, channels), fp8_linear.E4M3, "cuda"))
        return cls(wide, quantized, plain, Fp8Linear.of(plain), wide.new_empty(rows, features))

    @classmethod
    def rotated(cls, rows: int, channels: int, features: int) -> list[Inputs]:
        """As many sets as keep L2 from serving one from the call before."""
        count = rotations(rows * (channels + 2 * features))
        return [cls.make(rows, channels, features) for _ in range(count)]


def run_bf16(i: Inputs) -> Rows:
    return linear(i.wide, i.linear, i.out)


def run_fp8(i: Inputs) -> Rows:
    return linear(i.rows, i.fp8, i.out)


def up_bf16(i: Inputs) -> Rows:
    return torch._addmm_activation(i.linear.bias, i.wide, i.linear.weight.t(), use_gelu=True)


def up_fp8(i: Inputs, backend: str) -> Rows:
    fp8 = i.fp8
    return fp8_linear.scaled_linear_gelu(
        i.rows, fp8.weight, fp8.bias, weight_sum=fp8.weight_sum, bias_max=fp8.bias_max, backend=backend
    )


PLAIN: dict[str, Callable[[Inputs], Rows]] = {"bf16": run_bf16, "scaled_mm": run_fp8}
UP: dict[str, Callable[[Inputs], Rows]] = {
    "bf16": up_bf16,
    "triton": partial(up_fp8, backend="triton"),
    "scaled_mm": partial(up_fp8, backend="scaled_mm"),
}


def check(run: Callable[[Inputs], Rows], i: Inputs, gelu: bool) -> None:
    """Compare one call with the linear in float64: this is to catch wrong results, tests/ judge the digits."""
    got = run(i)
    wide = dequantize_ref(got) if isinstance(got, Quantized) else got
    wanted = F.linear(i.wide.double(), i.linear.weight.double(), i.linear.bias.double())
    wanted = F.gelu(wanted, approximate="tanh") if gelu else wanted
    error = float((wide.double() - wanted).norm() / wanted.norm())
    assert error < 0.06, f"relative error {error:.3f}"  # three roundings to 4 bits at most


def time(benchmark, op: str, backend: str, run: Callable[[Inputs], Rows], sizes: tuple[int, int, int]) -> None:
    inputs = Inputs.rotated(*sizes)
    check(run, inputs[0], op == "mlp up")
    ms = median_ms(run, inputs)
    rate = 2 * sizes[0] * sizes[1] * sizes[2] / ms / 1e9
    record(op, sizes, backend, ms, rate, "TFLOP/s", "bfloat16" if backend == "bf16" else "float8_e4m3fn")
    benchmark.extra_info.update(ms=ms, tflop_per_s=rate)

    def once() -> None:
        run(inputs[0])
        torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=20, warmup_rounds=3)


@pytest.mark.gpu
@needs_fp8
@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("rows", ROWS)
def test_linear(benchmark, rows, gemm, backend):
    time(benchmark, gemm, backend, PLAIN[backend], (ROWS[rows], *GEMMS[gemm]))


@pytest.mark.gpu
@needs_fp8
@pytest.mark.parametrize("backend", UP)
@pytest.mark.parametrize("rows", ROWS)
def test_mlp_up(benchmark, rows, backend):
    time(benchmark, "mlp up", backend, UP[backend], (ROWS[rows], 1152, 4608))
