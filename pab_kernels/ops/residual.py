"""The pass between two GEMMs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from pab_kernels.ops import reference
from pab_kernels.ops.backends import resolve
from pab_kernels.ops.checks import (
    check_float,
    check_last_contiguous,
    check_like,
    check_quantized,
    check_shape,
    check_tensor,
)
from pab_kernels.ops.quantized import Quantized, join, split
from pab_kernels.ops.registration import register, writes_only

MAX_BRANCHES = 4
"""Most branch outputs that one pass adds."""

Norm = Literal["layer", "rms"]
"""LayerNorm, or RMSNorm."""


@overload
def residual_norm_modulate(
    x: Tensor,
    branches: Sequence[Tensor | Quantized] = (),
    gates: Sequence[Tensor | None] | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    embed: Tensor | None = None,
    norm: Norm | None = None,
    index: Tensor | None = None,
    eps: float = 1e-6,
    out: Tensor | None = None,
    saved: Tensor | Quantized | None = None,
    change: Tensor | Quantized | None = None,
    backend: str | None = None,
) -> Tensor: ...


@overload
def residual_norm_modulate(
    x: Tensor,
    branches: Sequence[Tensor | Quantized] = (),
    gates: Sequence[Tensor | None] | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    embed: Tensor | None = None,
    norm: Norm | None = None,
    index: Tensor | None = None,
    eps: float = 1e-6,
    out: Quantized,
    saved: Tensor | Quantized | None = None,
    change: Tensor | Quantized | None = None,
    backend: str | None = None,
) -> Quantized: ...


@overload
def residual_norm_modulate(
    x: Tensor,
    branches: Sequence[Tensor | Quantized] = (),
    gates: Sequence[Tensor | None] | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    embed: Tensor | None = None,
    norm: Norm | None = None,
    index: Tensor | None = None,
    eps: float = 1e-6,
    out: Tensor | Quantized | None,
    saved: Tensor | Quantized | None = None,
    change: Tensor | Quantized | None = None,
    backend: str | None = None,
) -> Tensor | Quantized: ...


def residual_norm_modulate(
    x: Tensor,
    branches: Sequence[Tensor | Quantized] = (),
    gates: Sequence[Tensor | None] | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    embed: Tensor | None = None,
    norm: Norm | None = None,
    index: Tensor | None = None,
    eps: float = 1e-6,
    out: Tensor | Quantized | None = None,
    saved: Tensor | Quantized | None = None,
    change: Tensor | Quantized | None = None,
    backend: str | None = None,
) -> Tensor | Quantized:
    """Add branch outputs to the residual stream in place, then normalise and modulate it.

    ``x += sum(gate * branch) + embed``; with a norm, also ``out = norm(x) * (1 + scale) + shift`` (adaLN of DiT,
    arXiv:2212.09748). Affine weights of a norm are a scale of ``weight - 1`` and a shift of ``bias``.
    Sums and norm are float32 (float64 for float64 input on the reference), and the norm sees the sum before it is
    rounded to the dtype of x. So does what is quantised: rows of one byte an element are rounded once, and their scale
    comes from the same registers.

    Parameters
    ----------
    x : Tensor
        Residual stream [G, N, C]; any strides for G and N, stride 1 for C. Written in place where there is
        something to add.
    branches : sequence of (Tensor or Quantized)
        At most 4 of [G, N, C], dtype of x or one byte an element: outputs just computed, or slots. None may overlap x
        or `out`.
    gates : sequence of (Tensor or None), optional
        For each branch its gate [G, C], or None for none. All None by default. Like `shift` and `scale` in the dtype of
        x, or float32.
    shift, scale : Tensor, optional
        Modulation [G, C]: every row of group g uses row g. Either may be left out.
    embed : Tensor, optional
        Position embedding [P, C], P dividing N: row n of each group adds ``embed[n // (N // P)]``. Dtype of x.
    norm : {"layer", "rms"}, optional
        LayerNorm, or RMSNorm (arXiv:1910.07467). By default LayerNorm where `shift` or `scale` is given, else none.
    index : Tensor, optional
        int32 [G, N], contiguous: which row of gates, shift and scale, then [R, C], each row of x takes. Every entry
        must be at least 0 and less than R; that is not checked, since it would wait for the GPU.
    eps : float
        Added to the variance, or the mean square.
    out : Tensor or Quantized, optional
        Where the normed rows go, [G, N, C]. Without a norm only a Quantized: a copy of the new x. Must not overlap x.
    saved : Tensor or Quantized, optional
        Where a copy of ``branches[0]``, not gated, goes, [G, N, C]: how a slot is written whose branch was computed
        elsewhere, as one of one byte an element.
    change : Tensor or Quantized, optional
        Where ``branches[0]`` without what `saved` held before goes, [G, N, C]; Quantized where `saved` is.
    backend : {"triton", "reference"}, optional
        Forces a backend.

    Returns
    -------
    Tensor or Quantized
        `out` [G, N, C], or x itself where there is neither a norm nor `out`.

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, shape, stride or device, naming the argument.
    """
    check_float("x", check_tensor("x", x))
    check_shape("x", x, ("G", "N", "C"))
    check_last_contiguous("x", x)
    groups, rows, channels = x.shape
    gates = [None] * len(branches) if gates is None else list(gates)
    if len(branches) > MAX_BRANCHES:
        raise ValueError(f"branches: got {len(branches)}, must be at most {MAX_BRANCHES}")
    if len(gates) != len(branches):
        raise ValueError(f"gates: got {len(gates)} for {len(branches)} branches, must be one each")
    if norm is None and (shift is not None or scale is not None):
        norm = "layer"
    if norm not in (None, "layer", "rms"):
        raise ValueError(f"norm: got {norm!r}, must be 'layer', 'rms' or None")
    if isinstance(out, Tensor) and norm is None:
        raise ValueError("out: got a tensor without a norm, must be None where nothing is normed")
    if saved is not None and not branches:
        raise ValueError("saved: given without branches, must be None where there is nothing to save")
    if change is not None and (saved is None or isinstance(saved, Quantized) != isinstance(change, Quantized)):
        raise ValueError("change: must be None without `saved`, and Quantized where that is")
    vector = (groups if index is None else "R", channels)
    vectors = [*((f"gates[{i}]", gate) for i, gate in enumerate(gates)), ("shift", shift), ("scale", scale)]
    rows_like: list[tuple[str, Tensor | Quantized | None]] = [
        *((f"branches[{i}]", branch) for i, branch in enumerate(branches)),
        ("out", out),
        ("saved", saved),
        ("change", change),
    ]
    for name, value in rows_like:
        if isinstance(value, Quantized):
            check_quantized(name, value, (groups, rows, channels), x.device)
        elif value is not None:
            _check_operand(name, value, (groups, rows, channels), x)
    for name, value in (*vectors, ("embed", embed)):
        if value is not None:
            _check_operand(name, value, ("P", channels) if name == "embed" else vector, x, wide=name != "embed")
    if index is not None:
        check_shape("index", check_tensor("index", index), (groups, rows))
        if index.dtype != torch.int32 or index.device != x.device or not index.is_contiguous():
            raise ValueError(f"index: is {index.dtype} on {index.device}, must be contiguous torch.int32 on {x.device}")
        counts = {name: len(value) for name, value in vectors if value is not None}
        if len(set(counts.values())) > 1:
            raise ValueError(f"index: rows of {counts} differ, must be the same number")
    if embed is not None and (embed.shape[0] == 0 or rows % embed.shape[0]):
        raise ValueError(f"embed: has {embed.shape[0]} rows, must divide the {rows} rows of x")
    if norm is not None and out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() > 0:
        parts = [split(branch) for branch in branches]
        values, row_scales = [value for value, _ in parts], [row_scale for _, row_scale in parts]
        small = (value.values for _, value in rows_like if isinstance(value, Quantized))
        name = resolve("residual_norm_modulate", backend, x, *small)
        torch.ops.pab.residual_norm_modulate(
            x,
            values,
            row_scales,
            gates,
            shift,
            scale,
            embed,
            norm,
            index,
            float(eps),
            *split(out),
            *split(saved),
            *split(change),
            name,
        )
    return x if out is None else out


def _check_operand(name: str, value: Tensor, shape: tuple[int | str, ...], x: Tensor, *, wide: bool = False) -> None:
    """Raise unless `value` has this shape, and the dtype (with `wide` or float32) and device of x."""
    check_shape(name, check_tensor(name, value), shape)
    if not (wide and value.dtype == torch.float32 and value.device == x.device):
        check_like(name, value, x, "x")
    check_last_contiguous(name, value)


def _residual_norm_modulate(
    x: Tensor,
    values: list[Tensor],
    row_scales: list[Tensor | None],
    gates: list[Tensor | None],
    shift: Tensor | None,
    scale: Tensor | None,
    embed: Tensor | None,
    norm: Norm | None,
    index: Tensor | None,
    eps: float,
    out: Tensor | None,
    out_scale: Tensor | None,
    saved: Tensor | None,
    saved_scale: Tensor | None,
    change: Tensor | None,
    change_scale: Tensor | None,
    backend: str,
) -> None:
    branches: Any = [join(*parts) for parts in zip(values, row_scales, strict=True)]
    targets = join(out, out_scale), join(saved, saved_scale), join(change, change_scale)
    if backend == "triton":
        from pab_kernels.triton_ops.residual_norm_modulate import residual_norm_modulate_triton

        residual_norm_modulate_triton(x, branches, gates, shift, scale, embed, norm, index, eps, *targets)
    else:
        written, copy, difference = targets
        reference.residual_norm_modulate_ref(
            x,
            branches,
            gates,
            shift,
            scale,
            embed=embed,
            norm=norm,
            index=index,
            eps=eps,
            out=written,
            saved=copy,
            change=difference,
        )


register(
    "residual_norm_modulate(Tensor(a!) x, Tensor[] values, Tensor?[] row_scales, Tensor?[] gates, Tensor? shift, "
    "Tensor? scale, Tensor? embed, str? norm, Tensor? index, float eps, Tensor(b!)? out, Tensor(c!)? out_scale, "
    "Tensor(d!)? saved, Tensor(e!)? saved_scale, Tensor(f!)? change, Tensor(g!)? change_scale, str backend) -> ()",
    ("x", "out", "out_scale", "saved", "saved_scale", "change", "change_scale"),
    _residual_norm_modulate,
    writes_only,
)
