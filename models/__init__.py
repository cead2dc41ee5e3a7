"""Adapters and hosts: one module a DiT family."""

from __future__ import annotations

from diffusers import LatteTransformer3DModel
from torch import nn

from pab_kernels.models.adapter import Adapter
from pab_kernels.models.latte import LatteAdapter


def adapter_for(host: nn.Module) -> Adapter:
    """The adapter of the family that `host` belongs to.

    Raises
    ------
    TypeError
        No family fits, or the host is not as its family must be; the message names what is wrong.
    ValueError
        An option of the host is not supported.
    """
    if type(host) is LatteTransformer3DModel:
        return LatteAdapter(host)
    raise TypeError(f"host: got a {type(host).__name__}, must be a LatteTransformer3DModel")
