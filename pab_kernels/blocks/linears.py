"""The GEMMs of a block: a linear in the model's dtype, or in fp8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels.ops import fp8_linear as fp8_linear
from pab_kernels.ops.quantized import TINY, Quantized


@dataclass(frozen=True)
class Linear:
    """Weight [out, in] and bias [out] of ``y = x @ weight.T + bias``."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Fp8Linear:
    """The same in fp8, for Quantized input: weight [out, in] e4m3 with a scale for each output channel, bias [out]."""

    weight: Quantized
    bias: Tensor
    weight_sum: float
    """The largest sum of magnitudes of a row of the weight; with `bias_max` it bounds what comes out."""
    bias_max: float
    factors: Tensor | None = None
    """float32 [out]: what the features are multiplied by before they are rounded to e4m3, and what both bounds are of.
    Where there are some, the next linear's weight makes up for them."""

    @classmethod
    def of(cls, linear: Linear, factors: Tensor | None = None, bounded: slice = slice(None)) -> Fp8Linear:
        """Quantise the weight; `bounded` are the features that the bounds are of. Waits for the GPU."""
        weight = fp8_linear.quantize_weight(linear.weight)
        sums = weight.values.float().abs().sum(1) * weight.row_scale
        largest = linear.bias.float().abs()
        if factors is not None:
            sums, largest = sums * factors, largest * factors
        bias_max = max(float(largest[bounded].max()), TINY)  # where all is zero, values are divided by the bound too
        return cls(weight, linear.bias, float(sums[bounded].max()), bias_max, factors)


def balancing_factors(weight: Tensor) -> Tensor:
    """For each feature of a weight [out, in] a power of two, at most 1, float32 [out].

    With it, no feature's sum of magnitudes is more than twice the median one of those that are not zero (as pruned ones
    are, which say nothing of the others). A scale by a bound on all features, as
    `ops.fp8_linear.scaled_linear_gelu` takes, is then that of an ordinary feature; and multiplying by the factors, and
    dividing the next linear's columns by them, rounds nothing.
    """
    sums = weight.float().abs().sum(1)
    excess = sums / sums.where(sums > 0, torch.nan).nanmedian().nan_to_num().clamp(min=TINY)
    return torch.exp2(-torch.log2(excess).floor().clamp(min=0))


Rows = Tensor | Quantized
"""What a linear reads: an `Fp8Linear` takes Quantized e4m3, a `Linear` a tensor."""


def linear(x: Rows, weights: Linear | Fp8Linear, out: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` for x [..., in]; into `out` [..., features] (contiguous) where given."""
    flat = None if out is None else out.view(-1, out.shape[-1])
    if isinstance(weights, Fp8Linear):
        if not isinstance(x, Quantized):
            raise TypeError(f"x: got {type(x).__name__}, must be Quantized because the weight is")
        y = fp8_linear.scaled_linear(x.flatten(), weights.weight, weights.bias, flat)
        return y.view(*x.shape[:-1], -1) if out is None else out
    if isinstance(x, Quantized):
        raise TypeError("x: got Quantized, must be a tensor because the weight is")
    if out is None:
        return F.linear(x, weights.weight, weights.bias)
    torch.addmm(weights.bias, x.reshape(-1, x.shape[-1]), weights.weight.t(), out=flat)
    return out
