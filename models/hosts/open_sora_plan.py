"""Open-Sora-Plan's transformers, versions 1.1 and 1.2, with the parameter names of their checkpoints.

Both are made of diffusers' adaLN-single block. Version 1.1 is Latte with a text mask; version 1.2 attends
over all tokens of the video at once and has 3D RoPE.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import (
    PatchEmbed,
    PixArtAlphaTextProjection,
    get_1d_sincos_pos_embed_from_grid,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormSingle
from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel
from torch import nn

from pab_kernels.models.hosts.layers import PlanAttnProcessor, check_fixed, modulate, text_bias, unpatchify
from pab_kernels.ops.checks import check_shape, check_tensor


def check_inputs(
    config: Any, frames: int | str, latent: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor
) -> None:
    """Raise TypeError for what is no tensor, ValueError unless the inputs fit the model and each other."""
    for name, value in (("hidden_states", latent), ("timestep", timestep), ("encoder_hidden_states", text)):
        check_tensor(name, value)
    batch, patch = latent.shape[0], config.patch_size
    check_shape("hidden_states", latent, (batch, config.in_channels, frames, "H", "W"))
    check_shape("timestep", timestep, (batch,))
    check_shape("encoder_hidden_states", text, (batch, 1, "L", config.caption_channels))
    height, width = latent.shape[-2:]
    if height % patch or width % patch:
        raise ValueError(
            f"hidden_states is {height}x{width}: height and width must be multiples of the patch size {patch}"
        )


class OpenSoraPlanV110(LatteTransformer3DModel):
    """Open-Sora-Plan 1.1: Latte, with a text mask and position embeddings scaled to the video's size.

    The original's self-attention mask is left out: its pipeline only ever passes ones, which hide nothing.

    Parameters
    ----------
    num_attention_heads, attention_head_dim, num_layers
        Size of the model: ``num_layers`` spatial and as many temporal blocks.
    in_channels, out_channels, patch_size, caption_channels, attention_bias, norm_eps
        As in Latte.
    sample_size
        Height and width of the latent at which the spatial position embedding is not interpolated.
    video_length
        Latent frames, the only number the model takes; at least 2.
    interpolation_scale_1d
        Divides the temporal positions; by default the length in units of 16 frames, rounded down.
    num_embeds_ada_norm, model_max_length, attention_mode
        Part of the official config, without effect on the numbers.
    cross_attention_dim, activation_fn, norm_type, norm_elementwise_affine, use_rope, compress_kv_factor
        Part of the official config, accepted only as they are in the released models.

    Raises
    ------
    ValueError
        For a setting that no released model has.
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int = 8,
        num_layers: int = 28,
        cross_attention_dim: int = 1152,
        attention_bias: bool = True,
        sample_size: tuple[int, int] = (64, 64),
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        norm_type: str = "ada_norm_single",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        caption_channels: int = 4096,
        video_length: int = 17,
        use_rope: bool = False,
        compress_kv_factor: int = 1,
        model_max_length: int = 300,
        interpolation_scale_1d: float | None = None,
        attention_mode: str = "xformers",
    ):
        inner_dim = num_attention_heads * attention_head_dim
        check_fixed(
            cross_attention_dim=(cross_attention_dim, inner_dim),
            activation_fn=(activation_fn, "gelu-approximate"),
            norm_type=(norm_type, "ada_norm_single"),
            norm_elementwise_affine=(norm_elementwise_affine, False),
            use_rope=(use_rope, False),
            compress_kv_factor=(compress_kv_factor, 1),
        )
        if video_length < 2:  # Latte adds no temporal position to a single frame; the original would
            raise ValueError(f"video_length is {video_length}, but this host needs at least 2 latent frames")
        height, width = sample_size
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            cross_attention_dim=cross_attention_dim,
            attention_bias=attention_bias,
            sample_size=height,
            patch_size=patch_size,
            activation_fn=activation_fn,
            num_embeds_ada_norm=num_embeds_ada_norm,
            norm_type=norm_type,
            norm_elementwise_affine=norm_elementwise_affine,
            norm_eps=norm_eps,
            caption_channels=caption_channels,
            video_length=video_length,
        )
        self.video_length = video_length
        self.register_to_config(sample_size=(height, width))  # Latte's constructor has put in the height alone
        self.pos_embed = PatchEmbed(
            height, width, patch_size, in_channels, inner_dim, interpolation_scale=max(height // 64, 1)
        )
        # An odd length counts its first frame, which the video autoencoder codes alone, as extra.
        scale = interpolation_scale_1d or (video_length - video_length % 2) // 16
        positions = torch.arange(video_length) / max(scale, 1)
        table = get_1d_sincos_pos_embed_from_grid(inner_dim, positions, output_type="pt")
        self.register_buffer("temp_pos_embed", table.float()[None], persistent=False)
        # Trained with, and in every checkpoint, but not used to generate.
        self.caption_projection.register_buffer("y_embedding", torch.zeros(120, caption_channels))

    def forward(  # type: ignore[override]  # the text is not optional here
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        enable_temporal_attentions: bool = True,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the noise of a latent.

        Parameters
        ----------
        hidden_states : [B, in_channels, video_length, H, W]
            H and W are multiples of the patch size. An image has one frame.
        timestep : [B]
        encoder_hidden_states : [B, 1, L, caption_channels]
            Text embedding.
        encoder_attention_mask : [B, 1, L] or [B, L], optional
            One for real tokens, zero for padding.
        enable_temporal_attentions : bool
            False leaves the temporal blocks out, and then any number of frames fits: images.

        Returns
        -------
        ``.sample`` (or a tuple of one): [B, out_channels, video_length, H, W].

        Raises
        ------
        ValueError
            Where a shape does not fit.
        """
        frames = self.video_length if enable_temporal_attentions else "T"
        check_inputs(self.config, frames, hidden_states, timestep, encoder_hidden_states)
        text = encoder_hidden_states.to(self.dtype)
        bias = text_bias(encoder_attention_mask, text)
        if bias is not None:  # Latte folds the frames into the batch, and expects one row for each
            bias = bias[:, None].repeat_interleave(hidden_states.shape[2], dim=0)
        return super().forward(
            hidden_states.to(self.dtype),
            timestep,  # type: ignore[arg-type]  # need not be whole
            encoder_hidden_states=text.squeeze(1),
            encoder_attention_mask=bias,
            enable_temporal_attentions=enable_temporal_attentions,
            return_dict=return_dict,
        )


class OpenSoraPlanV120(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' own pair
    """Open-Sora-Plan 1.2: one stack of blocks whose self-attention covers time and space together.

    Parameters
    ----------
    num_attention_heads, attention_head_dim, num_layers
        Size of the model; ``attention_head_dim`` is a multiple of 6.
    in_channels, out_channels, patch_size, caption_channels, attention_bias, norm_eps
        As in Latte.
    sample_size, sample_size_t
        Latent height and width, and latent frames, from which the interpolation scales follow by default.
        Other sizes work too.
    interpolation_scale_h, interpolation_scale_w, interpolation_scale_t
        Divide the positions of 3D RoPE.
    num_embeds_ada_norm, attention_mode
        Part of the official config, without effect on the numbers.
    cross_attention_dim, patch_size_t, activation_fn, norm_type, norm_elementwise_affine, use_rope
        Part of the official config, accepted only as they are in the released models.

    Raises
    ------
    ValueError
        For a setting that no released model has.
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 24,
        attention_head_dim: int = 96,
        in_channels: int = 4,
        out_channels: int = 4,
        num_layers: int = 32,
        cross_attention_dim: int = 2304,
        attention_bias: bool = True,
        sample_size: tuple[int, int] = (60, 80),
        sample_size_t: int = 24,
        patch_size: int = 2,
        patch_size_t: int = 1,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        norm_type: str = "ada_norm_single",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        caption_channels: int = 4096,
        attention_mode: str = "xformers",
        use_rope: bool = True,
        interpolation_scale_h: float | None = None,
        interpolation_scale_w: float | None = None,
        interpolation_scale_t: float | None = None,
    ):
        super().__init__()
        inner_dim = num_attention_heads * attention_head_dim
        check_fixed(
            cross_attention_dim=(cross_attention_dim, inner_dim),
            patch_size_t=(patch_size_t, 1),
            activation_fn=(activation_fn, "gelu-approximate"),
            norm_type=(norm_type, "ada_norm_single"),
            norm_elementwise_affine=(norm_elementwise_affine, False),
            use_rope=(use_rope, True),
        )
        if attention_head_dim % 6:
            raise ValueError(f"attention_head_dim is {attention_head_dim}, but 3D RoPE needs a multiple of 6")
        t, (h, w) = sample_size_t, sample_size
        self.patch_size = patch_size
        self.attention_head_dim = attention_head_dim
        self.interpolation_scale = (
            interpolation_scale_t or ((t - 1) // 16 + 1 if t % 2 else t / 16),
            interpolation_scale_h or h / 30,
            interpolation_scale_w or w / 40,
        )
        self.pos_embed = PatchEmbed(h, w, patch_size, in_channels, inner_dim, pos_embed_type=None)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner_dim,
                num_attention_heads,
                attention_head_dim,
                cross_attention_dim=cross_attention_dim,
                activation_fn=activation_fn,
                attention_bias=attention_bias,
                norm_type=norm_type,
                norm_elementwise_affine=norm_elementwise_affine,
                norm_eps=norm_eps,
            )
            for _ in range(num_layers)
        )
        for module in self.modules():
            if isinstance(module, Attention):
                module.set_processor(PlanAttnProcessor())  # type: ignore[arg-type]
        self.norm_out = nn.LayerNorm(inner_dim, elementwise_affine=False, eps=1e-6)
        self.scale_shift_table = nn.Parameter(torch.randn(2, inner_dim) / inner_dim**0.5)
        self.proj_out = nn.Linear(inner_dim, patch_size * patch_size * out_channels)
        self.adaln_single = AdaLayerNormSingle(inner_dim)
        self.caption_projection = PixArtAlphaTextProjection(caption_channels, inner_dim)

    def rope_angles(self, grid: tuple[int, int, int], device: torch.device | str) -> torch.Tensor:
        """Angles [T * H * W, 3, head_dim / 6] of a grid of patches, in radians: time, row, column."""
        axis_dim = self.attention_head_dim // 3
        freqs = 10000 ** -(torch.arange(0, axis_dim, 2, device=device) / axis_dim)
        axes = (torch.arange(n, device=device) / scale for n, scale in zip(grid, self.interpolation_scale, strict=True))
        return torch.cartesian_prod(*axes)[..., None] * freqs

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the noise of a latent of any number of frames; otherwise as `OpenSoraPlanV110.forward`."""
        check_inputs(self.config, "T", hidden_states, timestep, encoder_hidden_states)
        batch, _, t, h, w = hidden_states.shape
        patch = self.patch_size
        grid = (t, h // patch, w // patch)
        text = encoder_hidden_states.to(self.dtype)
        bias = text_bias(encoder_attention_mask, text)
        text = self.caption_projection(text.squeeze(1))
        modulation, embedded_timestep = self.adaln_single(timestep, batch_size=batch, hidden_dtype=self.dtype)

        x = self.pos_embed(hidden_states.to(self.dtype).transpose(1, 2).flatten(0, 1))
        x = x.reshape(batch, -1, x.shape[-1])
        rope = {"rope": self.rope_angles(grid, x.device)}
        for block in self.transformer_blocks:
            x = block(
                x,
                encoder_hidden_states=text,
                encoder_attention_mask=bias,
                timestep=modulation,
                cross_attention_kwargs=rope,
            )
        shift, scale = (self.scale_shift_table + embedded_timestep[:, None]).chunk(2, dim=1)
        x = self.proj_out(modulate(self.norm_out(x), shift, scale))
        out = unpatchify(x, grid, (1, patch, patch))
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)
