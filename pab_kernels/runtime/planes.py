"""Layers of video decoders on planes: a host's modules, with their weights packed for the ops."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pab_kernels.ops.planes import channel_sums, conv_planes, group_norm_silu, pack_upsampled, pack_weight

SCORE_BYTES = 2**30
"""Of attention scores at a time."""


@dataclass
class Stream:
    """Planes on their way through a decoder, and the sums of their channels for the next norm."""

    planes: Tensor
    sums: Tensor | None = None


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

    def __call__(self, x: Stream) -> Stream:
        h = self.conv1(self.norm1(x))
        h = Stream(self.norm2(h))
        # What is no longer read is let go of at once: this is the largest moment of a decoder.
        residual = x.planes if self.shortcut is None else self.shortcut(x.planes, sums=False).planes
        return self.conv2(h.planes, residual)


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
    scores = torch.bmm(q, k.mT, out_dtype=torch.float32).mul_(q.shape[-1] ** -0.5)
    return torch.bmm(torch.softmax(scores, -1).to(v.dtype), v)


def padded_channels(channels: int) -> int:
    """Channels that a convolution's tiles want."""
    return -(-channels // 64) * 64


def packed_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())
