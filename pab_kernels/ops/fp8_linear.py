"""The public ops of fp8 linears; the pass that feeds them is `ops.residual_norm_modulate`."""

from __future__ import annotations

import torch
from torch import Tensor

from pab_kernels.ops import reference
from pab_kernels.ops.backends import resolve
from pab_kernels.ops.checks import (
    check_float,
    check_last_contiguous,
    check_quantized,
    check_scales,
    check_shape,
    check_tensor,
)
from pab_kernels.ops.quantized import Quantized
from pab_kernels.ops.registration import register, writes_only

E4M3 = torch.float8_e4m3fn


def quantize_weight(weight: Tensor) -> Quantized:
    """A linear's weight [out, in] in e4m3, a scale for each output channel; once a model, so in plain torch."""
    return reference.quantize_ref(weight, Quantized.empty(tuple(weight.shape), E4M3, weight.device))


def gelu_quantize(x: Tensor, *, factors: Tensor | None = None, backend: str | None = None) -> Quantized:
    """GELU (tanh form) of every element, and rows of one byte an element with their scales, in one pass.

    Parameters
    ----------
    x : Tensor
        [M, F], stride 1 for F: what the MLP's first GEMM gave.
    factors : Tensor, optional
        float32 [F]: what each feature is multiplied by after GELU.
    backend : {"triton", "reference"}, optional
        Forces a backend.

    Returns
    -------
    Quantized
        [M, F] e4m3, contiguous. Each row's largest magnitude becomes 448; one rounding from float32.

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, shape, stride, or backend, naming the argument.
    """
    check_float("x", check_tensor("x", x))
    check_shape("x", x, ("M", "F"))
    check_last_contiguous("x", x)
    if factors is not None:
        check_scales("factors", factors, x.shape[1:], x.device)
    out = Quantized.empty(tuple(x.shape), E4M3, x.device)
    if x.numel() > 0:
        name = resolve("gelu_quantize", backend, x, out.values)
        torch.ops.pab.gelu_quantize(x, factors, out.values, out.row_scale, name)
    return out


def _gelu_quantize(x: Tensor, factors: Tensor | None, values: Tensor, row_scale: Tensor, backend: str) -> None:
    if backend == "triton":
        from pab_kernels.triton_ops.gelu_quantize import gelu_quantize_triton

        gelu_quantize_triton(x, factors, values, row_scale)
    else:
        reference.gelu_quantize_ref(x, factors, Quantized(values, row_scale))


def scaled_linear_gelu(
    x: Quantized,
    weight: Quantized,
    bias: Tensor,
    *,
    factors: Tensor | None = None,
    weight_sum: float,
    bias_max: float,
    backend: str | None = None,
) -> Quantized:
    """``gelu_tanh(x @ weight.T + bias) * factors`` of rows and weight in e4m3, again as rows in e4m3.

    The GEMM's epilogue sees a part of each row, so the scale is not that of the row's largest magnitude but of a bound
    on it, known beforehand: ``|gelu(h)| <= |h| <= max|x| * weight_sum + bias_max``, and ``max|x|`` is 448 times the
    row's scale. Nothing can overflow. And next to nothing is lost: e4m3 is a floating-point format of 15 binades, so a
    scale too large by 2**n takes n of them from the small end and no digits from the rest. For Gaussian rows and
    weights of 1152 channels the bound is about 28 times the largest magnitude; with one channel of x 300 times as large
    as the others, 250 times. What is lost is lost to all features where the weights of one are large, since it sets
    the scale: hence the factors, at most 1, by which the next linear's weight is divided beforehand.

    Parameters
    ----------
    x : Quantized
        [M, C] e4m3, contiguous, scaled so that each row's largest magnitude is 448 (`ops.residual_norm_modulate`).
    weight : Quantized
        [F, C] e4m3, contiguous: a scale for each output channel.
    bias : Tensor
        [F].
    factors : Tensor, optional
        float32 [F]: what each feature is multiplied by after GELU.
    weight_sum : float
        The largest sum of magnitudes of a row of the weight, each times its factor.
    bias_max : float
        The largest magnitude of the bias, likewise.
    backend : {"triton", "scaled_mm", "reference"}, optional
        Forces a backend. "scaled_mm" is cuBLASLt's scaled matmul and `gelu_quantize`, with exact scales.

    Returns
    -------
    Quantized
        [M, F] e4m3, contiguous.

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, shape, stride, device or backend, naming the argument.
    """
    _check_linear(x, weight, bias)
    if factors is not None:
        check_scales("factors", factors, bias.shape, bias.device)
    out = Quantized.empty((x.shape[0], weight.shape[0]), E4M3, bias.device)
    if x.values.numel() > 0:
        torch.ops.pab.scaled_linear_gelu(
            x.values,
            x.row_scale,
            weight.values,
            weight.row_scale,
            bias,
            factors,
            float(weight_sum),
            float(bias_max),
            out.values,
            out.row_scale,
            resolve("scaled_linear_gelu", backend, x.values, weight.values, bias),
        )
    return out


