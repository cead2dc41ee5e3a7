"""Pieces that the video autoencoders share: convolutions that see no later frame, posteriors, frames as images.

Tensors are [B, C, T, H, W]. Parameter names are those of the official checkpoints: a causal convolution has its weights
under ``conv``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pab_kernels.ops.checks import check_shape

Triple = tuple[int, int, int]


class CausalConv3d(nn.Module):
    """A 3D convolution with all of its padding in time in front; odd kernels keep height and width.

    Parameters
    ----------
    kernel, stride
        (time, height, width).
    front : {"first", "zeros"}
        What stands before the first frame: that frame again, or zeros.
    space : int, optional
        Zeros on every side of a frame, by default half of the kernel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Triple,
        *,
        stride: Triple = (1, 1, 1),
        front: str = "first",
        space: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        # Open-Sora's zeros shrink with the stride, Open-Sora-Plan's repeated frames do not.
        self.frames_before = kernel[0] - (stride[0] if front == "zeros" else 1)
        self.front = front
        height, width = (size // 2 if space is None else space for size in kernel[1:])
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, (0, height, width), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(pad_front(x, self.frames_before, self.front))


def pad_front(x: Tensor, frames: int, front: str) -> Tensor:
    """`x` with `frames` more in front: zeros, or the first one again."""
    if frames == 0:
        return x
    if front == "zeros":
        return F.pad(x, (0, 0, 0, 0, frames, 0))
    return torch.cat((x[:, :, :1].expand(-1, -1, frames, -1, -1), x), dim=2)


def each_frame(of_images: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a function of images gives for every frame of a video."""
    batch, _, frames = x.shape[:3]
    images = of_images(x.transpose(1, 2).flatten(0, 1))
    return images.unflatten(0, (batch, frames)).transpose(1, 2)


class FrameConv2d(nn.Conv2d):
    """A 2D convolution of every frame."""

    def forward(self, input: Tensor) -> Tensor:
        return each_frame(super().forward, input)


def posterior(moments: Tensor, generator: torch.Generator | None) -> Tensor:
    """The mean of a diagonal normal distribution, or a sample of it.

    Parameters
    ----------
    moments : [B, 2 C, ...]
        Means, then logarithms of variances, which are taken to lie in [-30, 20].
    generator : torch.Generator, optional
        On any device; None gives the mean.
    """
    mean, logvar = moments.chunk(2, dim=1)
    if generator is None:
        return mean
    noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=torch.float32)
    return mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise.to(mean)


def check_video(name: str, value: Tensor, channels: int) -> None:
    """Raise ValueError unless `value` is [B, channels, T, H, W] and holds something."""
    check_shape(name, value, ("B", channels, "T", "H", "W"))
    if value.numel() == 0:
        raise ValueError(f"{name}: shape is {list(value.shape)}, must have no empty dimension")
