"""The video autoencoders of Open-Sora-Plan 1.1 and 1.2, with the parameter names of their checkpoints.

Both are CausalVAEModel: the configuration names the blocks of each level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from pab_kernels.models.hosts.causal import check_video, posterior
from pab_kernels.models.hosts.layers import check_fixed
from pab_kernels.models.hosts.plan_vae_blocks import (
    AttnBlock3DFix,
    Downsample,
    ResnetBlock2D,
    ResnetBlock3D,
    Spatial2xTime2x3DDownsample,
    Spatial2xTime2x3DUpsample,
    SpatialUpsample2x,
    TimeDownsampleRes2x,
    TimeUpsampleRes2x,
    conv,
    frame_conv,
    norm,
)
from pab_kernels.models.hosts.tiles import Tiling, chunks, over_space, over_time, tiles

LATENT_SCALE = 0.18215
MOST_LEVELS, MOST_BLOCKS = 8, 32
"""Twice and more what released models have."""

_BLOCKS: dict[str, Callable[..., nn.Module]] = {
    cls.__name__: cls
    for cls in (
        ResnetBlock2D,
        ResnetBlock3D,
        AttnBlock3DFix,
        Downsample,
        TimeDownsampleRes2x,
        Spatial2xTime2x3DDownsample,
        SpatialUpsample2x,
        TimeUpsampleRes2x,
        Spatial2xTime2x3DUpsample,
    )
} | {"CausalConv3d": conv, "Conv2d": frame_conv}


def _block(name: str, allowed: Sequence[str], *sizes: int) -> nn.Module:
    if name not in allowed:
        raise ValueError(f"a block is {name!r}, but this host only has {', '.join(allowed)} there")
    return _BLOCKS[name](*sizes)


_CONVS = ("CausalConv3d", "Conv2d")
_RESNETS = ("ResnetBlock2D", "ResnetBlock3D")


def _middle(resnet: str, attention: str, channels: int) -> nn.Module:
    middle = nn.Module()
    middle.block_1 = _block(resnet, _RESNETS, channels, channels)
    middle.attn_1 = _block(attention, ("AttnBlock3DFix",), channels)
    middle.block_2 = _block(resnet, _RESNETS, channels, channels)
    return middle


def _run_middle(middle: Any, x: Tensor) -> Tensor:
    return middle.block_2(middle.attn_1(middle.block_1(x)))


def _level(resnet: str, widths: Sequence[int], **resamplers: tuple[str, tuple[str, ...]]) -> nn.Module:
    """Blocks from each of `widths` to the next; `resamplers` are what follows, "" for none."""
    level = nn.Module()
    pairs = pairwise(widths)
    level.block = nn.ModuleList(_block(resnet, _RESNETS, a, b) for a, b in pairs)
    for name, (block, allowed) in resamplers.items():
        if block:
            setattr(level, name, _block(block, allowed, widths[-1]))
    return level


def _run_level(level: Any, x: Tensor, *resamplers: str) -> Tensor:
    for block in level.block:
        x = block(x)
    for name in resamplers:
        if hasattr(level, name):
            x = getattr(level, name)(x)
    return x


class Encoder(nn.Module):
    """Video [B, 3, F, H, W] to moments."""

    def __init__(self, widths: Sequence[int], in_width: int, moments: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        count = config["num_res_blocks"]
        self.conv_in = _block(config["encoder_conv_in"], _CONVS, 3, in_width)
        self.down = nn.ModuleList(
            _level(
                config["encoder_resnet_blocks"][i],
                ((in_width, *widths)[i], *(width,) * count),
                downsample=(config["encoder_spatial_downsample"][i], ("Downsample", "Spatial2xTime2x3DDownsample")),
                time_downsample=(config["encoder_temporal_downsample"][i], ("TimeDownsampleRes2x",)),
            )
            for i, width in enumerate(widths)
        )
        self.mid = _middle(config["encoder_mid_resnet"], config["encoder_attention"], widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = _block(config["encoder_conv_out"], _CONVS, widths[-1], moments)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = _run_level(level, x, "downsample", "time_downsample")
        return self.conv_out(F.silu(self.norm_out(_run_middle(self.mid, x))))


class Decoder(nn.Module):
    """Latents to video."""

    def __init__(self, widths: Sequence[int], latent: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        count = config["num_res_blocks"] + 1
        self.conv_in = _block(config["decoder_conv_in"], _CONVS, latent, widths[-1])
        self.mid = _middle(config["decoder_mid_resnet"], config["decoder_attention"], widths[-1])
        spatial = ("SpatialUpsample2x", "Spatial2xTime2x3DUpsample")
        self.up = nn.ModuleList(
            _level(
                config["decoder_resnet_blocks"][i],
                ((*widths, widths[-1])[i + 1], *(width,) * count),
                upsample=(config["decoder_spatial_upsample"][i], spatial),
                time_upsample=(config["decoder_temporal_upsample"][i], ("TimeUpsampleRes2x",)),
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = norm(widths[0])
        self.conv_out = _block(config["decoder_conv_out"], _CONVS, widths[0], 3)

    def forward(self, z: Tensor) -> Tensor:
        x = _run_middle(self.mid, self.conv_in(z))
        for level in reversed(self.up):
            x = _run_level(level, x, "upsample", "time_upsample")
        return self.conv_out(F.silu(self.norm_out(x)))


_V110 = (("", "SpatialUpsample2x", "SpatialUpsample2x", "SpatialUpsample2x"), ("", "", *("TimeUpsampleRes2x",) * 2))


class CausalVAE(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Open-Sora-Plan's autoencoder: frame 0, then four frames a latent; an eighth of height and width.

    The defaults are the released 1.1. `tiling` is None, off, as in the original until a script switches it on.

    Parameters
    ----------
    hidden_size, hidden_size_mult, num_res_blocks, z_channels, embed_dim
        Widths of the levels, from the pixels down, and blocks of each.
    encoder_*, decoder_*, q_conv
        Names of the blocks, in the original's words.
    double_z, dropout, attn_resolutions, use_quant_layer
        Part of the official configuration, accepted only as they are in the released models.
    resolution, in_channels, out_channels, lr, loss_type, loss_params
        Part of the official configuration, without effect on the numbers.

    Raises
    ------
    ValueError
        For a block or setting that no released model has.
    """

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 128,
        hidden_size_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        z_channels: int = 4,
        embed_dim: int = 4,
        attn_resolutions: Sequence[int] = (),
        dropout: float = 0.0,
        double_z: bool = True,
        use_quant_layer: bool = True,
        q_conv: str = "CausalConv3d",
        encoder_conv_in: str = "Conv2d",
        encoder_conv_out: str = "CausalConv3d",
        encoder_attention: str = "AttnBlock3DFix",
        encoder_resnet_blocks: Sequence[str] = (*("ResnetBlock2D",) * 2, *("ResnetBlock3D",) * 2),
        encoder_spatial_downsample: Sequence[str] = (*("Downsample",) * 3, ""),
        encoder_temporal_downsample: Sequence[str] = ("", *("TimeDownsampleRes2x",) * 2, ""),
        encoder_mid_resnet: str = "ResnetBlock3D",
        decoder_conv_in: str = "CausalConv3d",
        decoder_conv_out: str = "CausalConv3d",
        decoder_attention: str = "AttnBlock3DFix",
        decoder_resnet_blocks: Sequence[str] = ("ResnetBlock3D",) * 4,
        decoder_spatial_upsample: Sequence[str] = ("", *("SpatialUpsample2x",) * 3),
        decoder_temporal_upsample: Sequence[str] = ("", "", *("TimeUpsampleRes2x",) * 2),
        decoder_mid_resnet: str = "ResnetBlock3D",
        resolution: int = 256,
        in_channels: int = 3,
        out_channels: int = 3,
        lr: float | None = None,
        loss_type: str | None = None,
        loss_params: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_fixed(
            attn_resolutions=(list(attn_resolutions), []),
            dropout=(dropout, 0.0),
            double_z=(double_z, True),
            use_quant_layer=(use_quant_layer, True),
            in_channels=(in_channels, 3),
            out_channels=(out_channels, 3),
        )
        if not (1 <= len(hidden_size_mult) <= MOST_LEVELS and 1 <= num_res_blocks <= MOST_BLOCKS):
            raise ValueError(
                f"hidden_size_mult, num_res_blocks: got {len(hidden_size_mult)} levels of {num_res_blocks} blocks, "
                f"must be 1 to {MOST_LEVELS} and 1 to {MOST_BLOCKS}"
            )
        widths = [hidden_size * multiplier for multiplier in hidden_size_mult]
        for name in ("encoder_resnet_blocks", "encoder_spatial_downsample", "encoder_temporal_downsample"):
            for key in (name, name.replace("encoder", "decoder").replace("downsample", "upsample")):
                if len(self.config[key]) != len(widths):
                    raise ValueError(
                        f"{key}: got {len(self.config[key])}, must be one for each of {len(widths)} levels"
                    )
        self.encoder = Encoder(widths, hidden_size, 2 * z_channels, self.config)
        self.decoder = Decoder(widths, z_channels, self.config)
        self.quant_conv = _block(q_conv, _CONVS, 2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = _block(q_conv, _CONVS, embed_dim, z_channels, 1)
        self.tiling: Tiling | None = None

    @property
    def latent_channels(self) -> int:
        """Channels of the transformer's latents."""
        return self.config["embed_dim"]

    def decode(self, latents: Tensor) -> Tensor:
        """Video [B, 3, 4 (T - 1) + 1, 8 H, 8 W], about [-1, 1], of the transformer's latents [B, 4, T, H, W]."""
        check_video("latents", latents, self.latent_channels)
        return torch.cat(list(self.decode_chunks(latents, self.tiling)), dim=2)

    def decode_chunks(
        self,
        latents: Tensor,
        tiling: Tiling | None,
        run: Callable[[Tensor], Tensor] | None = None,
        each: Callable[..., Iterable[Tensor]] = map,
    ) -> Iterator[Tensor]:
        """Chunks of the video of latents [B, 4, T, H, W], one after the other in time.

        Parameters
        ----------
        run : callable, optional
            Decodes a piece in the place of `decode_piece`.
        each : callable
            Decodes a list of pieces as ``map(run, pieces)`` does.
        """
        run, z = self.decode_piece if run is None else run, latents / LATENT_SCALE
        if tiling is None or not tiling.exceeded(z, latent=True):
            yield run(z)
            return
        stride = int(tiling.tile_latent_min_size * (1 - tiling.tile_overlap_factor))
        blend = int(tiling.tile_sample_min_size * tiling.tile_overlap_factor)
        sizes = (tiling.tile_latent_min_size, stride, blend, tiling.tile_sample_min_size - blend)
        pieces = [z[:, :, start:end] for start, end in chunks(z.shape[2], tiling.tile_latent_min_size_t)]
        found = iter(each(run, [tile for piece in pieces for row in tiles(piece, *sizes[:2]) for tile in row]))
        for i, piece in enumerate(pieces):
            chunk = over_space(lambda tile: next(found), piece, *sizes)
            yield chunk if i == 0 else chunk[:, :, 1:]  # the frame that it shares with the one before

    def decode_piece(self, z: Tensor) -> Tensor:
        """Video of latents over 0.18215, all at once."""
        return self.decoder(self.post_quant_conv(z))

    def encode(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The transformer's latents of a video [B, 3, F, H, W] in [-1, 1].

        Parameters
        ----------
        generator : torch.Generator, optional
            Draws a sample of the posterior, as the original does; None gives the mean.
        """
        check_video("video", video, 3)
        tiling = self.tiling
        if tiling is None or not tiling.exceeded(video, latent=False):
            return posterior(self.encode_piece(video), generator) * LATENT_SCALE
        stride = int(tiling.tile_sample_min_size * (1 - tiling.tile_overlap_factor))
        blend = int(tiling.tile_latent_min_size * tiling.tile_overlap_factor)
        sizes = (tiling.tile_sample_min_size, stride, blend, tiling.tile_latent_min_size - blend)
        moments = over_time(
            lambda chunk: over_space(self.encode_piece, chunk, *sizes), video, tiling.tile_sample_min_size_t
        )
        return posterior(moments, generator) * LATENT_SCALE

    def encode_piece(self, video: Tensor) -> Tensor:
        """Moments of a video, all at once."""
        return self.quant_conv(self.encoder(video))
