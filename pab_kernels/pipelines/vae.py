"""Decoders of video latents, loaded by diffusers."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from pab_kernels.pipelines.sizes import VideoSize


def load_vae(source: str | Path, channels: int, *, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """Load a video decoder: any AutoencoderKL of diffusers that decodes [B, channels, T, H, W].

    Parameters
    ----------
    source : str or Path
        Folder (or one with a folder `vae`), or hub id, of a diffusers autoencoder.
    channels : int
        Latent channels that it must have.
    dtype, device

    Raises
    ------
    FileNotFoundError
        There is no such folder, and no hub that has it.
    ValueError
        It is of another class, has other latent channels, or decodes single images.
    """
    inner = Path(source) / "vae"
    place = str(inner) if inner.is_dir() else str(source)
    try:
        # Any class of diffusers can read the configuration that names the right one.
        config: Any = AutoencoderKL.load_config(place)
    except Exception as error:  # diffusers lets through what its parsers raise
        if Path(place).exists():
            raise ValueError(f"vae: {place} has no configuration of a diffusers autoencoder: {error}") from error
        raise FileNotFoundError(
            f"vae: {place!r} is not a diffusers autoencoder here, and could not be fetched. On a machine with a "
            f"network run `hf download {source} --local-dir DIR`, copy DIR here, and pass `--vae DIR`."
        ) from error
    name = str(config.get("_class_name", "nothing")) if isinstance(config, dict) else type(config).__name__
    cls = getattr(diffusers, name, None) if name.startswith("AutoencoderKL") else None
    if cls is None:
        raise ValueError(f"vae: {place} is a {name}, must be an AutoencoderKL of diffusers {diffusers.__version__}")
    try:
        vae = cls.from_pretrained(place)
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        raise ValueError(f"vae: {place} cannot be loaded by diffusers: {error}") from error
    check_vae(vae, channels)
    return nn.Module.to(vae, device=device, dtype=dtype).eval().requires_grad_(False)


def is_of_diffusers(source: str | Path) -> bool:
    """Whether a folder, or one named `vae` in it, or a hub id is said to hold an autoencoder of diffusers."""
    inner = Path(source) / "vae"
    place = inner if inner.is_dir() else Path(source)
    if place.is_file():
        return False
    try:
        config: Any = AutoencoderKL.load_config(str(place if place.exists() else source))
    except Exception:  # not there, no network, no JSON: the other loader says what is wrong
        return False
    return str(config.get("_class_name", "")).startswith("AutoencoderKL")


def check_vae(vae: Any, channels: int) -> None:
    """Raise ValueError unless `vae` decodes [B, channels, T, H, W]."""
    own = getattr(vae.config, "latent_channels", None) or getattr(vae.config, "z_dim", None)
    if own != channels:
        raise ValueError(f"vae: {type(vae).__name__} has {own} latent channels, must have {channels}")
    # One that takes num_frames decodes frames as a batch of images; one without Conv3d knows nothing of time.
    of_images = "num_frames" in inspect.signature(vae.decode).parameters
    if of_images or not any(isinstance(module, nn.Conv3d) for module in vae.modules()):
        raise ValueError(
            f"vae: {type(vae).__name__} decodes images, must decode videos [B, {channels}, T, H, W]: the frames of "
            "these latents are not images"
        )


@torch.no_grad()
def decode(vae: Any, latents: Tensor, size: VideoSize) -> Tensor:
    """Frames of raw latents [B, C, T, H, W], one video at a time.

    Returns
    -------
    Tensor
        float32 [B, frames, height, width, 3] in [0, 1] on the CPU; what the decoder gives beyond `size` is cut.
    """
    parameter = next(vae.parameters())
    videos = []
    for row in latents.split(1):
        video = vae.decode(row.to(parameter.device, parameter.dtype)).sample
        video = video[0, :, : size.frames, : size.height, : size.width].float()
        videos.append((video / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0).cpu())
    return torch.stack(videos)
