"""The video autoencoder of Open-Sora 1.2, with the parameter names of its official checkpoint.

Frames go through diffusers' image autoencoder one by one; a temporal autoencoder codes what that gives, 17 frames in
five. Neither looks beyond its piece, so there is a seam after every 17 frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from pab_kernels.models.hosts.causal import CausalConv3d, Triple, check_video, each_frame, pad_front, posterior
from pab_kernels.models.hosts.layers import check_fixed

SPATIAL_SCALE = 0.18215
"""Of the spatial latents; the image autoencoder's own configuration says 0.13025, and the original ignores it."""

MOST_BLOCKS = 32
"""Of a level, or levels: many times what the released model has."""

_SPATIAL: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "act_fn": "silu",
}
_TEMPORAL: dict[str, Any] = {
    "in_out_channels": 4,
    "latent_embed_dim": 4,
    "embed_dim": 4,
    "filters": 128,
    "num_res_blocks": 4,
    "channel_multipliers": (1, 2, 2, 4),
    "temporal_downsample": (False, True, True),
    "num_groups": 32,
}


def _conv(in_channels: int, out_channels: int, size: int = 3, *, time_stride: int = 1, bias: bool = True) -> nn.Module:
    kernel: Triple = (size, size, size)
    return CausalConv3d(in_channels, out_channels, kernel, stride=(time_stride, 1, 1), front="zeros", bias=bias)


class TemporalResBlock(nn.Module):
    """Norm, SiLU, convolution, twice; the shortcut is a 1x1x1 convolution where the widths differ. No biases."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = _conv(in_channels, out_channels, bias=False)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.conv2 = _conv(out_channels, out_channels, bias=False)
        self.conv3 = None if in_channels == out_channels else _conv(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.conv3 is None else self.conv3(x)
        x = self.conv1(F.silu(self.norm1(x)))
        return residual + self.conv2(F.silu(self.norm2(x)))


def _res_blocks(count: int, in_channels: int, out_channels: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        TemporalResBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(count)
    )


class TemporalEncoder(nn.Module):
    """[B, in, T, H, W] to moments [B, 2 * embed, T / 4, H, W]."""

    def __init__(
        self, channels: int, embed: int, widths: Sequence[int], halves: Sequence[bool], count: int, groups: int
    ):
        super().__init__()
        self.conv_in = _conv(channels, widths[0], bias=False)
        before = (widths[0], *widths[:-1])
        self.block_res_blocks = nn.ModuleList(
            _res_blocks(count, a, b, groups) for a, b in zip(before, widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            _conv(width, width, time_stride=2) if half else nn.Identity()
            for width, half in zip(widths[:-1], halves, strict=True)
        )
        self.res_blocks = _res_blocks(count, widths[-1], widths[-1], groups)
        self.norm1 = nn.GroupNorm(groups, widths[-1])
        self.conv2 = _conv(widths[-1], 2 * embed, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level, blocks in enumerate(self.block_res_blocks):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x)
            if level < len(self.conv_blocks):
                x = self.conv_blocks[level](x)
        for block in self.res_blocks:
            x = block(x)
        return self.conv2(F.silu(self.norm1(x)))


class TemporalDecoder(nn.Module):
    """[B, embed, T, H, W] to [B, out, 4 T, H, W]."""

    def __init__(
        self, channels: int, embed: int, widths: Sequence[int], halves: Sequence[bool], count: int, groups: int
    ):
        super().__init__()
        self.conv1 = _conv(embed, widths[-1])
        self.res_blocks = _res_blocks(count, widths[-1], widths[-1], groups)
        after = (*widths[1:], widths[-1])
        self.block_res_blocks = nn.ModuleList(
            _res_blocks(count, a, b, groups) for a, b in zip(after, widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            _conv(width, 2 * width) if half else nn.Identity() for width, half in zip(widths[1:], halves, strict=True)
        )
        self.norm1 = nn.GroupNorm(groups, widths[0])
        self.conv_out = _conv(widths[0], channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for block in self.res_blocks:
            x = block(x)
        for level in reversed(range(len(self.block_res_blocks))):
            for block in self.block_res_blocks[level]:  # type: ignore[attr-defined]
                x = block(x)
            if level > 0 and not isinstance(self.conv_blocks[level - 1], nn.Identity):
                x = double_frames(self.conv_blocks[level - 1](x))
        return self.conv_out(F.silu(self.norm1(x)))


def double_frames(x: Tensor) -> Tensor:
    """[B, 2 C, T, H, W] to [B, C, 2 T, H, W]: channel 2 c + s becomes frame 2 t + s."""
    return x.unflatten(1, (-1, 2)).permute(0, 1, 3, 2, 4, 5).flatten(2, 3)


class TemporalVAE(nn.Module):
    """Four frames of spatial latents in one, with zeros in front of the first."""

    def __init__(
        self,
        in_out_channels: int,
        latent_embed_dim: int,
        embed_dim: int,
        filters: int,
        num_res_blocks: int,
        channel_multipliers: Sequence[int],
        temporal_downsample: Sequence[bool],
        num_groups: int,
    ) -> None:
        super().__init__()
        halves = tuple(temporal_downsample)
        widths = [filters * multiplier for multiplier in channel_multipliers]
        self.factor = 2 ** sum(halves)
        rest = (widths, halves, num_res_blocks, num_groups)
        self.encoder = TemporalEncoder(in_out_channels, latent_embed_dim, *rest)
        self.decoder = TemporalDecoder(in_out_channels, latent_embed_dim, *rest)
        self.quant_conv = _conv(2 * latent_embed_dim, 2 * embed_dim, 1)
        self.post_quant_conv = _conv(embed_dim, latent_embed_dim, 1)

    def encode(self, x: Tensor) -> Tensor:
        """Moments of a piece; zero frames in front fill it up to a multiple of the factor."""
        return self.quant_conv(self.encoder(pad_front(x, -x.shape[2] % self.factor, "zeros")))

    def decode(self, z: Tensor) -> Tensor:
        """All frames of a piece, as many as the factor for each latent."""
        return self.decoder(self.post_quant_conv(z))


class SpatialVAE(nn.Module):
    """Holds diffusers' image autoencoder under the official name, and runs it on a few frames at a time."""

    def __init__(self, module: nn.Module, frames_at_once: int | None) -> None:
        super().__init__()
        self.module: Any = module
        self.frames_at_once = frames_at_once

    def _pieces(self, images: Tensor) -> Sequence[Tensor]:
        return images.split(self.frames_at_once or len(images))

    def encode(self, video: Tensor) -> Tensor:
        """Moments of every frame."""
        return each_frame(
            lambda images: torch.cat(
                [self.module.encode(piece).latent_dist.parameters for piece in self._pieces(images)]
            ),
            video,
        )

    def decode(self, z: Tensor) -> Tensor:
        """Video of spatial latents."""
        return each_frame(
            lambda images: torch.cat([self.module.decode(piece).sample for piece in self._pieces(images)]), z
        )


