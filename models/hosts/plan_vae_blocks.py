"""Blocks of Open-Sora-Plan's video autoencoders. Their names are those that the configurations give."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pab_kernels.models.hosts.causal import CausalConv3d, FrameConv2d, each_frame, pad_front


def norm(channels: int) -> nn.GroupNorm:
    """Both versions' norm."""
    return nn.GroupNorm(32, channels, eps=1e-6)


def conv(in_channels: int, out_channels: int, size: int = 3) -> CausalConv3d:
    """Causal in time, of a cube."""
    return CausalConv3d(in_channels, out_channels, (size, size, size))


def frame_conv(in_channels: int, out_channels: int, size: int = 3) -> FrameConv2d:
    """Of every frame."""
    return FrameConv2d(in_channels, out_channels, size, padding=size // 2)


def image_conv(in_channels: int, out_channels: int, size: int = 3) -> nn.Conv2d:
    """Of images."""
    return nn.Conv2d(in_channels, out_channels, size, padding=size // 2)


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice; the shortcut is a convolution of size 1 where the widths differ."""

    make: Callable[..., nn.Module]
    """A convolution of given widths, by default of size 3."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        make = type(self).make
        self.norm1 = norm(in_channels)
        self.conv1 = make(in_channels, out_channels)
        self.norm2 = norm(out_channels)
        self.conv2 = make(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = make(in_channels, out_channels, 1)

    def run(self, x: Tensor) -> Tensor:
        """The block, where norms span all of x but batch and channels."""
        residual = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        x = self.conv1(F.silu(self.norm1(x)))
        return residual + self.conv2(F.silu(self.norm2(x)))


class ResnetBlock3D(ResnetBlock):
    """Of a piece of video."""

    make = staticmethod(conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class ResnetBlock2D(ResnetBlock):
    """Of every frame by itself."""

    make = staticmethod(image_conv)

    def forward(self, x: Tensor) -> Tensor:
        return each_frame(self.run, x)


class AttnBlock3DFix(nn.Module):
    """Self-attention with one head among the pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q = conv(channels, channels, 1)
        self.k = conv(channels, channels, 1)
        self.v = conv(channels, channels, 1)
        self.proj_out = conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(3).permute(0, 2, 3, 1) for part in (self.q, self.k, self.v))  # [B, T, H * W, C]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.permute(0, 3, 1, 2).unflatten(3, x.shape[3:]))


class Downsample(nn.Module):
    """Half of height and width, frame by frame; zeros right and below."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return each_frame(lambda images: self.conv(F.pad(images, (0, 1, 0, 1))), x)


class TimeDownsampleRes2x(nn.Module):
    """Half of the frames: the average of three, mixed with a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, 3, stride=(2, 1, 1), padding=(0, 1, 1))
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        alpha = torch.sigmoid(self.mix_factor)
        x = pad_front(x, 2, "first")
        return alpha * x.unfold(2, 3, 2).mean(-1) + (1 - alpha) * self.conv(x)


class Spatial2xTime2x3DDownsample(nn.Module):
    """Half of frames, height and width; zeros right and below."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (3, 3, 3), stride=(2, 2, 2), space=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class SpatialUpsample2x(nn.Module):
    """Twice the height and width, each pixel four times, and a convolution of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest"))


def after_first(x: Tensor, space: int) -> Tensor:
    """Twice the frames but for the first, and `space` times the height and width, linearly between pixel centres."""
    first = F.interpolate(x[:, :, :1], scale_factor=(1, space, space), mode="trilinear")
    if x.shape[2] == 1:
        return first
    return torch.cat((first, F.interpolate(x[:, :, 1:], scale_factor=(2, space, space), mode="trilinear")), dim=2)


class TimeUpsampleRes2x(nn.Module):
    """Twice the frames but for the first, mixed with a convolution of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels)
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        alpha = torch.sigmoid(self.mix_factor)
        x = after_first(x, 1)
        return alpha * x + (1 - alpha) * self.conv(x)


class Spatial2xTime2x3DUpsample(nn.Module):
    """Twice height and width, and the frames but for the first; then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(after_first(x, 2))
