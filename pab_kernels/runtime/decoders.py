"""The hosts' decoders on planes: channels last, norms summed by the convolution before, nothing padded or moved."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels.models.hosts.causal import CausalConv3d
from pab_kernels.models.hosts.open_sora_plan_vae import CausalVAE
from pab_kernels.models.hosts.open_sora_vae import SPATIAL_SCALE, OpenSoraVAE, TemporalResBlock
from pab_kernels.models.hosts.plan_vae_blocks import (
    ResnetBlock3D,
    Spatial2xTime2x3DUpsample,
    SpatialUpsample2x,
    TimeUpsampleRes2x,
)
from pab_kernels.ops.planes import channel_sums, from_planes, grow_planes, to_planes
from pab_kernels.runtime.planes import Conv, FrameAttention, Norm, ResBlock, Stream, padded_channels


class TemporalDecoder:
    """Open-Sora's temporal decoder: [4, T, H, W] to [4, 4 T, H, W]."""

    def __init__(self, vae: Any) -> None:
        decoder = vae.decoder
        self.post_quant = vae.post_quant_conv.conv
        self.channels = padded_channels(decoder.conv1.conv.weight.shape[1])
        self.conv_in = Conv.of(decoder.conv1.conv, channels=self.channels)
        self.steps: list[Any] = [_temporal_block(block) for block in decoder.res_blocks]
        for level in reversed(range(len(decoder.block_res_blocks))):
            self.steps += [_temporal_block(block) for block in decoder.block_res_blocks[level]]
            if level > 0 and isinstance(decoder.conv_blocks[level - 1], CausalConv3d):
                self.steps.append(_doubling(decoder.conv_blocks[level - 1].conv))
        self.norm_out = Norm.of(decoder.norm1, False)
        self.conv_out = Conv.of(decoder.conv_out.conv)

    def __call__(self, z: Tensor) -> Tensor:
        z = F.conv3d(z[None], self.post_quant.weight, self.post_quant.bias)[0]
        x = self.conv_in(to_planes(z, self.channels))
        for step in self.steps:
            x = step(x)
        return from_planes(self.conv_out(self.norm_out(x), sums=False).planes)


def _temporal_block(block: TemporalResBlock) -> ResBlock:
    return ResBlock(
        Norm.of(block.norm1, False),
        Conv.of(block.conv1.conv),
        Norm.of(block.norm2, False),
        Conv.of(block.conv2.conv),
        None if block.conv3 is None else Conv.of(block.conv3.conv),
    )


def _doubling(conv: Any) -> Any:
    up = Conv.doubling(conv)
    return lambda x: up(x.planes)


