"""Layers of video decoders on planes: a host's modules, with their weights packed for the ops."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels.ops.planes import (
    channel_sums,
    conv_planes,
    group_norm_silu,
    grow_planes,
    pack_upsampled,
    pack_weight,
    softmax_rows,
)

SCORE_BYTES = 2**30
"""Of attention scores at a time."""

Shape = tuple[int, int, int, int]
"""Frames, height and width without the zeros, channels."""


@dataclass
class Stream:
    """Planes on their way through a decoder, and the sums of their channels for the next norm."""

    planes: Tensor
    sums: Tensor | None = None


def plane_elements(shape: Shape, channels: int | None = None) -> int:
    """Elements of planes, their zeros among them; of so many channels where they are given."""
    frames, height, width, own = shape
    return frames * (height + 1) * (width + 1) * (own if channels is None else channels)


@dataclass(frozen=True)
class Norm:
    """GroupNorm, over each frame or over all of the planes."""

    weight: Tensor
    bias: Tensor
    groups: int
    eps: float
    per_frame: bool

    @classmethod
    def of(cls, norm: Any, per_frame: bool) -> Norm:
        """Of an nn.GroupNorm."""
        return cls(norm.weight, norm.bias, norm.num_groups, norm.eps, per_frame)

    def __call__(self, x: Stream, silu: bool = True) -> Tensor:
        return group_norm_silu(
            x.planes,
            self.weight,
            self.bias,
            self.groups,
            eps=self.eps,
            sums=x.sums,
            per_frame=self.per_frame,
            silu=silu,
        )


@dataclass(frozen=True)
class Conv:
    """A convolution with packed weights; see `conv_planes`."""

    weight: Tensor
    bias: Tensor | None
    front: str = "zeros"
    times: int = 1
    space: int = 1
    residual_scale: float = 1.0

    @classmethod
    def of(cls, conv: Any, front: str = "zeros", channels: int | None = None) -> Conv:
        """Of an nn.Conv2d or nn.Conv3d, for planes of so many channels."""
        return cls(pack_weight(conv.weight, channels), conv.bias, front)

    @classmethod
    def upsampled(cls, conv: Any) -> Conv:
        """Of an nn.Conv2d or nn.Conv3d of frames, and the nearest upsampling before it."""
        return cls(pack_upsampled(conv.weight), conv.bias, space=2)

    @classmethod
    def doubling(cls, conv: Any) -> Conv:
        """Of an nn.Conv3d whose channel 2 c + s becomes frame 2 t + s."""
        packed = pack_weight(conv.weight)[0].unflatten(0, (-1, 2)).transpose(0, 1).contiguous()
        return cls(packed, conv.bias.unflatten(0, (-1, 2)).T.flatten(), times=2)

    def shape(self, shape: Shape) -> Shape:
        """Of the result."""
        frames, height, width, _ = shape
        return frames * self.times, height * self.space, width * self.space, self.weight.shape[1]

    def live(self, shape: Shape) -> int:
        """Elements that are alive at once: what it reads and what it writes."""
        return plane_elements(shape) + plane_elements(self.shape(shape))

    def __call__(self, x: Tensor, residual: Tensor | None = None, sums: bool = True) -> Stream:
        planes, found = conv_planes(
            x,
            self.weight,
            self.bias,
            front=self.front,
            residual=residual,
            residual_scale=self.residual_scale,
            times=self.times,
            space=self.space,
            with_sums=sums,
        )
        return Stream(planes, found)


@dataclass(frozen=True)
class ResBlock:
    """Norm, SiLU, convolution, twice, and the shortcut."""

    norm1: Norm
    conv1: Conv
    norm2: Norm
    conv2: Conv
    shortcut: Conv | None

    def shape(self, shape: Shape) -> Shape:
        """Of the result."""
        return self.conv1.shape(shape)

    def live(self, shape: Shape) -> int:
        """Elements that are alive at once, at the worst of three moments."""
        old, new = plane_elements(shape), plane_elements(self.shape(shape))
        return old + max(old + new, 2 * new, (3 if self.shortcut is not None else 2) * new)

    def __call__(self, x: Stream) -> Stream:
        # What is no longer read is let go of at once: these are a decoder's largest tensors.
        h = self.norm2(self.conv1(self.norm1(x)))
        residual = x.planes if self.shortcut is None else self.shortcut(x.planes, sums=False).planes
        return self.conv2(h, residual)


@dataclass(frozen=True)
class FrameAttention:
    """Self-attention with one head among the pixels of each frame."""

    norm: Norm
    qkv: Tensor
    """[3 C, C]"""
    qkv_bias: Tensor
    proj: Tensor
    proj_bias: Tensor

    @classmethod
    def of(cls, norm: Norm, parts: Iterable[Any]) -> FrameAttention:
        """Of the modules for query, key, value and the projection: linears, or convolutions of size 1."""
        weights = [(part.weight.flatten(1), part.bias) for part in parts]
        qkv, qkv_bias = (torch.cat([pair[i] for pair in weights[:3]]) for i in range(2))
        return cls(norm, qkv, qkv_bias, *weights[3])

    def shape(self, shape: Shape) -> Shape:
        """Of the result."""
        return shape

    def live(self, shape: Shape) -> int:
        """Elements that are alive at once, scores counted in elements of two bytes."""
        frames, height, width, _ = shape
        pixels = height * width
        return 6 * plane_elements(shape) + 3 * pixels**2 * min(frames, max(1, SCORE_BYTES // (6 * pixels**2)))

    def __call__(self, x: Stream) -> Stream:
        frames, height, width, channels = x.planes.shape
        tokens = self.norm(x, silu=False)[:, :-1, :-1].reshape(frames, -1, channels)
        at_once = max(1, SCORE_BYTES // (6 * tokens.shape[1] ** 2))
        for i in range(0, frames, at_once):
            q, k, v = F.linear(tokens[i : i + at_once], self.qkv, self.qkv_bias).chunk(3, -1)
            h = F.linear(attend(q, k, v), self.proj, self.proj_bias)
            x.planes[i : i + at_once, :-1, :-1] += h.unflatten(1, (height - 1, width - 1))
        return Stream(x.planes, channel_sums(x.planes))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention [B, N, C] with one head, wider than any fused kernel takes: scores in float32, two GEMMs."""
    if not (q.is_cuda and torch.__version__ >= "2.8"):
        return F.scaled_dot_product_attention(q, k, v)
    scores = torch.bmm(q, k.mT, out_dtype=torch.float32)
    return torch.bmm(softmax_rows(scores, q.shape[-1] ** -0.5, v.dtype), v)


