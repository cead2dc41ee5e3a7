"""Latte (arXiv:2401.03048): diffusers' LatteTransformer3DModel."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed
from torch import Tensor

from pab_kernels.blocks.block import BlockStack
from pab_kernels.blocks.layout import Layout
from pab_kernels.models.adaln_single import AdaLNSingleAdapter
from pab_kernels.models.adapter import Call, check_value, embed_patches, layer_norm_of, plain
from pab_kernels.ops.checks import check_shape, check_tensor


class LatteAdapter(AdaLNSingleAdapter):
    """Adapter of diffusers' LatteTransformer3DModel.

    Raises
    ------
    TypeError
        A module is not the plain class it must be (LoRA, quantisation, hooks, an unknown attention processor).
    ValueError
        An option of the model that the executor does not cover.
    """

    def __init__(self, host: Any) -> None:
        super().__init__(host, (AttnProcessor2_0, AttnProcessor, "AttnProcessor2_0"))
        plain(host, "temp_pos_embed")
        plain(host, "pos_embed", PatchEmbed, "PatchEmbed")
        for name in ("patch_size", "height", "width", "base_size", "interpolation_scale", "pos_embed"):
            plain(host, f"pos_embed.{name}")
        check_value("pos_embed.norm", plain(host, "pos_embed.norm"), None)
        blocks = []
        try:
            for i in range(self.host.config.num_layers):
                path = f"transformer_blocks.{i}"
                blocks.append(self._block("spatial", i, path, sequence="spatial", cross=True))
                blocks.append(self._block("temporal", i, f"temporal_{path}", sequence="temporal", cross=False))
        except BaseException:
            self.restore()
            raise
        self.stack = BlockStack(tuple(blocks), embed_before=1, final=layer_norm_of(self.host, "norm_out"))

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """Read the arguments of LatteTransformer3DModel.forward."""
        given = self._arguments(*args, **kwargs)
        if given["encoder_attention_mask"] is not None:
            raise ValueError("encoder_attention_mask: got a mask, must be None: Latte attends to all text tokens")
        text = given["encoder_hidden_states"]
        batch, channels = len(given["hidden_states"]), self.host.config.caption_channels
        check_shape("encoder_hidden_states", check_tensor("encoder_hidden_states", text), (batch, "L", channels))
        if check_tensor("timestep", given["timestep"]).numel() != 1:
            check_shape("timestep", given["timestep"], (batch,))
        return self._call(given, given["hidden_states"], text, (text,), None)

    def _call(
        self,
        given: dict[str, Any],
        latents: Tensor,
        text: Tensor,
        sources: tuple[Tensor, ...],
        text_mask: Tensor | None,
    ) -> Call:
        config, temporal = self.host.config, bool(given.get("enable_temporal_attentions", True))
        if latents.ndim != 5 or latents.shape[1] != config.in_channels:
            raise ValueError(
                f"hidden_states: shape is {list(latents.shape)}, must be [B, {config.in_channels}, T, H, W]"
            )
        batch, _, frames, height, width = latents.shape
        patch = config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"hidden_states: {height}x{width} is not a multiple of the patch size {patch}")
        if temporal and frames not in (1, config.video_length):
            raise ValueError(f"hidden_states: got {frames} frames, must be {config.video_length} (or 1)")
        channels = config.num_attention_heads * config.attention_head_dim
        return Call(
            tensors={"latents": latents, "timestep": given["timestep"].expand(batch)},
            text=text,
            text_sources=sources,
            layout=Layout.video((batch, frames, height // patch * (width // patch), channels)),
            latent_size=(height, width),
            text_mask=text_mask,
            temporal=temporal,
            options=(given["return_dict"],),
            table_key=(height // patch, width // patch),
            doubts=self._seen.doubts(),
            split={"latents": 2},
        )

    def tables(self, call: Call) -> dict[str, Tensor]:
        """The 2D position table of this latent size; the host makes it anew at every call of another size."""
        patches, size = self.host.pos_embed, call.table_key
        if size == (patches.height, patches.width):
            return {"positions": patches.pos_embed.clone()}
        table = get_2d_sincos_pos_embed(
            patches.pos_embed.shape[-1],
            size,
            base_size=patches.base_size,
            interpolation_scale=patches.interpolation_scale,
            device=patches.pos_embed.device,
            output_type="pt",
        )
        return {"positions": table.float()[None]}

    def embed(self, call: Call) -> Tensor:
        """Patches and their 2D positions."""
        return embed_patches(call.tensors["latents"], self.host.pos_embed.proj).add_(call.tensors["positions"])

    def frame_embed(self, call: Call) -> Tensor | None:
        """The sincos table over frames; a single frame has none, nor has a stack without temporal blocks."""
        return self.host.temp_pos_embed[0].to(self.host.dtype) if call.temporal and call.layout.shape[1] > 1 else None
