"""STDiT3, the transformer of Open-Sora 1.2, with the parameter names of its official checkpoints."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from pab_kernels.models.hosts.layers import (
    CaptionEmbedder,
    Mlp,
    PatchEmbedding,
    PositionEmbedding,
    RotaryEmbedding,
    ScalarEmbedder,
    attention,
    modulate,
    position_table,
    repeat_rows,
    unpatchify,
)
from pab_kernels.ops.checks import check_shape


class SelfAttention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        head_dim = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor, rope: RotaryEmbedding | None = None) -> torch.Tensor:
        """Attend along the second to last dimension of x [B, ..., N, C]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        return self.proj(attention(q, k, v))


class CrossAttention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x [B, N, C] attends to text [B, L, C]; mask [B, L] bool is True for real tokens."""
        q = self.q_linear(x).unflatten(-1, (self.num_heads, -1))
        k, v = self.kv_linear(text).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        return self.proj(attention(q, k, v, mask))


class STDiT3Block(nn.Module):
    """Three residual branches: self-attention along space or time, cross-attention to the text, MLP.

    Tokens stay [B, T, S, C]. A modulation vector is [B, 1, 1, C], or [B, T, 1, C] where frames differ.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: bool, temporal: bool):
        super().__init__()
        self.temporal = temporal
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(hidden_size, num_heads, qk_norm)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), hidden_size)
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)

    def modulation(self, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Shift, scale, gate of self-attention, then of the MLP, from t [B, 1 or T, 6 * C]."""
        return (self.scale_shift_table + t.unflatten(-1, (6, -1)))[:, :, None].unbind(-2)

    def self_attention(
        self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, rope: RotaryEmbedding
    ) -> torch.Tensor:
        x = modulate(self.norm1(x), shift, scale)
        if self.temporal:
            return self.attn(x.transpose(1, 2), rope).transpose(1, 2)
        return self.attn(x)

    def cross_attention(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self.cross_attn(x.flatten(1, 2), text, mask).view_as(x)

    def feed_forward(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.mlp(modulate(self.norm2(x), shift, scale))

    def forward(
        self,
        x: torch.Tensor,
        text: torch.Tensor,
        t: torch.Tensor,
        mask: torch.Tensor | None,
        rope: RotaryEmbedding,
    ) -> torch.Tensor:
        """x [B, T, S, C], text [B, L, C], t [B, 1 or T, 6 * C], mask [B, L] bool or None -> [B, T, S, C]."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.modulation(t)
        x = x + gate_msa * self.self_attention(x, shift_msa, scale_msa, rope)
        x = x + self.cross_attention(x, text, mask)
        return x + gate_mlp * self.feed_forward(x, shift_mlp, scale_mlp)


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, out_features: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, out_features)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)

    def modulated(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        shift, scale = (self.scale_shift_table + t[:, None])[:, :, None, None].unbind(1)
        return modulate(self.norm_final(x), shift, scale)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, t0: torch.Tensor | None, x_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """x [B, T, S, C], t and t0 [B, C], x_mask [B, T] bool or None -> [B, T, S, out_features]."""
        x = self.modulated(x, t)
        if x_mask is not None and t0 is not None:
            # The released weights were trained with conditioning frames normalised twice; so it stays.
            x = torch.where(x_mask[:, :, None, None], x, self.modulated(x, t0))
        return self.linear(x)


class STDiT3(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' own pair
    """The diffusion transformer of Open-Sora 1.2: spatial and temporal blocks in turn.

    Parameters
    ----------
    depth
        Number of spatial blocks, and of temporal blocks.
    hidden_size, num_heads, mlp_ratio, qk_norm
        Width of the blocks; ``qk_norm`` puts an RMSNorm on the queries and keys of self-attention.
    patch_size
        Patch along time, height and width.
    in_channels, pred_sigma
        Latent channels; with ``pred_sigma`` the output has twice as many, of which samplers use the first half.
    caption_channels, model_max_length
        Channels of the text embedding and its number of tokens.
    input_sq_size
        Side of the square image, in pixels, for which the position embedding is not rescaled.
    """

    @register_to_config
    def __init__(
        self,
        depth: int = 28,
        hidden_size: int = 1152,
        num_heads: int = 16,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        in_channels: int = 4,
        mlp_ratio: float = 4.0,
        pred_sigma: bool = True,
        qk_norm: bool = True,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        input_sq_size: int = 512,
    ):
        super().__init__()
        if hidden_size % num_heads or hidden_size % 4 or hidden_size // num_heads % 2:
            raise ValueError(
                f"hidden_size {hidden_size} must be a multiple of 4 and of num_heads {num_heads}, "
                "with an even number of channels a head"
            )
        self.patch_size = pt, ph, pw = tuple(patch_size)
        self.in_channels = in_channels
        self.caption_channels = caption_channels
        self.input_sq_size = input_sq_size
        self.pos_embed = PositionEmbedding(hidden_size)
        self.rope = RotaryEmbedding(hidden_size // num_heads)
        self.x_embedder = PatchEmbedding((pt, ph, pw), in_channels, hidden_size)
        self.t_embedder = ScalarEmbedder(hidden_size)
        self.fps_embedder = ScalarEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedder(caption_channels, hidden_size, model_max_length)
        self.spatial_blocks, self.temporal_blocks = (
            nn.ModuleList(STDiT3Block(hidden_size, num_heads, mlp_ratio, qk_norm, temporal) for _ in range(depth))
            for temporal in (False, True)
        )
        self.final_layer = FinalLayer(hidden_size, pt * ph * pw * in_channels * (2 if pred_sigma else 1))

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        y: torch.Tensor,
        mask: torch.Tensor | None = None,
        x_mask: torch.Tensor | None = None,
        *,
        fps: torch.Tensor,
        height: torch.Tensor,
        width: torch.Tensor,
    ) -> torch.Tensor:
        """Predict the velocity of a noisy latent.

        Parameters
        ----------
        x : [B, C_in, T, H, W]
            Any height and width: the patches that stick out see zeros and are cropped from the output.
        timestep : [B]
            0 to 1000, not necessarily whole.
        y : [B, 1, L, caption_channels]
            Text embedding.
        mask : [rows, L], optional
            Non-zero for real tokens. Rows divide B and repeat: one prompt's row serves both halves of guidance.
        x_mask : [B, T] bool, optional
            False for given (conditioning) frames, which are modulated as at timestep 0.
        fps : [rows]
            Frames a second; rows divide B and repeat.
        height, width : [rows]
            Size in pixels; the first row counts for all.

        Returns
        -------
        [B, C_out, T, H, W], float32 (float64 where the weights are).

        Raises
        ------
        ValueError
            Where a shape does not fit.
        """
        check_shape("x", x, ("B", self.in_channels, "T", "H", "W"))
        batch, _, frames, rows, columns = x.shape
        pt, ph, pw = self.patch_size
        t, h, w = -(-frames // pt), -(-rows // ph), -(-columns // pw)
        check_shape("timestep", timestep, (batch,))
        check_shape("y", y, (batch, 1, "L", self.caption_channels))
        check_shape("fps", fps, ("rows",))
        dtype = self.x_embedder.proj.weight.dtype

        # Like the official model, in training too, this rounds the timestep to the dtype of the weights.
        timestep = timestep.to(dtype)
        fps_emb = self.fps_embedder(repeat_rows("fps", fps, batch))
        t_emb = self.t_embedder(timestep) + fps_emb
        t_mlp = self.t_block(t_emb)[:, None]
        t0_emb = None
        if x_mask is not None:
            check_shape("x_mask", x_mask, (batch, t))
            x_mask = x_mask.bool()
            t0_emb = self.t_embedder(torch.zeros_like(timestep)) + fps_emb
            t_mlp = torch.where(x_mask[..., None], t_mlp, self.t_block(t0_emb)[:, None])

        text = self.y_embedder(y.to(dtype)).squeeze(1)
        if mask is not None:
            check_shape("mask", mask, ("rows", y.shape[2]))
            mask = repeat_rows("mask", mask, batch).bool()

        tokens = self.x_embedder(x.to(dtype))
        scale = (height[0].item() * width[0].item()) ** 0.5 / self.input_sq_size
        tokens = tokens + position_table(self.pos_embed.inv_freq, h, w, scale, base_size=round((h * w) ** 0.5))
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            tokens = spatial(tokens, text, t_mlp, mask, self.rope)
            tokens = temporal(tokens, text, t_mlp, mask, self.rope)

        tokens = self.final_layer(tokens, t_emb, t0_emb, x_mask).flatten(1, 2)
        out = unpatchify(tokens, (t, h, w), (pt, ph, pw))[:, :, :frames, :rows, :columns]
        return out.to(torch.promote_types(dtype, torch.float32))