def _scaled_linear_gelu(
    values: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    factors: Tensor | None,
    weight_sum: float,
    bias_max: float,
    out: Tensor,
    out_scale: Tensor,
    backend: str,
) -> None:
    if backend == "triton":
        from pab_kernels.triton_ops.scaled_linear_gelu import scaled_linear_gelu_triton

        bounds = (weight_sum, bias_max)
        scaled_linear_gelu_triton(values, row_scale, weight, weight_scale, bias, factors, *bounds, out, out_scale)
    elif backend == "scaled_mm":
        up = bias.new_empty(out.shape)
        _scaled_linear(values, row_scale, weight, weight_scale, bias, up, backend)
        _gelu_quantize(up, factors, out, out_scale, resolve("gelu_quantize", None, up, out))
    else:
        pair = Quantized(values, row_scale), Quantized(weight, weight_scale)
        reference.scaled_linear_gelu_ref(*pair, bias, factors, weight_sum, bias_max, Quantized(out, out_scale))


def _check_linear(x: Quantized, weight: Quantized, bias: Tensor) -> None:
    check_float("bias", check_tensor("bias", bias))
    check_quantized("x", x, ("M", "C"), bias.device)
    check_quantized("weight", weight, ("F", x.shape[1]), bias.device)
    check_shape("bias", bias, (weight.shape[0],))
    for name, value in (("x.values", x.values), ("weight.values", weight.values)):
        if value.dtype != E4M3 or not value.is_contiguous():
            raise TypeError(f"{name}: is {value.dtype} of strides {value.stride()}, must be contiguous {E4M3}")


def scaled_linear(
    x: Quantized, weight: Quantized, bias: Tensor, out: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """``x @ weight.T + bias`` of rows and weight in e4m3, each with a scale a row, sums in float32.

    Parameters
    ----------
    x : Quantized
        [M, C] e4m3, contiguous.
    weight : Quantized
        [F, C] e4m3, contiguous: a scale for each output channel.
    bias : Tensor
        [F]; its dtype is that of the result.
    out : Tensor, optional
        Contiguous [M, F], dtype of bias.
    backend : {"scaled_mm", "reference"}, optional
        Forces a backend. cuBLASLt's scaled matmul needs bfloat16, and C and F that are multiples of 16.

    Returns
    -------
    Tensor
        `out` [M, F].

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, shape, stride, device or backend, naming the argument.
    """
    _check_linear(x, weight, bias)
    if out is None:
        out = bias.new_empty(x.shape[0], weight.shape[0])
    else:
        check_shape("out", check_tensor("out", out), (x.shape[0], weight.shape[0]))
        if out.dtype != bias.dtype or out.device != bias.device or not out.is_contiguous():
            raise TypeError(f"out: is {out.dtype} on {out.device}, must be contiguous {bias.dtype} on {bias.device}")
    if x.values.numel() > 0:
        name = resolve("scaled_linear", backend, x.values, weight.values, bias)
        torch.ops.pab.scaled_linear(x.values, x.row_scale, weight.values, weight.row_scale, bias, out, name)
    return out


def _scaled_linear(
    values: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, out: Tensor, backend: str
) -> None:
    if backend == "scaled_mm":
        torch._scaled_mm(
            values,
            weight.t(),
            row_scale[:, None],
            weight_scale[None],
            bias=bias,
            out_dtype=out.dtype,
            use_fast_accum=True,
            out=out,
        )
    else:
        reference.scaled_linear_ref(Quantized(values, row_scale), Quantized(weight, weight_scale), bias, out)


register(
    "gelu_quantize(Tensor x, Tensor? factors, Tensor(a!) values, Tensor(b!) row_scale, str backend) -> ()",
    ("values", "row_scale"),
    _gelu_quantize,
    writes_only,
)
register(
    "scaled_linear(Tensor values, Tensor row_scale, Tensor weight, Tensor weight_scale, Tensor bias, Tensor(a!) out, "
    "str backend) -> ()",
    ("out",),
    _scaled_linear,
    writes_only,
)
register(
    "scaled_linear_gelu(Tensor values, Tensor row_scale, Tensor weight, Tensor weight_scale, Tensor bias, "
    "Tensor? factors, float weight_sum, float bias_max, Tensor(a!) out, Tensor(b!) out_scale, str backend) -> ()",
    ("out", "out_scale"),
    _scaled_linear_gelu,
    writes_only,
)
