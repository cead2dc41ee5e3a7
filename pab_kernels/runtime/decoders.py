"""The hosts' decoders on planes: channels last, norms summed by the convolution before, nothing padded or moved."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels.models.hosts.causal import CausalConv3d
from pab_kernels.models.hosts.open_sora_plan_vae import CausalVAE
from pab_kernels.models.hosts.open_sora_vae import TemporalResBlock, TemporalVAE
from pab_kernels.models.hosts.plan_vae_blocks import (
    ResnetBlock3D,
    Spatial2xTime2x3DUpsample,
    SpatialUpsample2x,
    TimeUpsampleRes2x,
)
from pab_kernels.ops.planes import to_planes
from pab_kernels.runtime.planes import (
    Conv,
    FrameAttention,
    Norm,
    ResBlock,
    Shape,
    Stream,
    Upsample,
    most_live,
    padded_channels,
    plane_elements,
    run,
)

log = logging.getLogger(__name__)


class PlaneDecoder:
    """Latents [C, T, H, W] to planes: a convolution of the latents, layers, norm and convolution.

    Weights are packed copies of the host's; build it again where those change.
    """

    def __init__(self, post_quant: Any, conv_in: Any, front: str, layers: list[Any], norm: Norm, conv_out: Any) -> None:
        self.post_quant = post_quant
        self.channels = padded_channels(conv_in.weight.shape[1])
        self.conv_in = Conv.of(conv_in, front, self.channels)
        self.layers = layers
        self.norm = norm
        self.conv_out = Conv.of(conv_out, front)
        self._compiled = False

    def __call__(self, z: Tensor) -> Tensor:
        z = self.post_quant(z[None])[0]
        return self._last(run(self.layers, self.conv_in(to_planes(z, self.channels))))

    def compile(self) -> None:
        """Compile the kernels, several at a time, by running each kind of layer on planes of 2 x 2 latents.

        Triton compiles a kernel when it is first launched, for seconds, most of them outside of Python's lock. Where
        that fails in a thread, a warning says so, and the rest is compiled when it is used. A second call does nothing.
        """
        if self._compiled:
            return
        shape = (2, 2, 2, self.channels)
        jobs: dict[Hashable, tuple[Callable[[Stream], object], Shape]] = {
            "in": (lambda x: self.conv_in(x.planes), shape)
        }
        shape = self.conv_in.shape(shape)
        for layer in self.layers:
            new = layer.shape(shape)
            if not isinstance(layer, FrameAttention):  # a thread of its own would leave it a workspace of cuBLAS
                grown = tuple(b > a for a, b in zip(shape[:2], new[:2], strict=True))
                jobs.setdefault((type(layer), shape[3], new[3], grown), (layer, shape))
            shape = new
        jobs["out"] = (self._last, shape)
        self._compiled = True
        with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
            try:
                list(pool.map(self._run_once, *zip(*jobs.values(), strict=True)))
            except RuntimeError as error:  # if it is more than the threads, decoding says so too
                log.warning("a decoder's kernels are compiled one after the other, as they are used: %s", error)

    def _run_once(self, layer: Callable[[Stream], object], shape: Shape) -> None:
        """A layer on zeros, in a thread that has run nothing before."""
        weight = self.conv_out.weight
        frames, height, width, channels = shape
        with torch.no_grad(), torch.cuda.device_of(weight):  # each thread has its own
            # Zeros that are made here, not handed over: they give the thread its CUDA context. A kernel that takes a
            # tensor descriptor fails without one.
            planes = weight.new_zeros(frames, height + 1, width + 1, channels)
            layer(Stream(planes, planes.new_zeros(frames, channels, 2, dtype=torch.float32)))

    def _last(self, x: Stream) -> Tensor:
        return self.conv_out(self.norm(x), sums=False).planes

    @property
    def weight_bytes(self) -> int:
        """Of the packed copies."""
        return sum(conv.weight.nbytes for layer in (self, *self.layers) for conv in convolutions(layer))

    def nbytes(self, frames: int, height: int, width: int) -> int:
        """Most memory of a piece of so many latents, weights not counted."""
        shape = self.conv_in.shape((frames, height, width, self.channels))
        most, shape = most_live(self.layers, shape)
        most = max(most, plane_elements(shape) + self.conv_out.live(shape))
        return most * self.conv_out.weight.element_size()


def convolutions(layer: Any) -> list[Conv]:
    """Those that a layer holds."""
    return [value for value in vars(layer).values() if isinstance(value, Conv)]


def temporal_decoder(vae: TemporalVAE) -> PlaneDecoder:
    """Open-Sora's temporal decoder: [4, T, H, W] to planes of 4 T frames."""
    decoder: Any = vae.decoder
    layers: list[Any] = [_temporal_block(block) for block in decoder.res_blocks]
    for level in reversed(range(len(decoder.block_res_blocks))):
        layers += [_temporal_block(block) for block in decoder.block_res_blocks[level]]
        if level > 0 and isinstance(decoder.conv_blocks[level - 1], CausalConv3d):
            layers.append(Upsample(Conv.doubling(decoder.conv_blocks[level - 1].conv)))
    norm = Norm.of(decoder.norm1, False)
    return PlaneDecoder(vae.post_quant_conv, decoder.conv1.conv, "zeros", layers, norm, decoder.conv_out.conv)


