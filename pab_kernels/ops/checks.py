"""Shape, dtype and device errors of the public ops: each names the argument, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pab_kernels.ops.quantized import LIMITS, Quantized

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensor(name: str, value: object) -> Tensor:
    """Return `value` as a tensor, or raise TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, must be a torch.Tensor")
    return value


def check_float(name: str, value: Tensor) -> None:
    """Raise unless `value` has one of the supported floating dtypes."""
    if value.dtype not in FLOATS:
        allowed = ", ".join(str(dtype) for dtype in FLOATS)
        raise TypeError(f"{name}: dtype is {value.dtype}, must be one of {allowed}")


def check_shape(name: str, value: Tensor, expected: Sequence[int | str]) -> None:
    """Raise unless the shape fits `expected`, where a string names a free dimension."""
    shape = tuple(value.shape)
    fits = len(shape) == len(expected) and all(
        isinstance(want, str) or got == want for got, want in zip(shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(want) for want in expected)
        raise ValueError(f"{name}: shape is {list(shape)}, must be [{wanted}]")


def check_like(name: str, value: Tensor, model: Tensor, model_name: str) -> None:
    """Raise unless `value` has the dtype and device of `model`."""
    if value.dtype != model.dtype:
        raise TypeError(f"{name}: dtype is {value.dtype}, must be {model.dtype}, the dtype of {model_name}")
    if value.device != model.device:
        raise ValueError(f"{name}: device is {value.device}, must be {model.device}, where {model_name} is")


def check_last_contiguous(name: str, value: Tensor) -> None:
    """Raise unless the last dimension has stride 1."""
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(f"{name}: stride of the last dimension is {value.stride(-1)}, must be 1")


def check_scales(name: str, value: Tensor, expected: Sequence[int | str], device: torch.device) -> None:
    """Raise unless `value` is contiguous float32 of the expected shape on `device`."""
    check_shape(name, check_tensor(name, value), expected)
    if value.dtype != torch.float32 or not value.is_contiguous():
        raise TypeError(f"{name}: is {value.dtype} of strides {value.stride()}, must be contiguous float32")
    if value.device != device:
        raise ValueError(f"{name}: device is {value.device}, must be {device}")


def check_quantized(name: str, value: Quantized, expected: Sequence[int | str], device: torch.device) -> None:
    """Raise unless `value` has values of the expected shape and of one byte an element, and a scale for each row."""
    values, row_scale = value.values, value.row_scale
    check_shape(f"{name}.values", values, expected)
    if values.dtype not in LIMITS:
        raise TypeError(f"{name}.values: dtype is {values.dtype}, must be one of {', '.join(map(str, LIMITS))}")
    check_last_contiguous(f"{name}.values", values)
    if values.device != device:
        raise ValueError(f"{name}.values: device is {values.device}, must be {device}")
    check_scales(f"{name}.row_scale", row_scale, tuple(values.shape[:-1]), device)