class OpenSoraVAE(nn.Module):
    """Open-Sora 1.2's autoencoder: 17 frames in 5 latents, an eighth of height and width.

    Parameters
    ----------
    scale, shift
        The transformer's latents are those of the temporal autoencoder minus `shift`, over `scale`.
    micro_frame_size
        Frames of a piece; None takes the whole video as one.
    vae_2d
        `micro_batch_size`: frames of which the spatial part runs at a time. The rest tells where training began.
    vae_temporal
        Its `type`, and what of its sizes differs from the released model.
    spatial
        What differs from the released configuration of the spatial `AutoencoderKL`.
    cal_loss, freeze_vae_2d, from_pretrained, model_type, architectures
        Part of the official configuration, without effect on the numbers.

    Raises
    ------
    ValueError
        For a setting that this host does not have.
    """

    def __init__(
        self,
        scale: Sequence[float] = (3.85, 2.32, 2.33, 3.06),
        shift: Sequence[float] = (-0.10, 0.34, 0.27, 0.98),
        micro_frame_size: int | None = 17,
        vae_2d: Mapping[str, Any] | None = None,
        vae_temporal: Mapping[str, Any] | None = None,
        spatial: Mapping[str, Any] | None = None,
        cal_loss: bool = False,
        freeze_vae_2d: bool = False,
        from_pretrained: str | None = None,
        model_type: str = "VideoAutoencoderPipeline",
        architectures: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        images = {"type": "VideoAutoencoderKL", "micro_batch_size": 4, **(vae_2d or {})}
        temporal = {"type": "VAE_Temporal_SD", **(vae_temporal or {})}
        kind, activation = temporal.pop("type"), temporal.pop("activation_fn", "swish")
        temporal.pop("from_pretrained", None)
        check_fixed(
            cal_loss=(cal_loss, False),
            vae_2d_type=(images["type"], "VideoAutoencoderKL"),
            vae_temporal_type=(kind, kind if kind in ("VAE_Temporal", "VAE_Temporal_SD") else "VAE_Temporal_SD"),
            activation_fn=(activation, "swish"),
        )
        if unknown := set(temporal) - set(_TEMPORAL):
            raise ValueError(f"vae_temporal: got {', '.join(sorted(unknown))}, must be among {', '.join(_TEMPORAL)}")
        for name, value in (
            ("num_res_blocks", temporal.get("num_res_blocks", 4)),
            ("levels", len(temporal.get("channel_multipliers", (1,)))),
        ):
            if not 1 <= value <= MOST_BLOCKS:
                raise ValueError(f"vae_temporal: {name} is {value}, must be 1 to {MOST_BLOCKS}")
        plain = {key: value for key, value in (spatial or {}).items() if not key.startswith("_")}
        images_vae: Any = AutoencoderKL(**{**_SPATIAL, **plain})
        self.spatial_vae = SpatialVAE(images_vae, images["micro_batch_size"])
        self.temporal_vae = TemporalVAE(**{**_TEMPORAL, **temporal})
        self.micro_frame_size = micro_frame_size
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32).view(1, -1, 1, 1, 1))
        self.register_buffer("shift", torch.tensor(shift, dtype=torch.float32).view(1, -1, 1, 1, 1))

    @property
    def latent_channels(self) -> int:
        """Channels of the transformer's latents."""
        return self.scale.shape[1]

    def frames_of(self, latent_frames: int) -> int:
        """The frames of a video that has so many latents, each piece but the last full."""
        if self.micro_frame_size is None:
            return latent_frames * self.temporal_vae.factor
        full, rest = divmod(latent_frames, self.latents_of(self.micro_frame_size))
        return full * self.micro_frame_size + rest * self.temporal_vae.factor

    def latents_of(self, frames: int) -> int:
        """The latents of a piece of so many frames."""
        return -(-frames // self.temporal_vae.factor)

    def decode(self, latents: Tensor, num_frames: int | None = None) -> Tensor:
        """Video [B, 3, F, 8 H, 8 W], about [-1, 1], of the transformer's latents [B, 4, T, H, W].

        Parameters
        ----------
        num_frames : int, optional
            Of the video. It only tells how many frames each piece drops in front; by default none is short.
        """
        return self.spatial_vae.decode(self.decode_temporal(latents, num_frames) / SPATIAL_SCALE)

    def dropped(self, latent_frames: int, num_frames: int) -> list[int]:
        """How many frames each piece drops in front: those that fill what it stands for up to whole latents."""
        if self.micro_frame_size is None:
            return [-num_frames % self.temporal_vae.factor]
        count = -(-latent_frames // self.latents_of(self.micro_frame_size))
        left = (min(self.micro_frame_size, num_frames - i * self.micro_frame_size) for i in range(count))
        return [-frames % self.temporal_vae.factor for frames in left]

    def decode_temporal(
        self,
        latents: Tensor,
        num_frames: int | None = None,
        *,
        run: Callable[[Tensor], Tensor] | None = None,
        each: Callable[..., Iterable[Tensor]] = map,
        seamless: bool = False,
    ) -> Tensor:
        """Spatial latents [B, 4, F, H, W] of the transformer's.

        Parameters
        ----------
        run : callable, optional
            Decodes a piece in the place of the temporal autoencoder's own `decode`.
        each : callable
            Decodes a list of pieces as ``map(run, pieces)`` does.
        seamless : bool
            Not what the original does: each piece is decoded a second time behind the one before it, and its frames
            fade from that to what it is alone. It costs twice the time.
        """
        check_video("latents", latents, self.latent_channels)
        run = self.temporal_vae.decode if run is None else run
        z = latents * self.scale + self.shift
        frames = self.frames_of(z.shape[2]) if num_frames is None else num_frames
        pieces = z.split(self.latents_of(self.micro_frame_size) if self.micro_frame_size else z.shape[2], dim=2)
        pairs = [torch.cat(pair, dim=2) for pair in pairwise(pieces)] if seamless else []
        decoded, doubled = [], iter(each(run, pairs))
        for i, (alone, drop) in enumerate(zip(each(run, pieces), self.dropped(z.shape[2], frames), strict=True)):
            if seamless and i > 0:
                behind = next(doubled)[:, :, -alone.shape[2] :]
                share = torch.linspace(0, 1, alone.shape[2], device=z.device, dtype=z.dtype).view(-1, 1, 1)
                alone = behind.lerp(alone, share)
            decoded.append(alone[:, :, drop:])
        return torch.cat(decoded, dim=2)

    def encode(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The transformer's latents [B, 4, T, H / 8, W / 8] of a video [B, 3, F, H, W] in [-1, 1].

        Parameters
        ----------
        generator : torch.Generator, optional
            Draws a sample of the spatial and of the temporal posteriors, as the original does; None gives the means.
        """
        check_video("video", video, 3)
        x = posterior(self.spatial_vae.encode(video), generator) * SPATIAL_SCALE
        pieces = x.split(self.micro_frame_size or x.shape[2], dim=2)
        z = torch.cat([posterior(self.temporal_vae.encode(piece), generator) for piece in pieces], dim=2)
        return (z - self.shift) / self.scale