def _temporal_block(block: TemporalResBlock) -> ResBlock:
    return ResBlock(
        Norm.of(block.norm1, False),
        Conv.of(block.conv1.conv),
        Norm.of(block.norm2, False),
        Conv.of(block.conv2.conv),
        None if block.conv3 is None else Conv.of(block.conv3.conv),
    )


def spatial_decoder(vae: Any) -> PlaneDecoder:
    """diffusers' image decoder: latents [4, F, H, W] to planes of F frames, each with norms of its own."""
    decoder = vae.decoder
    middle = decoder.mid_block
    layers: list[Any] = [_image_block(middle.resnets[0])]
    for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
        parts = (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
        layers += [FrameAttention.of(Norm.of(attention.group_norm, True), parts), _image_block(resnet)]
    for up in decoder.up_blocks:
        layers += [_image_block(resnet) for resnet in up.resnets]
        layers += [Upsample(Conv.upsampled(each.conv)) for each in up.upsamplers or ()]
    weights = vae.post_quant_conv.weight[:, :, None], vae.post_quant_conv.bias
    norm = Norm.of(decoder.conv_norm_out, True)
    return PlaneDecoder(lambda z: F.conv3d(z, *weights), decoder.conv_in, "zeros", layers, norm, decoder.conv_out)


def _image_block(block: Any) -> ResBlock:
    return ResBlock(
        Norm.of(block.norm1, True),
        Conv.of(block.conv1),
        Norm.of(block.norm2, True),
        Conv.of(block.conv2),
        None if block.conv_shortcut is None else Conv.of(block.conv_shortcut),
    )


def plan_decoder(vae: CausalVAE) -> PlaneDecoder:
    """Open-Sora-Plan's decoder: latents over 0.18215 [4, T, H, W] to planes of 4 (T - 1) + 1 frames.

    Raises
    ------
    ValueError
        The configuration has blocks in its decoder that are not causal convolutions of both versions.
    """
    wanted = {
        "decoder_conv_in": "CausalConv3d",
        "decoder_conv_out": "CausalConv3d",
        "decoder_mid_resnet": "ResnetBlock3D",
        "decoder_resnet_blocks": "ResnetBlock3D",
    }
    for key, value in wanted.items():
        found = vae.config[key]
        if set([found] if isinstance(found, str) else found) != {value}:
            raise ValueError(f"{key}: got {found}, must be {value} to be decoded on planes")
    decoder: Any = vae.decoder
    attention = decoder.mid.attn_1
    parts = (attention.q.conv, attention.k.conv, attention.v.conv, attention.proj_out.conv)
    middle = FrameAttention.of(Norm.of(attention.norm, False), parts)
    layers: list[Any] = [_plan_block(decoder.mid.block_1), middle, _plan_block(decoder.mid.block_2)]
    for level in reversed(decoder.up):
        layers += [_plan_block(block) for block in level.block]
        resamplers = (getattr(level, name, None) for name in ("upsample", "time_upsample"))
        layers += [_plan_upsampling(block) for block in resamplers if block is not None]
    norm = Norm.of(decoder.norm_out, False)
    return PlaneDecoder(vae.post_quant_conv, decoder.conv_in.conv, "first", layers, norm, decoder.conv_out.conv)


def _plan_block(block: ResnetBlock3D) -> ResBlock:
    return ResBlock(
        Norm.of(block.norm1, False),
        Conv.of(block.conv1.conv, "first"),
        Norm.of(block.norm2, False),
        Conv.of(block.conv2.conv, "first"),
        Conv.of(block.nin_shortcut.conv, "first") if hasattr(block, "nin_shortcut") else None,
    )


def _plan_upsampling(block: Any) -> Upsample:
    if isinstance(block, SpatialUpsample2x):
        return Upsample(Conv.upsampled(block.conv.conv))
    conv = Conv.of(block.conv.conv, "first")
    if isinstance(block, Spatial2xTime2x3DUpsample):
        return Upsample(conv, times=2, space=2)
    assert isinstance(block, TimeUpsampleRes2x)
    # alpha * x + (1 - alpha) * conv(x): the second factor goes into the weights, the first to the residual.
    alpha = 0.5 if block.mix_factor.is_meta else torch.sigmoid(block.mix_factor.double()).item()
    parts = conv.weight, block.conv.conv.bias
    weight, bias = ((part.double() * (1 - alpha)).to(part.dtype) for part in parts)  # type: ignore[union-attr]
    return Upsample(Conv(weight, bias, "first", residual_scale=alpha), times=2, mixed=True)