@dataclass(frozen=True)
class Upsample:
    """Frames or pixels doubled by a convolution alone, or linearly before it, which may be mixed with what it reads."""

    conv: Conv
    times: int = 1
    space: int = 1
    mixed: bool = False

    def shape(self, shape: Shape) -> Shape:
        """Of the result."""
        return self.conv.shape(self._grown(shape))

    def live(self, shape: Shape) -> int:
        """Elements that are alive at once."""
        grown = self._grown(shape)
        return (0 if grown == shape else plane_elements(shape)) + self.conv.live(grown)

    def _grown(self, shape: Shape) -> Shape:
        frames, height, width, channels = shape
        return self.times * (frames - 1) + 1, height * self.space, width * self.space, channels

    def __call__(self, x: Stream) -> Stream:
        planes = x.planes if self.times == self.space == 1 else grow_planes(x.planes, self.times, self.space)
        return self.conv(planes, planes if self.mixed else None)


def run(layers: Iterable[Any], x: Stream) -> Stream:
    """Layers, one after the other."""
    for layer in layers:
        x = layer(x)
    return x


def most_live(layers: Iterable[Any], shape: Shape) -> tuple[int, Shape]:
    """Most elements alive at once in layers that begin with planes of `shape`, and the shape of what they give."""
    most = 0
    for layer in layers:
        most, shape = max(most, layer.live(shape)), layer.shape(shape)
    return most, shape


def padded_channels(channels: int) -> int:
    """Channels that a convolution's tiles want."""
    return -(-channels // 64) * 64
