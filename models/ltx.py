"""LTX-Video 0.9 (arXiv:2501.00103): diffusers' LTXVideoTransformer3DModel."""

from __future__ import annotations

from typing import Any

from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormSingle, RMSNorm
from diffusers.models.transformers.transformer_ltx import (
    LTXAttention,
    LTXVideoAttnProcessor,
    LTXVideoRotaryPosEmbed,
    LTXVideoTransformerBlock,
)
from torch import Tensor, nn

from pab_kernels.blocks.block import Block, BlockStack, Branch, Modulation, Norm
from pab_kernels.blocks.branches import Rope
from pab_kernels.blocks.layout import Layout
from pab_kernels.models.across_heads import AcrossHeadsAdapter, distinct_timesteps
from pab_kernels.models.adapter import MODULATION_INDEX, Call, plain
from pab_kernels.models.seen import Seen
from pab_kernels.ops.checks import check_shape, check_tensor


class LTXAdapter(AcrossHeadsAdapter):
    """Adapter of diffusers' LTXVideoTransformer3DModel, whose latents come as tokens [B, N, C].

    Its self-attention counts as spatial. What attention gives is kept before its gate, and gated anew.

    Raises
    ------
    TypeError
        A module is not the plain class it must be (LoRA, quantisation, hooks, an unknown attention processor).
    """

    def __init__(self, host: Any) -> None:
        super().__init__(host, LTXAttention, LTXVideoAttnProcessor)
        for path, *classes in (
            ("proj_in", nn.Linear),
            ("time_embed", AdaLayerNormSingle),
            ("caption_projection", PixArtAlphaTextProjection),
            ("rope", LTXVideoRotaryPosEmbed),
            ("norm_out", nn.LayerNorm),
            ("proj_out", nn.Linear),
            ("scale_shift_table",),
        ):
            plain(host, path, *classes)
        try:
            blocks = tuple(self._block(i) for i in range(plain(host, "config").num_layers))
        except BaseException:
            self.restore()
            raise
        self.stack = BlockStack(blocks, final=Norm(eps=host.norm_out.eps))
        self._seen = Seen()

    def _block(self, index: int) -> Block:
        path = f"transformer_blocks.{index}"
        plain(self.host, path, LTXVideoTransformerBlock)
        branches = (
            Branch("spatial", self._self_attention(f"{path}.attn1"), self._rms(f"{path}.norm1"), 0, 1, 2, regate=True),
            Branch("cross", self._cross_attention(f"{path}.attn2")),
            Branch("mlp_spatial", self._mlp(f"{path}.ff"), self._rms(f"{path}.norm2"), 3, 4, 5),
        )
        return Block("spatial", index, branches, plain(self.host, f"{path}.scale_shift_table").detach())

    def _rms(self, path: str) -> Norm:
        module = plain(self.host, path, RMSNorm)
        weight, bias = (None if each is None else each.detach() for each in (module.weight, module.bias))
        return Norm("rms", module.eps, weight, bias)

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """Read the arguments of LTXVideoTransformer3DModel.forward."""
        given, config = self._arguments(*args, **kwargs), self.host.config
        latents, text, mask = (
            given[name] for name in ("hidden_states", "encoder_hidden_states", "encoder_attention_mask")
        )
        check_shape("hidden_states", check_tensor("hidden_states", latents), ("B", "N", config.in_channels))
        batch, tokens, _ = latents.shape
        check_shape(
            "encoder_hidden_states", check_tensor("encoder_hidden_states", text), (batch, "L", config.caption_channels)
        )
        if given["video_coords"] is not None:
            raise ValueError(
                "video_coords: got a tensor, must be None: positions are those of num_frames, height, width"
            )
        size = tuple(given[name] for name in ("num_frames", "height", "width"))
        if None in size or size[0] * size[1] * size[2] != tokens:
            raise ValueError(f"num_frames, height, width: got {size}, must be those of the {tokens} tokens")
        scale = given["rope_interpolation_scale"]
        place = (*size, None if scale is None else tuple(float(each) for each in scale))
        counts = None
        if mask is not None:
            check_shape("encoder_attention_mask", check_tensor("encoder_attention_mask", mask), (batch, text.shape[1]))
            self._seen.check_mask("encoder_attention_mask", mask)
            counts = mask != 0
            counts = counts | ~counts.any(1, keepdim=True)  # the host's finite bias: a prompt without tokens sees all
        shape = (batch, 1, tokens, self.stack.channels)
        tensors, layout = self._timesteps(check_tensor("timestep", given["timestep"]), shape)
        return Call(
            tensors={"latents": latents, **tensors},
            text=text,
            text_sources=(text,) if mask is None else (text, mask),
            layout=layout,
            latent_size=(size[1], size[2]),
            text_mask=counts,
            options=(given["return_dict"],),
            table_key=place,
            doubts=self._seen.doubts(),
            split={"latents": 1, MODULATION_INDEX: 1},
            split_frames=False,
        )

    def _timesteps(self, timestep: Tensor, shape: tuple[int, int, int, int]) -> tuple[dict[str, Tensor], Layout]:
        """One a sequence; or [B, N], one a token, as image-to-video has it."""
        batch, _, tokens, _ = shape
        if timestep.ndim < 2 or timestep.shape[1] == 1:
            check_shape("timestep", timestep.flatten(), (batch,))
            return {"timestep": timestep.flatten()}, Layout.video(shape)
        check_shape("timestep", timestep, (batch, tokens))
        values, index = distinct_timesteps(timestep)
        return {"timestep": values[None], MODULATION_INDEX: index}, Layout.video(shape, len(values), indexed=True)

    def tables(self, call: Call) -> dict[str, Tensor]:
        """The rotary tables of this size; over the full width, so that each head has its own."""
        tables = self.host.rope(call.tensors["latents"][:1], *call.table_key)
        # Both channels of a pair have the same angle.
        cos, sin = (table.squeeze(0)[:, ::2].float().contiguous() for table in tables)
        return {"cos": cos, "sin": sin}

    def embed(self, call: Call) -> Tensor:
        """Each token's projection."""
        return self.host.proj_in(call.tensors["latents"])[:, None]

    def rope(self, call: Call) -> Rope:
        """Rotary tables [N, H * D / 2] over time, rows and columns."""
        return call.tensors["cos"], call.tensors["sin"]

    def modulate(self, call: Call) -> Modulation:
        """The timestep's share of every block's modulation and of the final one."""
        timestep = call.tensors["timestep"].flatten()
        vectors, embedded = self.host.time_embed(timestep, batch_size=len(timestep), hidden_dtype=self.stack.dtype)
        shift, scale = (self.host.scale_shift_table + embedded[:, None]).unbind(1)
        return Modulation(vectors.unflatten(1, (6, -1)), shift, scale)

    def project_text(self, text: Tensor) -> Tensor:
        """The caption projection."""
        return self.host.caption_projection(text)

    def project_out(self, h: Tensor, call: Call) -> Tensor:
        """The final projection, tokens [B, N, C_out]."""
        return self.host.proj_out(h).squeeze(1)

    def wrap(self, sample: Tensor, call: Call) -> Any:
        """A tuple, or diffusers' output class where return_dict is set."""
        return Transformer2DModelOutput(sample=sample) if call.options[0] else (sample,)
