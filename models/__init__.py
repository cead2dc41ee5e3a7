"""Adapters: one file a DiT family, which describes the host's modules in the terms of `blocks`.

No maths of their own, no slots, no schedule. `hosts/` has the transformers that no package carries. A file here may
import `blocks`, `ops` and the settings, never the runtime that runs what it describes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import LatteTransformer3DModel, LTXVideoTransformer3DModel, WanTransformer3DModel
from torch import nn

from pab_kernels.models.adapter import Adapter
from pab_kernels.models.hosts import OpenSoraPlanV110, OpenSoraPlanV120
from pab_kernels.models.latte import LatteAdapter
from pab_kernels.models.ltx import LTXAdapter
from pab_kernels.models.open_sora import OpenSoraAdapter
from pab_kernels.models.open_sora_plan import (
    LatteT2VAdapter,
    OpenSoraPlanV110Adapter,
    OpenSoraPlanV120Adapter,
    OpenSoraT2VAdapter,
)
from pab_kernels.models.wan import WanAdapter

_BY_CLASS: dict[type, Callable[[Any], Adapter]] = {
    LatteTransformer3DModel: LatteAdapter,
    OpenSoraPlanV110: OpenSoraPlanV110Adapter,
    OpenSoraPlanV120: OpenSoraPlanV120Adapter,
    WanTransformer3DModel: WanAdapter,
    LTXVideoTransformer3DModel: LTXAdapter,
}


_REFUSED = {
    "WanVACETransformer3DModel": "a second stack of blocks adds to what these give",
    "WanAnimateTransformer3DModel": "motion and face are added between these blocks",
}
"""Wan's relatives, by name, and why the executor would give another result."""


def adapter_for(host: nn.Module) -> Adapter:
    """The adapter of the family that `host` belongs to.

    diffusers' Latte and our Open-Sora-Plan hosts are known by their class; STDiT3 and the official LatteT2V and
    OpenSoraT2V by their structure, without importing them.

    Raises
    ------
    TypeError
        No family fits, or the host is not as its family must be; the message names what is wrong.
    ValueError
        An option of the host is not supported.
    """
    name = type(host).__name__
    if name in _REFUSED:
        raise TypeError(f"{name}: is not supported, because {_REFUSED[name]}")
    if type(host) in _BY_CLASS:
        return _BY_CLASS[type(host)](host)
    if hasattr(host, "spatial_blocks") and hasattr(host, "temporal_blocks"):
        return OpenSoraAdapter(host)
    if hasattr(host, "transformer_blocks") and hasattr(host, "temporal_transformer_blocks"):
        return LatteT2VAdapter(host)
    if hasattr(host, "transformer_blocks") and hasattr(host, "adaln_single"):
        return OpenSoraT2VAdapter(host)
    known = ", ".join(cls.__name__ for cls in _BY_CLASS)
    raise TypeError(f"host: got a {name}, must be a STDiT3, LatteT2V, OpenSoraT2V or one of {known}")
