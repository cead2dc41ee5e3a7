"""Stand-ins for official classes: their attributes and arguments, and no maths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection, get_2d_sincos_pos_embed
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor, nn

HEADS, HEAD_DIM, LAYERS, TEXT, FRAMES, SIZE = 2, 12, 2, 10, 5, (8, 12)
DIM = HEADS * HEAD_DIM


class Official(nn.Module):
    """Only its parts are read: a forward that runs is not the runtime's."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the official forward must not run")


# Open-Sora


class LlamaRMSNorm(Official):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = 1e-6


class OpenSoraAttention(Official):
    def __init__(self, rotary_emb: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.num_heads, self.qk_norm_legacy = HEADS, False
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.q_norm, self.k_norm = LlamaRMSNorm(HEAD_DIM), LlamaRMSNorm(HEAD_DIM)
        self.rope = rotary_emb is not None
        self.rotary_emb = rotary_emb


class OpenSoraMultiHeadCrossAttention(Official):
    def __init__(self) -> None:
        super().__init__()
        self.q_linear, self.kv_linear, self.proj = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)


class Mlp(nn.Module):
    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(inputs, hidden), nn.GELU("tanh"), nn.Linear(hidden, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class STDiT3Block(Official):
    def __init__(self, rotary_emb: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM, eps=1e-6, elementwise_affine=False)
        self.attn, self.cross_attn = OpenSoraAttention(rotary_emb), OpenSoraMultiHeadCrossAttention()
        self.mlp = Mlp(DIM, 4 * DIM)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, DIM))


