"""Wan 2.1 and 2.2 (arXiv:2503.20314): diffusers' WanTransformer3DModel, from text or from an image, of any size."""

from __future__ import annotations

import dataclasses
from typing import Any

from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanImageEmbedding,
    WanRotaryPosEmbed,
    WanTimeTextImageEmbedding,
    WanTransformerBlock,
)
from torch import Tensor, nn

from pab_kernels.blocks.block import Block, BlockStack, Branch, Modulation, Norm
from pab_kernels.blocks.branches import CrossAttention, ImageKV, Rope
from pab_kernels.blocks.layout import Layout
from pab_kernels.models.across_heads import AcrossHeadsAdapter, distinct_timesteps
from pab_kernels.models.adapter import MODULATION_INDEX, Call, embed_patches, plain
from pab_kernels.models.hosts.layers import unpatchify
from pab_kernels.ops.checks import check_shape, check_tensor

TEXT_TOKENS = 512
"""Where there is an image, diffusers takes the last 512 tokens for the text's."""


class WanAdapter(AcrossHeadsAdapter):
    """Adapter of diffusers' WanTransformer3DModel.

    Its self-attention counts as spatial. What attention gives is kept before its gate, and gated anew.

    Raises
    ------
    TypeError
        A module is not the plain class it must be (LoRA, quantisation, hooks, an unknown attention processor).
    ValueError
        An option of the model that the executor does not cover.
    """

    full_text = True  # diffusers pads it with zeros to 512 tokens, and attends to them

    def __init__(self, host: Any) -> None:
        super().__init__(host, WanAttention, WanAttnProcessor)
        config = plain(host, "config")
        if config.qk_norm != "rms_norm_across_heads":
            raise ValueError(f"host.config.qk_norm: got {config.qk_norm!r}, must be 'rms_norm_across_heads'")
        if (config.added_kv_proj_dim is None) != (config.image_dim is None):
            raise ValueError(
                f"host.config.added_kv_proj_dim, image_dim: got {config.added_kv_proj_dim} and {config.image_dim}, "
                "must both be given (from an image) or neither"
            )
        for path, *classes in (
            ("patch_embedding", nn.Conv3d),
            ("rope", WanRotaryPosEmbed),
            ("condition_embedder", WanTimeTextImageEmbedding),
            ("condition_embedder.timesteps_proj", Timesteps),
            ("condition_embedder.time_embedder", TimestepEmbedding),
            ("condition_embedder.act_fn", nn.SiLU),
            ("condition_embedder.time_proj", nn.Linear),
            ("condition_embedder.text_embedder", PixArtAlphaTextProjection),
            ("condition_embedder.image_embedder", WanImageEmbedding, type(None)),
            ("norm_out", FP32LayerNorm),
            ("proj_out", nn.Linear),
            ("scale_shift_table",),
        ):
            plain(host, path, *classes)
        self._tables: list[tuple[Tensor, Tensor]] = []
        """Copies in float32 of the blocks' tables, and these."""
        try:
            blocks = tuple(self._block(i) for i in range(config.num_layers))
        except BaseException:
            self.restore()
            raise
        self.stack = BlockStack(blocks, final=Norm(eps=host.norm_out.eps))

    def _block(self, index: int) -> Block:
        path = f"blocks.{index}"
        plain(self.host, path, WanTransformerBlock)
        first, last = (plain(self.host, f"{path}.{name}", FP32LayerNorm) for name in ("norm1", "norm3"))
        middle = plain(self.host, f"{path}.norm2", FP32LayerNorm, nn.Identity)
        affine = None
        if isinstance(middle, FP32LayerNorm):
            affine = Norm("layer", middle.eps, middle.weight.detach(), middle.bias.detach())
        branches = (
            Branch("spatial", self._self_attention(f"{path}.attn1"), Norm(eps=first.eps), 0, 1, 2, regate=True),
            Branch("cross", self._with_image(f"{path}.attn2", self._cross_attention(f"{path}.attn2")), affine),
            Branch("mlp_spatial", self._mlp(f"{path}.ffn"), Norm(eps=last.eps), 3, 4, 5),
        )
        table = plain(self.host, f"{path}.scale_shift_table").detach().squeeze(0)
        # diffusers adds the timestep's share in float32 even where the table was cast.
        wide = table.float()
        if wide is not table:
            self._tables.append((wide, table))
        return Block("spatial", index, branches, wide)

    def refresh(self) -> None:
        """The tables, where they are copies."""
        for wide, table in self._tables:
            wide.copy_(table)

    def _with_image(self, path: str, weights: CrossAttention) -> CrossAttention:
        if self.host.config.added_kv_proj_dim is None:
            return weights
        kv = self._fuser.fuse(self.host, [f"{path}.add_k_proj", f"{path}.add_v_proj"])
        return dataclasses.replace(weights, image=ImageKV(kv, self._norm(f"{path}.norm_added_k")))

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """Read the arguments of WanTransformer3DModel.forward."""
        given, config = self._arguments(*args, **kwargs), self.host.config
        latents, text = given["hidden_states"], given["encoder_hidden_states"]
        check_shape("hidden_states", check_tensor("hidden_states", latents), ("B", config.in_channels, "T", "H", "W"))
        batch, _, *size = latents.shape
        if any(length % patch for length, patch in zip(size, config.patch_size, strict=True)):
            raise ValueError(f"hidden_states: size is {size}, must be multiples of the patch size {config.patch_size}")
        frames, height, width = (length // patch for length, patch in zip(size, config.patch_size, strict=True))
        check_shape("encoder_hidden_states", check_tensor("encoder_hidden_states", text), (batch, "L", config.text_dim))
        image = self._image(given["encoder_hidden_states_image"], text)
        shape = (batch, frames, height * width, self.stack.channels)
        tensors, layout = self._timesteps(check_tensor("timestep", given["timestep"]), shape)
        return Call(
            tensors={"latents": latents, **tensors},
            text=text,
            text_sources=(text,) if image is None else (text, image),
            layout=layout,
            latent_size=(size[1], size[2]),
            image=image,
            options=(given["return_dict"],),
            table_key=(frames, height, width),
            split={"latents": 2, MODULATION_INDEX: 1},
        )

    def _image(self, image: Tensor | None, text: Tensor) -> Tensor | None:
        """The picture's embedding, or ValueError where the model wants one and has none, or the other way round."""
        config, name = self.host.config, "encoder_hidden_states_image"
        if config.added_kv_proj_dim is None:
            if image is not None:
                raise ValueError(f"{name}: got one, must be None: this model attends to no image (added_kv_proj_dim)")
            return None
        if image is None:
            raise ValueError(f"{name}: got None, must be given: this model attends to an image (added_kv_proj_dim)")
        if text.shape[1] != TEXT_TOKENS:
            raise ValueError(
                f"encoder_hidden_states: has {text.shape[1]} tokens, must have {TEXT_TOKENS} where there is an image"
            )
        pictures = 1 if self.host.condition_embedder.image_embedder.pos_embed is None else 2  # first and last frame
        check_shape(name, check_tensor(name, image), (pictures * len(text), "L", config.image_dim))
        return image

    def _timesteps(self, timestep: Tensor, shape: tuple[int, int, int, int]) -> tuple[dict[str, Tensor], Layout]:
        """One a sequence; or, as Wan 2.2 5B has it, [B, T * S], one a token."""
        batch, frames, tokens, _ = shape
        if timestep.ndim < 2:
            if timestep.numel() != 1:
                check_shape("timestep", timestep, (batch,))
            return {"timestep": timestep.expand(batch)}, Layout.video(shape)
        check_shape("timestep", timestep, (batch, frames * tokens))
        values, index = distinct_timesteps(timestep)
        return {"timestep": values[None], MODULATION_INDEX: index}, Layout.video(shape, len(values), indexed=True)

    def tables(self, call: Call) -> dict[str, Tensor]:
        """The rotary tables of this grid of patches."""
        tables = self.host.rope(call.tensors["latents"])
        # Both channels of a pair have the same angle.
        cos, sin = (table.squeeze((0, 2))[:, ::2].float().contiguous() for table in tables)
        return {"cos": cos, "sin": sin}

    def embed(self, call: Call) -> Tensor:
        """Patches; positions come in by rotation."""
        return embed_patches(call.tensors["latents"], self.host.patch_embedding)

    def rope(self, call: Call) -> Rope:
        """Rotary tables [T * S, D / 2] over time, rows and columns, the same for every head."""
        return call.tensors["cos"], call.tensors["sin"]

    def modulate(self, call: Call) -> Modulation:
        """The timestep's share of every block's modulation and of the final one."""
        embedder = self.host.condition_embedder
        frequencies = embedder.timesteps_proj(call.tensors["timestep"].flatten())
        embedded = embedder.time_embedder(frequencies.to(embedder.time_embedder.linear_1.weight.dtype))
        embedded = embedded.to(self.stack.dtype)
        vectors = embedder.time_proj(embedder.act_fn(embedded)).unflatten(1, (6, -1))
        shift, scale = (self.host.scale_shift_table + embedded[:, None]).unbind(1)
        return Modulation(vectors, shift, scale)

    def project_text(self, text: Tensor) -> Tensor:
        """The text embedder."""
        return self.host.condition_embedder.text_embedder(text)

    def project_image(self, image: Tensor) -> Tensor:
        """The image embedder; a first and a last frame come out as one sequence."""
        return self.host.condition_embedder.image_embedder(image)

    def project_out(self, h: Tensor, call: Call) -> Tensor:
        """The final projection, and the patches put back together."""
        patch = tuple(self.host.config.patch_size)
        grid = (call.layout.shape[1], call.latent_size[0] // patch[1], call.latent_size[1] // patch[2])
        return unpatchify(self.host.proj_out(h).flatten(1, 2), grid, patch)

    def wrap(self, sample: Tensor, call: Call) -> Any:
        """A tuple, or diffusers' output class where return_dict is set."""
        return Transformer2DModelOutput(sample=sample) if call.options[0] else (sample,)
