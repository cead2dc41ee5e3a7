"""How close two videos are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

Frames = NDArray[np.uint8]
"""A video [T, H, W, 3], uint8."""


@dataclass(frozen=True)
class Quality:
    """Mean over frames; `psnr` in dB (infinite for equal frames), `ssim` at most 1."""

    psnr: float
    ssim: float


def compare(video: Frames, baseline: Frames) -> Quality:
    """PSNR and SSIM of `video` [T, H, W, 3] uint8 against `baseline`, frame by frame.

    Raises
    ------
    ValueError
        The shapes differ.
    """
    if video.shape != baseline.shape:
        raise ValueError(f"video: shape is {video.shape}, must be {baseline.shape}, the shape of baseline")
    pairs = list(zip(baseline, video, strict=True))
    with np.errstate(divide="ignore"):  # equal frames: infinite PSNR is the right answer
        psnr = float(np.mean([peak_signal_noise_ratio(a, b, data_range=255) for a, b in pairs]))
    ssim = float(np.mean([structural_similarity(a, b, channel_axis=-1, data_range=255) for a, b in pairs]))
    return Quality(psnr, ssim)
