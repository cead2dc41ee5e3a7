"""Latte: diffusers' LatteTransformer3DModel (arXiv:2401.03048)."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import LatteTransformer3DModel
from diffusers.models.activations import GELU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from einops import rearrange
from torch import Tensor

from pab_kernels.branches import CrossAttention, Mlp, SelfAttention
from pab_kernels.executor import Block, BlockStack
from pab_kernels.models.adapter import Call, Modulation, WeightFuser, linear_of, plain


class LatteAdapter:
    """Adapter of diffusers' LatteTransformer3DModel.

    Parameters
    ----------
    host : LatteTransformer3DModel
        Left as it is, but that Q, K and V (K and V of cross-attention) become views of one fused weight each.

    Raises
    ------
    TypeError
        A module is not the plain class it must be (LoRA, quantisation, hooks, an unknown attention processor).
    ValueError
        An option of the model that the executor does not cover.
    """

    def __init__(self, host: LatteTransformer3DModel) -> None:
        self.host: Any = host
        self._signature = inspect.signature(type(host).forward)
        self._fuser = WeightFuser()
        config = host.config
        for key, allowed in (
            ("norm_type", "ada_norm_single"),
            ("activation_fn", "gelu-approximate"),
            ("attention_bias", True),
            ("norm_elementwise_affine", False),
        ):
            if config[key] != allowed:
                raise ValueError(f"host.config.{key}: got {config[key]!r}, must be {allowed!r}")
        for name in ("pos_embed", "adaln_single", "caption_projection", "norm_out", "proj_out"):
            plain(host, name)
        blocks = []
        try:
            for index in range(config.num_layers):
                blocks.append(self._block("spatial", index, f"transformer_blocks.{index}"))
                blocks.append(self._block("temporal", index, f"temporal_transformer_blocks.{index}"))
        except (TypeError, ValueError):
            self.restore()
            raise
        self.stack = BlockStack(tuple(blocks), embed_before=1)

    def _block(self, kind: Any, index: int, path: str) -> Block:
        block = plain(self.host, path, BasicTransformerBlock)
        heads = self._attention(f"{path}.attn1").heads
        plain(self.host, f"{path}.ff", FeedForward)
        plain(self.host, f"{path}.ff.net.0", GELU)
        cross = None
        if kind == "spatial":
            cross = CrossAttention(
                q=linear_of(self.host, f"{path}.attn2.to_q"),
                kv=self._fuser.fuse(self.host, [f"{path}.attn2.to_k", f"{path}.attn2.to_v"]),
                proj=linear_of(self.host, f"{path}.attn2.to_out.0"),
                heads=self._attention(f"{path}.attn2").heads,
            )
        return Block(
            kind=kind,
            index=index,
            table=block.scale_shift_table.detach(),
            attention=SelfAttention(
                qkv=self._fuser.fuse(self.host, [f"{path}.attn1.to_{name}" for name in "qkv"]),
                proj=linear_of(self.host, f"{path}.attn1.to_out.0"),
                heads=heads,
                sequence=kind,
            ),
            cross=cross,
            mlp=Mlp(linear_of(self.host, f"{path}.ff.net.0.proj"), linear_of(self.host, f"{path}.ff.net.2")),
            norm_eps=block.norm1.eps,
        )

    def _attention(self, path: str) -> Attention:
        attention = plain(self.host, path, Attention)
        if type(attention.processor) not in (AttnProcessor, AttnProcessor2_0):
            raise TypeError(
                f"{path}.processor: is a {type(attention.processor).__name__}, "
                "must be AttnProcessor2_0 or AttnProcessor"
            )
        for name in ("norm_q", "norm_k", "group_norm", "spatial_norm", "norm_cross"):
            if getattr(attention, name, None) is not None:
                raise TypeError(f"{path}.{name}: is set, must be None")
        return attention

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """Read the arguments of LatteTransformer3DModel.forward."""
        arguments = self._signature.bind(self.host, *args, **kwargs)
        arguments.apply_defaults()
        given = arguments.arguments
        latents, timestep, text = given["hidden_states"], given["timestep"], given["encoder_hidden_states"]
        config = self.host.config
        if latents.ndim != 5 or latents.shape[1] != config.in_channels:
            raise ValueError(
                f"hidden_states: shape is {list(latents.shape)}, must be [B, {config.in_channels}, T, H, W]"
            )
        batch, _, frames, height, width = latents.shape
        patch = config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"hidden_states: {height}x{width} is not a multiple of the patch size {patch}")
        if frames not in (1, config.video_length):
            raise ValueError(f"hidden_states: got {frames} frames, must be {config.video_length} (or 1)")
        if timestep is None or text is None:
            raise ValueError("timestep, encoder_hidden_states: got None, must both be given")
        if given["encoder_attention_mask"] is not None:
            raise ValueError("encoder_attention_mask: got a mask, must be None: Latte attends to all text tokens")
        if not given["enable_temporal_attentions"]:
            raise ValueError("enable_temporal_attentions: got False, must be True")
        return Call(
            latents=latents,
            timestep=timestep,
            text=text,
            shape=(
                batch,
                frames,
                height // patch * (width // patch),
                config.num_attention_heads * config.attention_head_dim,
            ),
            embed=self.host.temp_pos_embed[0].to(latents.dtype) if frames > 1 else None,
            extra={"return_dict": given["return_dict"]},
        )

    def embed(self, call: Call) -> Tensor:
        """Patches and their 2D positions; the temporal positions follow before the first temporal block."""
        frames = rearrange(call.latents, "b c t h w -> (b t) c h w")
        return self.host.pos_embed(frames).view(call.shape).contiguous()

    def modulate(self, call: Call) -> Modulation:
        """The timestep's share of every block's modulation and of the final one."""
        timestep, embedded = self.host.adaln_single(
            call.timestep.expand(call.shape[0]), batch_size=call.shape[0], hidden_dtype=self.host.dtype
        )
        final = self.host.scale_shift_table + embedded[:, None]  # [B, 2, C]: shift, scale
        return Modulation(timestep.view(call.shape[0], 6, -1), final[:, 0], final[:, 1])

    def project_text(self, call: Call) -> tuple[Tensor, None]:
        """The caption projection; all tokens count."""
        return self.host.caption_projection(call.text), None

    def output(self, h: Tensor, call: Call) -> Any:
        """The final projection, and the patches put back together: [B, C_out, T, H, W]."""
        patch = self.host.config.patch_size
        sample = rearrange(
            self.host.proj_out(h),
            "b t (h w) (p q c) -> b c t (h p) (w q)",
            h=call.latents.shape[-2] // patch,
            p=patch,
            q=patch,
        )
        return Transformer2DModelOutput(sample=sample) if call.extra["return_dict"] else (sample,)

    def check_weights(self) -> None:
        """Raise ValueError if the host's parameters were moved or replaced."""
        self._fuser.check()

    def restore(self) -> None:
        """Give the host its separate parameters back."""
        self._fuser.restore()
