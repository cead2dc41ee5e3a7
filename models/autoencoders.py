"""Builds the three families' video autoencoders and loads their official checkpoints, strictly."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pab_kernels.models import host_config, weight_files
from pab_kernels.models.checkpoints import resolve
from pab_kernels.models.hosts.open_sora_plan_vae import CausalVAE
from pab_kernels.models.hosts.open_sora_vae import OpenSoraVAE
from pab_kernels.models.hosts.tiles import Tiling

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

HUB_IDS = {
    "open_sora": "hpcai-tech/OpenSora-VAE-v1.2",
    "open_sora_plan_v110": "LanguageBind/Open-Sora-Plan-v1.1.0/vae",
    "open_sora_plan_v120": "LanguageBind/Open-Sora-Plan-v1.2.0/vae",
}

IMAGES: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
"""diffusers' AutoencoderKL as Latte and Open-Sora use it."""


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


def load(
    family: str,
    source: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
) -> Any:
    """Load a video autoencoder from an official checkpoint.

    Parameters
    ----------
    family
        "open_sora", "open_sora_plan_v110" or "open_sora_plan_v120".
    source
        As for `checkpoints.load`, also a folder with one named ``vae``; ``checkpoint.ckpt`` of Open-Sora-Plan serves as
        it is: its ``ema_state_dict``, or else the generator in its ``state_dict``.
    dtype, device
        Of all parameters.

    Returns
    -------
    OpenSoraVAE or CausalVAE, in eval mode and without gradients, with the original script's tiles.

    Raises
    ------
    FileNotFoundError
        Where there is no such source, or nothing to load in it.
    ValueError
        For weights of another family or kind; for missing, unexpected or wrong-shaped tensors; for an unreadable file
        or a configuration that the host does not have.
    """
    if family not in CLASSES:
        raise ValueError(f"family is {family!r}, must be one of {', '.join(CLASSES)}")
    files, index = weight_files.weight_files(resolve(source, "vae", f"the decoder of {family}", HUB_IDS[family]))
    entries = weight_files.open_files(files, index)
    # The networks that a loss was trained with lie beside Open-Sora-Plan's.
    entries = {name: entry for name, entry in entries.items() if not name.startswith("loss.")}
    found = family_of(entries)
    if found != family:
        raise ValueError(f"vae: {source} holds {found or 'no video autoencoder'}, must hold the one of {family}")
    path = files[0].with_name("config.json")
    config = host_config.read(path, CLASSES[family])
    try:
        with torch.device("meta"):
            model = build(family, **config)
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: these settings make no autoencoder of {family}: {error}") from error
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if difference := weight_files.difference(expected, entries):
        raise ValueError(f"vae: {source} does not fit {type(model).__name__}:\n{difference}")
    state = weight_files.read_all(entries, dict.fromkeys(expected, dtype), device)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


def family_of(names: Iterable[str]) -> str | None:
    """The family that the names of an autoencoder's weights tell, or None."""
    names = list(names)
    if any(name.startswith("spatial_vae.") for name in names):
        return "open_sora"
    if any(name.startswith("decoder.up_blocks.") for name in names):
        return "an image autoencoder of diffusers"
    if not any(name.startswith("encoder.down.") for name in names):
        return None
    if any(".time_downsample." in name for name in names):
        return "open_sora_plan_v110"
    return "open_sora_plan_v120" if any(name.endswith(".downsample.conv.conv.weight") for name in names) else None
