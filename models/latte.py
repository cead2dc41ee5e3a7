"""Latte: diffusers' LatteTransformer3DModel (arXiv:2401.03048)."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import LatteTransformer3DModel
from diffusers.models.activations import GELU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed
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
        self._size: tuple[int, int] | None = None
        self._positions: Tensor
        config = host.config
        for key, allowed in (
            ("norm_type", "ada_norm_single"),
            ("activation_fn", "gelu-approximate"),
            ("attention_bias", True),
            ("norm_elementwise_affine", False),
        ):
            if config[key] != allowed:
                raise ValueError(f"host.config.{key}: got {config[key]!r}, must be {allowed!r}")
        plain(host, "pos_embed", PatchEmbed)
        for name in ("pos_embed.proj", "adaln_single", "caption_projection", "norm_out", "proj_out"):
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
            tensors={"latents": latents, "timestep": timestep.expand(batch)},
            text=text,
            shape=(
                batch,
                frames,
                height // patch * (width // patch),
                config.num_attention_heads * config.attention_head_dim,
            ),
            latent_size=(height, width),
            groups=batch,
            options=(given["return_dict"],),
        )

    def prepare(self, call: Call) -> None:
        """The 2D position table of this latent size; the host makes it anew at every call of another size."""
        patches = self.host.pos_embed
        size = (call.latent_size[0] // patches.patch_size, call.latent_size[1] // patches.patch_size)
        if size == self._size:
            return
        if size == (patches.height, patches.width):
            self._positions = patches.pos_embed
        else:
            table = get_2d_sincos_pos_embed(
                patches.pos_embed.shape[-1],
                size,
                base_size=patches.base_size,
                interpolation_scale=patches.interpolation_scale,
                device=patches.pos_embed.device,
                output_type="pt",
            )
            self._positions = table.float()[None]
        self._size = size

    def embed(self, call: Call) -> Tensor:
        """Patches and their 2D positions."""
        frames = rearrange(call.tensors["latents"], "b c t h w -> (b t) c h w")
        patches = self.host.pos_embed.proj(frames)
        return (patches.flatten(2).mT + self._positions).to(patches.dtype).contiguous().view(call.shape)

    def frame_embed(self, call: Call) -> Tensor | None:
        """The sincos table over frames; a single frame has none."""
        return self.host.temp_pos_embed[0].to(self.host.dtype) if call.shape[1] > 1 else None

    def modulate(self, call: Call) -> Modulation:
        """The timestep's share of every block's modulation and of the final one."""
        batch = call.shape[0]
        timestep, embedded = self.host.adaln_single(
            call.tensors["timestep"], batch_size=batch, hidden_dtype=self.host.dtype
        )
        final = self.host.scale_shift_table + embedded[:, None]  # [B, 2, C]: shift, scale
        return Modulation(timestep.view(batch, 6, -1), final[:, 0], final[:, 1])

    def project_text(self, text: Tensor) -> Tensor:
        """The caption projection."""
        return self.host.caption_projection(text)

    def project_out(self, h: Tensor, call: Call) -> Tensor:
        """The final projection, and the patches put back together."""
        patch = self.host.config.patch_size
        return rearrange(
            self.host.proj_out(h),
            "b t (h w) (p q c) -> b c t (h p) (w q)",
            h=call.latent_size[0] // patch,
            p=patch,
            q=patch,
        )

    def wrap(self, sample: Tensor, call: Call) -> Any:
        """A tuple, or diffusers' output class where return_dict is set."""
        return Transformer2DModelOutput(sample=sample) if call.options[0] else (sample,)

    def check_weights(self) -> None:
        """Raise ValueError if the host's parameters were moved or replaced."""
        self._fuser.check()

    def restore(self) -> None:
        """Give the host its separate parameters back."""
        self._fuser.restore()
