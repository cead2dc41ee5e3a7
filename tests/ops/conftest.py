"""The `hopper` fixture."""

from __future__ import annotations

import pytest
import torch

from pab_kernels.ops import backends


@pytest.fixture
def hopper(device) -> str:
    """A GPU of compute capability 9.0, and the kernels."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no GPU of compute capability 9.0")
    if backends._C is None:
        pytest.skip("the CUDA kernels were left out of this build")
    return device
