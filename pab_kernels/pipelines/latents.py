"""Latents as files: safetensors with all that is needed to decode them later, and a first look as colours."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized
from torch import Tensor

from pab_kernels.files import check_input, replaced
from pab_kernels.pipelines.sizes import VideoSize
from pab_kernels.quality import Frames


def save(latents: Tensor, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write one video's latents [C, T, H, W] as float32 under the name "latents".

    Parameters
    ----------
    latents : Tensor
    path : Path
        An existing file is replaced only once the new one is complete.
    metadata : mapping
        Values are written as JSON; `load` reads them back.
    """
    values = {key: json.dumps(value) for key, value in metadata.items()}
    with replaced(path) as partial:
        partial.write_bytes(serialized({"latents": latents.detach().float().cpu().contiguous()}, values))


def load(path: str | os.PathLike[str]) -> tuple[Tensor, dict[str, Any]]:
    """Latents [C, T, H, W] float32 and their metadata.

    A decoder takes ``latents * latent_scale + latent_shift``, channel by channel.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is a folder, or was not written by `save`.
    """
    check_input("latents", path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            latents = file.get_tensor("latents")
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a file of latents: {error}") from error
    if latents.ndim != 4 or latents.numel() == 0 or not latents.is_floating_point():
        raise ValueError(
            f"{path}: latents are {list(latents.shape)} {latents.dtype}, must be [C, T, H, W] and floating"
        )
    return latents, metadata


def size_of(metadata: Mapping[str, Any], path: str | os.PathLike[str], shape: Sequence[int]) -> VideoSize:
    """The size of the video that latents [C, T, H, W] of a file are of.

    Raises
    ------
    ValueError
        The metadata do not say it.
    """
    sides = [metadata.get(name) for name in ("frames", "height", "width")]
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)
    if not whole or not isinstance(metadata.get("family"), str):
        raise ValueError(f"{path}: says neither family nor size, must be a file that `pab generate` wrote")
    frames, height, width = map(int, sides)  # type: ignore[arg-type]
    return VideoSize(frames, height, width, (shape[1], shape[2], shape[3]))


def first_look(latents: Tensor, like: Tensor | None = None) -> Frames:
    """Colours of latents [C, T, H, W]: their three principal components as red, green and blue.

    Parameters
    ----------
    latents : Tensor
    like : Tensor, optional
        Latents whose components and range are used instead, so that two runs can be compared.

    Returns
    -------
    uint8 [T, H, W, 3]
    """
    latents, base = (
        value.detach().float().cpu().nan_to_num(0, 0, 0) for value in (latents, latents if like is None else like)
    )
    points = base.flatten(1).T  # [T * H * W, C]
    mean = points.mean(0)
    # The sign of an eigenvector is arbitrary; this one makes the same picture on every machine.
    directions = torch.linalg.eigh((points - mean).T @ (points - mean)).eigenvectors.flip(1)[:, :3]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    directions = directions * largest.sign()

    def project(values: Tensor) -> np.ndarray:
        return ((values.permute(1, 2, 3, 0) - mean) @ directions).numpy()

    low, high = np.percentile(project(base), (1, 99), axis=(0, 1, 2))
    colours = (project(latents) - low) / np.maximum(high - low, 1e-6)
    if colours.shape[-1] < 3:
        colours = colours[..., [0] * 3]
    return (colours.clip(0, 1) * 255).round().astype(np.uint8)
