"""Frames that Open-Sora goes on from: an image, or a piece of a video, as latents that are not denoised.

The original's rules: an image is the first latent frame. A video goes on from 17 of its frames, which are 5 latents at
the start of the new one. Pictures are scaled to fill the video, and what stands over is cut off in the middle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pab_kernels.files import check_input
from pab_kernels.pipelines.decoding import VideoDecoder
from pab_kernels.pipelines.sizes import VideoSize
from pab_kernels.quality import Frames, load_video

FRAMES = 17
"""Of a video that is gone on from: a piece of the autoencoder."""
SAME_ASPECT = 0.02
"""Largest difference of aspects that counts as none: the model's own sizes round as much."""
FITS = ("crop", "pad")


def load_image(path: str | Path) -> Frames:
    """An image as a video of one frame, uint8 [1, H, W, 3].

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is a folder, or no image that can be read.
    """
    check_input("image", path)
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))[None]
    except Exception as error:  # each of Pillow's formats has errors of its own
        raise ValueError(f"image: {path} cannot be read as an image: {error}") from error


def load_frames(path: str | Path, first: int | None) -> Frames:
    """The 17 frames of a video that begin with the `first`; fewer where it ends before.

    A negative `first` counts from the end; None stands for the last 17.

    Raises
    ------
    FileNotFoundError, ValueError
        As `quality.load_video`, or `first` is not a frame of it.
    """
    frames = load_video(Path(path))
    start = max(len(frames) - FRAMES, 0) if first is None else first + (len(frames) if first < 0 else 0)
    if not 0 <= start < len(frames):
        raise ValueError(f"from_frame: got {first}, must be a frame of {path}, which has {len(frames)}")
    return frames[start : start + FRAMES]


def fit(frames: Frames, size: VideoSize, how: str | None) -> Frames:
    """Frames of the size of a video, never stretched.

    Parameters
    ----------
    frames : uint8 [F, H, W, 3]
    how : {"crop", "pad"}, optional
        Cut off what stands over, or fill up with black. None takes no other aspect than the video's.

    Raises
    ------
    ValueError
        Another aspect with `how` None, or another word.
    """
    if how not in (None, *FITS):
        raise ValueError(f"fit: got {how!r}, must be crop or pad")
    height, width = frames.shape[1:3]
    scales = size.height / height, size.width / width
    if how is None and abs(scales[0] / scales[1] - 1) > SAME_ASPECT:
        raise ValueError(
            f"image: is {width}x{height}, which is not of the aspect of the video's {size.width}x{size.height}: say "
            "`--fit crop` or `--fit pad`"
        )
    scale = min(scales) if how == "pad" else max(scales)
    sides = [
        max(round(side * scale), 1) if scale != own else target
        for side, own, target in zip((height, width), scales, (size.height, size.width), strict=True)
    ]
    fitted = np.zeros((len(frames), size.height, size.width, 3), np.uint8)
    for frame, target in zip(frames, fitted, strict=True):
        scaled = np.asarray(Image.fromarray(frame).resize((sides[1], sides[0]), Image.Resampling.BICUBIC))
        cut, place = [], []
        for side, whole in zip(sides, (size.height, size.width), strict=True):
            common, over = min(side, whole), side - whole
            cut.append(slice(max(round(over / 2), 0), max(round(over / 2), 0) + common))
            place.append(slice(max(round(-over / 2), 0), max(round(-over / 2), 0) + common))
        target[place[0], place[1]] = scaled[cut[0], cut[1]]
    return fitted


@torch.no_grad()
def encode(decoder: Any, frames: Frames, size: VideoSize, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What `OpenSoraPipeline` takes as `given_latents` and `given_mask`.

    Parameters
    ----------
    decoder : VideoDecoder
        Of Open-Sora.
    frames : uint8 [F, height, width, 3]
        From `fit`; one, or up to 17.
    size : VideoSize
        Of the video to make.
    seed : int
        Of the sample that the autoencoder draws.

    Returns
    -------
    latents : Tensor
        float32 [1, C, T, H, W], zeros where nothing is given.
    mask : Tensor
        bool [1, T], True where a frame is given.

    Raises
    ------
    ValueError
        The decoder is none of Open-Sora, or nothing would be left to make.
    """
    if not isinstance(decoder, VideoDecoder) or not decoder.is_open_sora:
        raise ValueError("image, video: need Open-Sora's own autoencoder, to encode them")
    parameter = decoder.parameter
    video = torch.from_numpy(frames).to(parameter.device).permute(3, 0, 1, 2)[None]
    video = (video.float() / 127.5 - 1).to(parameter.dtype)
    found = decoder.vae.encode(video, torch.Generator().manual_seed(seed)).float()
    count = found.shape[2]
    if count >= size.latent[0]:
        raise ValueError(f"video: {len(frames)} frames are {count} latents, of {size.latent[0]} in all: none is left")
    latents = found.new_zeros(1, found.shape[1], *size.latent)
    latents[:, :, :count] = found
    mask = torch.zeros(1, size.latent[0], dtype=torch.bool, device=found.device)
    mask[:, :count] = True
    return latents, mask
