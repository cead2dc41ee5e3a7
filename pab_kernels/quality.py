"""How close two videos are, frame by frame."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import imageio.v3 as iio
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence, UnidentifiedImageError

from pab_kernels.files import check_input

if TYPE_CHECKING:
    import torch

Frames = NDArray[np.uint8]
"""A video [T, H, W, 3], uint8."""

LEAST_SIZE = 7
"""SSIM looks at windows of 7 x 7 pixels."""
MOST_FRAMES = 100_000
"""Of an animated image, its longer frames counted as several."""
BACKBONE = "alexnet-owt-7be5be79.pth"
"""The weights in torch's cache that LPIPS stands on; torchvision's name for them."""


@dataclass(frozen=True)
class Quality:
    """Means over frames: PSNR in dB (infinite for equal frames), SSIM at most 1, LPIPS (less is closer; maybe None).

    `worst_frame` is the PSNR of the frame that is furthest off.
    """

    psnr: float
    ssim: float
    worst_frame: float
    lpips: float | None = None


def compare(video: Frames, baseline: Frames) -> Quality:
    """Means of `per_frame`, and its worst PSNR; raises as it does."""
    found = per_frame(video, baseline)
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return Quality(worst_frame=min(found["psnr"]), **means)


def per_frame(video: Frames, baseline: Frames) -> dict[str, list[float]]:
    """`video` [T, H, W, 3] uint8 against `baseline`: "psnr", "ssim", and "lpips" unless `why_no_lpips`, each frame's.

    Raises
    ------
    ValueError
        The shapes differ, or the frames are smaller than 7 x 7.
    """
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity  # slow to import: scipy's statistics

    if video.shape != baseline.shape:
        raise ValueError(f"video: shape is {video.shape}, must be {baseline.shape}, the shape of baseline")
    if video.ndim != 4 or video.shape[0] == 0 or video.shape[-1] != 3 or min(video.shape[1:3]) < LEAST_SIZE:
        raise ValueError(f"video: shape is {video.shape}, must be [T, H, W, 3], H and W at least {LEAST_SIZE}")
    pairs = list(zip(baseline, video, strict=True))
    with np.errstate(divide="ignore"):  # equal frames: infinite PSNR is the right answer
        found = {"psnr": [float(peak_signal_noise_ratio(a, b, data_range=255)) for a, b in pairs]}
    found["ssim"] = [float(structural_similarity(a, b, channel_axis=-1, data_range=255)) for a, b in pairs]
    if why_no_lpips() is None:
        found["lpips"] = _lpips(video, baseline)
    return found


def why_no_lpips() -> str | None:
    """What LPIPS lacks here: a package, or weights, which are never fetched; None where it is measured."""
    for package in ("lpips", "torchvision"):
        if importlib.util.find_spec(package) is None:
            return f"no LPIPS: `pip install {package}`"
    import torch

    weights = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE
    return None if weights.is_file() else f"no LPIPS: {weights} is missing"


def _lpips(video: Frames, baseline: Frames) -> list[float]:
    """LPIPS (arXiv:1801.03924) with AlexNet."""
    import torch

    with torch.no_grad():
        values = [_lpips_network()(_signed(a), _signed(b)) for a, b in zip(baseline, video, strict=True)]
    return [float(value) for value in values]


@cache
def _lpips_network() -> Callable[[torch.Tensor, torch.Tensor], Any]:
    import lpips

    return lpips.LPIPS(net="alex", verbose=False).eval()


def _signed(frame: NDArray[np.uint8]) -> torch.Tensor:
    """[H, W, 3] uint8 to float32 [1, 3, H, W] in [-1, 1]."""
    import torch

    return torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 127.5 - 1


def load_video(path: Path) -> Frames:
    """The frames of a video or animated image, [T, H, W, 3] uint8.

    A frame of an image that lasts longer than the shortest one stands for several: equal ones are often written as one.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is a folder, or no video that can be read.
    """
    check_input("video", path)
    try:
        frames = _read(path)
    except Exception as error:  # each of imageio's plugins has errors of its own
        raise ValueError(f"video: {path} cannot be read as a video: {error}") from error
    if frames.ndim != 4 or frames.shape[-1] < 3 or frames.dtype != np.uint8:
        raise ValueError(f"video: {path} holds {list(frames.shape)} {frames.dtype}, must be [T, H, W, 3] uint8")
    return frames[..., :3]


def _read(path: Path) -> NDArray[Any]:
    try:
        image = Image.open(path)
    except UnidentifiedImageError:
        return np.stack(list(iio.imiter(path)))
    with image:
        frames, lasts = [], []
        for each in ImageSequence.Iterator(image):
            frames.append(np.asarray(each.convert("RGB")))
            lasts.append(each.info.get("duration", 0))
    shortest = min(lasts)
    counts = [round(time / shortest) if shortest > 0 else 1 for time in lasts]
    if sum(counts) > MOST_FRAMES:
        raise ValueError(f"it lasts as long as {sum(counts)} of its shortest frame, must be at most {MOST_FRAMES}")
    return np.stack(frames).repeat(counts, axis=0)
