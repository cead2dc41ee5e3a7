"""The check that a demo video shows what its prompt asks for, on pixel statistics alone.

Backgrounds are muted, so the shape is what is vivid (high chroma) or nearly white. The vivid pixels vote for
the colour; the winning colour's centroid, followed through the frames, gives the motion.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import Any

import numpy as np

from pab_kernels.pipelines.demo_captions import COLOURS

_HUES = {name: colorsys.rgb_to_hsv(*rgb)[0] for name, rgb in COLOURS.items() if name != "white"}

VIVID = 0.35  # least chroma (largest minus smallest channel) of a coloured shape's pixel
WHITE = 0.8  # least value of the smallest channel of a white shape's pixel
HUE_TOLERANCE = 0.06  # in turns; the closest two colours, red and orange, are 0.08 apart
AREA = (0.004, 0.35)  # least and largest share of the frame that a shape covers
MAJORITY = 0.6  # share of the vivid pixels that must agree on the colour
TRAVEL = 0.2  # least displacement, in frame widths, that counts as a direction
STILL = 0.08  # largest displacement that counts as staying in place
WOBBLE = 0.05  # largest deviation (rms, in frame widths) from even motion


@dataclass(frozen=True)
class Measurement:
    """What a video shows.

    Attributes
    ----------
    colour : str or None
        The shape's colour; None if no shape, or no single colour, was found.
    motion : str or None
        "left", "right", "up", "down", "bounces" or "still"; None if there is no clear motion.
    displacement : tuple of float
        (x, y) from the first frame to the last in frame widths; x grows to the right, y downwards.
    area : float
        Mean share of the frame that the shape covers.
    """

    colour: str | None
    motion: str | None
    displacement: tuple[float, float]
    area: float


@dataclass(frozen=True)
class Verdict:
    """Whether a video shows the expected colour and direction."""

    colour: bool
    direction: bool

    @property
    def both(self) -> bool:
        """True if colour and direction are right."""
        return self.colour and self.direction


def _as_float(video: Any) -> np.ndarray:
    """Return video as float32 [T, H, W, 3] in [0, 1], or raise ValueError."""
    if hasattr(video, "detach"):
        video = video.detach().cpu().float().numpy() if video.dtype.is_floating_point else video.cpu().numpy()
    array = np.asarray(video)
    if array.ndim != 4 or array.shape[-1] != 3 or array.shape[0] < 2:
        raise ValueError(f"video must have shape [T, H, W, 3] with T >= 2, got {list(array.shape)}")
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"video must be uint8 in [0, 255] or floating point in [0, 1], got {array.dtype}")
    array = array.astype(np.float32)
    low, high = float(array.min()), float(array.max())
    if not (low >= -0.01 and high <= 1.01):
        raise ValueError(f"video must be in [0, 1] for a floating point dtype, got values in [{low}, {high}]")
    return array.clip(0, 1)


def colour_masks(video: np.ndarray) -> dict[str, np.ndarray]:
    """Find the pixels of each colour.

    Parameters
    ----------
    video : numpy.ndarray
        float32 [T, H, W, 3] in [0, 1].

    Returns
    -------
    dict
        For each name in `COLOURS` a bool array [T, H, W]. A pixel belongs to one colour at most.
    """
    red, green, blue = np.moveaxis(video, -1, 0)
    high, low = video.max(-1), video.min(-1)
    chroma = high - low
    safe = np.maximum(chroma, 1e-6)
    sector = np.where(
        high == red,
        (green - blue) / safe,
        np.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    names = list(_HUES)
    gap = np.abs(sector[..., None] / 6 % 1 - np.array([_HUES[n] for n in names], dtype=np.float32))
    gap = np.minimum(gap, 1 - gap)
    nearest, distance = gap.argmin(-1), gap.min(-1)
    vivid = (chroma > VIVID) & (distance < HUE_TOLERANCE)
    masks = {name: vivid & (nearest == index) for index, name in enumerate(names)}
    masks["white"] = (low > WHITE) & (chroma <= VIVID)
    return masks


def _motion(mask: np.ndarray) -> tuple[str | None, tuple[float, float]]:
    """Name the motion of the masked pixels [T, H, W] and give the displacement, from a straight-line fit."""
    frames, height, width = mask.shape
    count = mask.sum((1, 2))
    seen = np.flatnonzero(count >= AREA[0] * height * width)
    if len(seen) < 0.75 * frames:
        return None, (0.0, 0.0)
    x = (mask.sum(1)[seen] * (np.arange(width) + 0.5) / width).sum(1) / count[seen]
    y = (mask.sum(2)[seen] * (np.arange(height) + 0.5) / height).sum(1) / count[seen]
    fits = [np.polyfit(seen / (frames - 1), values, 1) for values in (x, y)]
    dx, dy = float(fits[0][0]), float(fits[1][0])
    wobble_x, wobble_y = (
        float(np.std(values - np.polyval(fit, seen / (frames - 1)))) for values, fit in zip((x, y), fits, strict=True)
    )
    motion: str | None = None
    if wobble_y > WOBBLE and wobble_y > 2 * wobble_x:
        motion = "bounces"
    elif max(wobble_x, wobble_y) <= WOBBLE:
        if max(abs(dx), abs(dy)) < STILL:
            motion = "still"
        elif abs(dx) >= TRAVEL and abs(dy) <= 0.5 * abs(dx):
            motion = "right" if dx > 0 else "left"
        elif abs(dy) >= TRAVEL and abs(dx) <= 0.5 * abs(dy):
            motion = "down" if dy > 0 else "up"
    return motion, (dx, dy)


def measure(video: Any) -> Measurement:
    """Find the shape's colour and motion in a video.

    Parameters
    ----------
    video : numpy.ndarray or torch.Tensor
        [T, H, W, 3], uint8 in [0, 255] or floating point in [0, 1], T at least 2.

    Raises
    ------
    ValueError
        If the shape, dtype or range is another.
    """
    masks = colour_masks(_as_float(video))
    shares = {name: float(mask.mean()) for name, mask in masks.items()}
    # A colour that fills the frame is a background, whatever its hue.
    shares = {name: share for name, share in shares.items() if share <= AREA[1]}
    colour = max(shares, key=lambda name: shares[name], default=None)
    if colour is None or shares[colour] < max(AREA[0], MAJORITY * sum(shares.values())):
        return Measurement(None, None, (0.0, 0.0), 0.0 if colour is None else shares[colour])
    motion, displacement = _motion(masks[colour])
    return Measurement(colour, motion, displacement, shares[colour])


def check(video: Any, colour: str, direction: str) -> Verdict:
    """Say whether a video shows the expected colour and direction of motion.

    Parameters
    ----------
    video : numpy.ndarray or torch.Tensor
        As for `measure`.
    colour : str
        A key of `COLOURS`.
    direction : str
        "left", "right", "up", "down", "bounces" or "still".

    Raises
    ------
    ValueError
        If colour or direction is another word, or the video has another form.
    """
    if colour not in COLOURS:
        raise ValueError(f"colour must be one of {', '.join(COLOURS)}, got {colour!r}")
    motions = ("left", "right", "up", "down", "bounces", "still")
    if direction not in motions:
        raise ValueError(f"direction must be one of {', '.join(motions)}, got {direction!r}")
    found = measure(video)
    return Verdict(found.colour == colour, found.motion == direction)
