"""What all tests share: Triton's interpreter where there is no GPU, the `device` fixture, NaN-poisoned tensors."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    # Read once, when triton is imported: hence here, before any test module.
    os.environ.setdefault("TRITON_INTERPRET", "1")


os.environ["PAB_CACHE"] = tempfile.mkdtemp(prefix="pab-cache-")  # not the user's: what is measured is kept there


@pytest.fixture
def device() -> str:
    """The GPU of tests marked `gpu`; without one they are skipped."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    return "cuda"


@pytest.fixture
def poison() -> Callable[..., Tensor]:
    """A function (shape, dtype, device) that makes an output full of NaN, so that an unwritten element shows."""

    def make(shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    return make