class SpatialDecoder:
    """diffusers' image decoder: spatial latents [4, F, H, W] to planes [F, 8 H + 1, 8 W + 1, 3]."""

    def __init__(self, vae: Any) -> None:
        decoder = vae.decoder
        self.post_quant = vae.post_quant_conv
        self.channels = padded_channels(decoder.conv_in.weight.shape[1])
        self.conv_in = Conv.of(decoder.conv_in, channels=self.channels)
        middle = decoder.mid_block
        self.steps: list[Any] = [_image_block(middle.resnets[0])]
        for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
            parts = (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
            self.steps += [FrameAttention.of(Norm.of(attention.group_norm, True), parts), _image_block(resnet)]
        for up in decoder.up_blocks:
            self.steps += [_image_block(resnet) for resnet in up.resnets]
            self.steps += [_upsampling(each.conv) for each in up.upsamplers or ()]
        self.norm_out = Norm.of(decoder.conv_norm_out, True)
        self.conv_out = Conv.of(decoder.conv_out)

    def __call__(self, z: Tensor) -> Tensor:
        images = F.conv2d(z.transpose(0, 1), self.post_quant.weight, self.post_quant.bias)
        x = self.conv_in(to_planes(images.transpose(0, 1), self.channels))
        for step in self.steps:
            x = step(x)
        return self.conv_out(self.norm_out(x), sums=False).planes


def _image_block(block: Any) -> ResBlock:
    return ResBlock(
        Norm.of(block.norm1, True),
        Conv.of(block.conv1),
        Norm.of(block.norm2, True),
        Conv.of(block.conv2),
        None if block.conv_shortcut is None else Conv.of(block.conv_shortcut),
    )


def _upsampling(conv: Any) -> Any:
    up = Conv.upsampled(conv)
    return lambda x: up(x.planes)


class PlanDecoder:
    """Open-Sora-Plan's decoder: latents over 0.18215 [4, T, H, W] to planes [4 (T - 1) + 1, 8 H + 1, 8 W + 1, 3]."""

    def __init__(self, vae: CausalVAE) -> None:
        decoder: Any = vae.decoder
        self.post_quant: Any = vae.post_quant_conv
        self.channels = padded_channels(decoder.conv_in.conv.weight.shape[1])
        self.conv_in = Conv.of(decoder.conv_in.conv, "first", self.channels)
        attention = decoder.mid.attn_1
        parts = (attention.q.conv, attention.k.conv, attention.v.conv, attention.proj_out.conv)
        self.steps: list[Any] = [
            _plan_block(decoder.mid.block_1),
            FrameAttention.of(Norm.of(attention.norm, False), parts),
            _plan_block(decoder.mid.block_2),
        ]
        for level in reversed(decoder.up):
            self.steps += [_plan_block(block) for block in level.block]
            for name in ("upsample", "time_upsample"):
                if hasattr(level, name):
                    self.steps.append(_plan_upsampling(getattr(level, name)))
        self.norm_out = Norm.of(decoder.norm_out, False)
        self.conv_out = Conv.of(decoder.conv_out.conv, "first")

    def __call__(self, z: Tensor) -> Tensor:
        x = self.conv_in(to_planes(self.post_quant(z[None])[0], self.channels))
        for step in self.steps:
            x = step(x)
        return self.conv_out(self.norm_out(x), sums=False).planes


def _plan_block(block: ResnetBlock3D) -> ResBlock:
    return ResBlock(
        Norm.of(block.norm1, False),
        Conv.of(block.conv1.conv, "first"),
        Norm.of(block.norm2, False),
        Conv.of(block.conv2.conv, "first"),
        Conv.of(block.nin_shortcut.conv, "first") if hasattr(block, "nin_shortcut") else None,
    )


def _plan_upsampling(block: Any) -> Any:
    if isinstance(block, SpatialUpsample2x):
        return _upsampling(block.conv.conv)
    conv = Conv.of(block.conv.conv, "first")
    if isinstance(block, Spatial2xTime2x3DUpsample):
        return lambda x: conv(grow_planes(x.planes, 2, 2))
    assert isinstance(block, TimeUpsampleRes2x)
    # alpha * x + (1 - alpha) * conv(x): the second factor goes into the weights, the first to the residual.
    alpha = torch.sigmoid(block.mix_factor.double()).item()
    parts = conv.weight, block.conv.conv.bias
    weight, bias = ((part.double() * (1 - alpha)).to(part.dtype) for part in parts)  # type: ignore[union-attr]
    mixed = Conv(weight, bias, "first", residual_scale=alpha)

    def mix(x: Stream) -> Stream:
        grown = grow_planes(x.planes, 2, 1)
        return mixed(grown, grown)

    return mix


class OpenSoraDecoder:
    """Both parts of Open-Sora's autoencoder. Pieces in time are the host's; frames go through the second part alone."""

    def __init__(self, vae: OpenSoraVAE) -> None:
        self.vae = vae
        self.temporal = TemporalDecoder(vae.temporal_vae)
        self.spatial = SpatialDecoder(vae.spatial_vae.module)
        self.scale = SPATIAL_SCALE


__all__ = ["OpenSoraDecoder", "PlanDecoder", "SpatialDecoder", "TemporalDecoder", "channel_sums"]
