"""Builds the three families' video autoencoders, with random weights where no checkpoint is at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pab_kernels.models.hosts.open_sora_plan_vae import CausalVAE
from pab_kernels.models.hosts.open_sora_vae import OpenSoraVAE
from pab_kernels.models.hosts.tiles import Tiling

Autoencoder = OpenSoraVAE | CausalVAE

CLASSES: dict[str, type[nn.Module]] = {
    "open_sora": OpenSoraVAE,
    "open_sora_plan_v110": CausalVAE,
    "open_sora_plan_v120": CausalVAE,
}

_PLAN_V120: dict[str, Any] = {
    "encoder_spatial_downsample": ("Downsample", *("Spatial2xTime2x3DDownsample",) * 2, ""),
    "encoder_temporal_downsample": ("",) * 4,
    "decoder_spatial_upsample": ("", "SpatialUpsample2x", *("Spatial2xTime2x3DUpsample",) * 2),
    "decoder_temporal_upsample": ("",) * 4,
}
FULL_SIZE: dict[str, dict[str, Any]] = {"open_sora": {}, "open_sora_plan_v110": {}, "open_sora_plan_v120": _PLAN_V120}
"""What the released models' settings are, beside the classes' defaults."""

CLASS_TILINGS: dict[str, Tiling] = {
    "open_sora_plan_v110": Tiling(256, 32, 65, 17, 0.25),
    "open_sora_plan_v120": Tiling(256, 32, 33, 16, 0.125),
}
"""What the originals' `enable_tiling()` gives."""

TILINGS: dict[str, Tiling] = {
    "open_sora_plan_v110": CLASS_TILINGS["open_sora_plan_v110"],
    "open_sora_plan_v120": Tiling(512, 64, 29, 8, 0.125),
}
"""What the originals' sample scripts set."""


def build(family: str, **config: Any) -> Any:
    """Build a family's autoencoder with its parameters on the current device, in eval mode and without gradients.

    Parameters
    ----------
    family
        "open_sora", "open_sora_plan_v110" or "open_sora_plan_v120".
    config
        Settings that differ from the released model in ``FULL_SIZE``.

    Raises
    ------
    ValueError
        For an unknown family or a setting that the host does not have.
    """
    if family not in CLASSES:
        raise ValueError(f"family is {family!r}, must be one of {', '.join(CLASSES)}")
    model = CLASSES[family](**{**FULL_SIZE[family], **config})
    model.tiling = TILINGS.get(family)  # type: ignore[assignment]
    return model.eval().requires_grad_(False)


def random_weights(
    family: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    seed: int = 0,
    **config: Any,
) -> Any:
    """Build a family's autoencoder with PyTorch's initial weights, to time it where no checkpoint is at hand."""
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), device:
        torch.manual_seed(seed)
        return nn.Module.to(build(family, **config), dtype=dtype)