class Rotary(Official):
    def __init__(self) -> None:
        super().__init__()
        self.freqs = nn.Parameter(torch.zeros(HEAD_DIM // 2), requires_grad=False)


class PatchEmbed3D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv3d(4, DIM, kernel_size=(1, 2, 2), stride=(1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).mT


class Part(Official):
    """Holds what it is given."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, value in parts.items():
            setattr(self, name, value)


def embedder() -> Part:
    return Part(mlp=nn.Sequential(nn.Linear(256, DIM), nn.SiLU(), nn.Linear(DIM, DIM)))


class OfficialSTDiT3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = Part(skip_y_embedder=False)
        self.input_sq_size = 512
        self.pos_embed = Part()
        self.pos_embed.register_buffer("inv_freq", torch.zeros(DIM // 4), persistent=False)
        self.rope = Rotary()
        self.x_embedder, self.t_embedder, self.fps_embedder = PatchEmbed3D(), embedder(), embedder()
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(DIM, 6 * DIM))
        self.y_embedder = Part(y_proj=Mlp(TEXT, DIM))
        self.y_embedder.register_buffer("y_embedding", torch.zeros(7, TEXT))
        self.spatial_blocks = nn.ModuleList(STDiT3Block(None) for _ in range(LAYERS))
        self.temporal_blocks = nn.ModuleList(STDiT3Block(torch.abs) for _ in range(LAYERS))
        self.final_layer = Part(
            norm_final=nn.LayerNorm(DIM, eps=1e-6, elementwise_affine=False),
            linear=nn.Linear(DIM, 4 * 8),
            scale_shift_table=nn.Parameter(torch.zeros(2, DIM)),
        )
        self.parallel_manager: Any = None

    def forward(
        self, x, timestep, y, all_timesteps=None, mask=None, x_mask=None, fps=None, height=None, width=None, **kwargs
    ):
        raise AssertionError


# Latte and Open-Sora-Plan


class AttnProcessor2_0:
    def __init__(self, use_rope: bool = False, rope: Any = None) -> None:
        self.use_rope, self.compress_kv_factor = use_rope, None
        if rope is not None:
            self.rope = rope


class Attention(Official):
    def __init__(self, processor: AttnProcessor2_0) -> None:
        super().__init__()
        self.heads, self.residual_connection, self.rescale_output_factor = HEADS, False, 1.0
        self.group_norm = self.spatial_norm = self.norm_cross = self.downsampler = None
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(DIM, DIM), nn.Dropout(0.0)])
        self.processor = processor


class BlockOfOfficial(Official):
    def __init__(self, processor: AttnProcessor2_0, cross: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM, eps=1e-6, elementwise_affine=False)
        self.attn1 = Attention(processor)
        self.attn2 = Attention(AttnProcessor2_0()) if cross else None
        setattr(self, "norm2" if cross else "norm3", nn.LayerNorm(DIM, eps=1e-6, elementwise_affine=False))
        self.ff = FeedForward(DIM, activation_fn="gelu-approximate")
        self.scale_shift_table = nn.Parameter(torch.zeros(6, DIM))


class PatchEmbed(Official):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm, self.patch_size = nn.Conv2d(4, DIM, 2, stride=2), None, 2
        self.height = self.width = self.base_size = 4
        self.interpolation_scale = 1
        table = get_2d_sincos_pos_embed(DIM, 4, base_size=4, interpolation_scale=1, output_type="pt")
        self.register_buffer("pos_embed", table.float()[None], persistent=False)


class PatchEmbed2D(Official):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm, self.use_abs_pos = nn.Conv2d(4, DIM, 2, stride=2), None, False


class RoPE3D(Official):
    """Each axis has its scale; the second half of a table repeats the first."""

    def __init__(self, scales: tuple[float, float, float]) -> None:
        super().__init__()
        self.interpolation_scale_t, self.interpolation_scale_h, self.interpolation_scale_w = scales
        self.asked = 0

    def get_cos_sin(self, D, seq_len, device, dtype, interpolation_scale=1):
        self.asked += 1
        frequencies = 10000.0 ** -(torch.arange(0, D, 2) / D)
        angles = torch.outer(torch.arange(seq_len) / interpolation_scale, frequencies).repeat(1, 2).to(dtype)
        return angles.cos(), angles.sin()


class AdaLNSingleOfficial(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' own pair
    def finish(self, out_channels: int) -> None:
        self.norm_out = nn.LayerNorm(DIM, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, DIM))
        self.proj_out = nn.Linear(DIM, 4 * out_channels)
        self.adaln_single = AdaLayerNormSingle(DIM)
        self.caption_projection = PixArtAlphaTextProjection(TEXT, DIM)
        self.parallel_manager: Any = None


class LatteT2V(AdaLNSingleOfficial):
    @register_to_config
    def __init__(
        self, num_layers=LAYERS, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, patch_size=2,
        caption_channels=TEXT, video_length=FRAMES, norm_type="ada_norm_single", activation_fn="gelu-approximate",
        attention_bias=True, norm_elementwise_affine=False, only_cross_attention=False, double_self_attention=False,
    ):  # fmt: skip
        super().__init__()
        self.video_length = video_length
        self.pos_embed = PatchEmbed()
        self.register_buffer("temp_pos_embed", torch.zeros(1, FRAMES, DIM), persistent=False)
        self.transformer_blocks = nn.ModuleList(BlockOfOfficial(AttnProcessor2_0(), True) for _ in range(LAYERS))
        self.temporal_transformer_blocks = nn.ModuleList(
            BlockOfOfficial(AttnProcessor2_0(), False) for _ in range(LAYERS)
        )
        self.finish(8)
        self.caption_projection.register_buffer("y_embedding", torch.zeros(120, TEXT))

    def forward(
        self, hidden_states, timestep=None, all_timesteps=None, encoder_hidden_states=None, added_cond_kwargs=None,
        class_labels=None, cross_attention_kwargs=None, attention_mask=None, encoder_attention_mask=None,
        use_image_num=0, enable_temporal_attentions=True, return_dict=True,
    ):  # fmt: skip
        raise AssertionError


class OpenSoraT2V(AdaLNSingleOfficial):
    @register_to_config
    def __init__(
        self, num_layers=LAYERS, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, patch_size=2,
        patch_size_t=1, caption_channels=TEXT, norm_type="ada_norm_single", activation_fn="gelu-approximate",
        attention_bias=True, norm_elementwise_affine=False, only_cross_attention=False, double_self_attention=False,
    ):  # fmt: skip
        super().__init__()
        self.pos_embed = PatchEmbed2D()
        self.transformer_blocks = nn.ModuleList(
            BlockOfOfficial(AttnProcessor2_0(True, RoPE3D((1.0, 8 / 30, 12 / 40))), True) for _ in range(LAYERS)
        )
        self.finish(4)

    def forward(
        self, hidden_states, timestep=None, encoder_hidden_states=None, added_cond_kwargs=None, class_labels=None,
        cross_attention_kwargs=None, attention_mask=None, encoder_attention_mask=None, use_image_num=0,
        return_dict=True, **kwargs,
    ):  # fmt: skip
        raise AssertionError
