"""Open-Sora-Plan: 1.1 is Latte with a text mask; 1.2 attends over the whole video and rotates in three dimensions.

The official classes are known by their structure: LatteT2V (Open-Sora-Plan 1.1, and VideoSys' Latte) and OpenSoraT2V.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from pab_kernels.blocks.block import BlockStack
from pab_kernels.blocks.branches import Rope
from pab_kernels.blocks.layout import Layout
from pab_kernels.models.adaln_single import AdaLNSingleAdapter
from pab_kernels.models.adapter import Call, check_forward, check_value, embed_patches, layer_norm_of, plain
from pab_kernels.models.hosts.layers import PlanAttnProcessor, check_text_mask
from pab_kernels.models.hosts.open_sora_plan import check_inputs
from pab_kernels.models.latte import LatteAdapter
from pab_kernels.models.seen import Seen
from pab_kernels.ops.checks import check_tensor


def _text_mask(mask: Tensor | None, text: Tensor, seen: Seen) -> Tensor | None:
    """Which tokens [B, L] count. The hosts' finite bias lets a prompt without any token attend to all of them."""
    if mask is None:
        return None
    seen.check_mask("encoder_attention_mask", check_tensor("encoder_attention_mask", mask))
    mask = check_text_mask(mask, text) != 0
    return mask | ~mask.any(1, keepdim=True)


def _sources(text: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    return (text,) if mask is None else (text, mask)


_OFFICIAL_ARGUMENTS = (
    "hidden_states",
    "timestep",
    "encoder_hidden_states",
    "attention_mask",
    "encoder_attention_mask",
    "use_image_num",
    "return_dict",
)


class OpenSoraPlanV110Adapter(LatteAdapter):
    """Adapter of `OpenSoraPlanV110`."""

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """Read the arguments of OpenSoraPlanV110.forward."""
        given = self._arguments(*args, **kwargs)
        latents, source, mask = (
            given[name] for name in ("hidden_states", "encoder_hidden_states", "encoder_attention_mask")
        )
        text = self._with_prompts(source)
        frames = self.host.video_length if given.get("enable_temporal_attentions", True) else "T"
        check_inputs(self.host.config, frames, latents, given["timestep"], text)
        return self._call(
            given,
            latents.to(self.host.dtype),
            text.squeeze(1).to(self.host.dtype),
            _sources(source, mask),
            _text_mask(mask, text, self._seen),
        )

    def _with_prompts(self, text: Tensor) -> Tensor:
        """The text as [B, 1, L, C]."""
        return text


class LatteT2VAdapter(OpenSoraPlanV110Adapter):
    """Adapter of the official LatteT2V as VideoSys has it, for Open-Sora-Plan 1.1 and for Latte.

    Both are `OpenSoraPlanV110` in all that counts, but Latte's takes text as [B, L, C].
    """

    def __init__(self, host: Any) -> None:
        check_forward(host, *_OFFICIAL_ARGUMENTS, "all_timesteps", "enable_temporal_attentions")
        super().__init__(host)

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """Read the arguments of LatteT2V.forward."""
        call = super().bind(*args, **kwargs)
        if not call.temporal:
            raise ValueError("enable_temporal_attentions: got False, must be True for the official class")
        return call

    def _with_prompts(self, text: Tensor) -> Tensor:
        return text[:, None] if text.ndim == 3 else text


class OpenSoraPlanV120Adapter(AdaLNSingleAdapter):
    """Adapter of `OpenSoraPlanV120`: its self-attention counts as spatial, and is gated anew when broadcast."""

    processors: tuple[type | str, ...] = (PlanAttnProcessor,)
    regate = True

    def __init__(self, host: Any) -> None:
        super().__init__(host, self.processors)
        blocks = []
        try:
            for i in range(self.host.config.num_layers):
                blocks.append(
                    self._block(
                        "spatial",
                        i,
                        f"transformer_blocks.{i}",
                        sequence="full",
                        cross=True,
                        rotary=True,
                        pair_stride=self.host.config.attention_head_dim // 6,
                    )
                )
        except BaseException:
            self.restore()
            raise
        self.stack = BlockStack(tuple(blocks), final=layer_norm_of(self.host, "norm_out"))

    def _rotation(self, grid: tuple[int, int, int]) -> Rope:
        """Cosines and sines [T * H * W, head_dim / 2], float32."""
        angles = self.host.rope_angles(grid, self.host.device).flatten(1).float()
        return angles.cos().contiguous(), angles.sin().contiguous()

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """Read the arguments of OpenSoraPlanV120.forward."""
        given = self._arguments(*args, **kwargs)
        latents, text, mask = (
            given[name] for name in ("hidden_states", "encoder_hidden_states", "encoder_attention_mask")
        )
        config = self.host.config
        check_inputs(config, "T", latents, given["timestep"], text)
        batch, _, frames, height, width = latents.shape
        patch = config.patch_size
        return Call(
            tensors={"latents": latents.to(self.host.dtype), "timestep": given["timestep"]},
            text=text.squeeze(1).to(self.host.dtype),
            text_sources=_sources(text, mask),
            layout=Layout.video(
                (
                    batch,
                    frames,
                    height // patch * (width // patch),
                    config.num_attention_heads * config.attention_head_dim,
                )
            ),
            latent_size=(height, width),
            text_mask=_text_mask(mask, text, self._seen),
            options=(given["return_dict"],),
            table_key=(frames, height // patch, width // patch),
            doubts=self._seen.doubts(),
            split={"latents": 2},
        )

    def tables(self, call: Call) -> dict[str, Tensor]:
        """The rotary tables of this grid of patches."""
        frames, height, width = call.table_key
        cos, sin = self._rotation((frames, height, width))
        return {"cos": cos, "sin": sin}

    def embed(self, call: Call) -> Tensor:
        """Patches; positions come in by rotation."""
        return embed_patches(call.tensors["latents"], self.host.pos_embed.proj)

    def rope(self, call: Call) -> Rope | None:
        """Rotary tables over time, rows and columns."""
        return call.tensors["cos"], call.tensors["sin"]


class OpenSoraT2VAdapter(OpenSoraPlanV120Adapter):
    """Adapter of the official OpenSoraT2V of Open-Sora-Plan 1.2, as VideoSys has it.

    Its rotation is asked for its own tables: it keeps one for each number of patches, so that of two axes with as many
    patches it turns the second by the first one's interpolation scale.
    """

    processors = ("AttnProcessor2_0",)

    def __init__(self, host: Any) -> None:
        check_forward(host, *_OFFICIAL_ARGUMENTS)
        plain(host, "pos_embed", "PatchEmbed2D")
        for name, allowed in (("use_abs_pos", False), ("norm", None)):
            check_value(f"pos_embed.{name}", plain(host, f"pos_embed.{name}"), allowed)
        path = "transformer_blocks.0.attn1.processor.rope"
        for name in ("get_cos_sin", *(f"interpolation_scale_{axis}" for axis in "thw")):
            plain(host, f"{path}.{name}")
        # A copy, since asking leaves traces in the original.
        self._official_rope: Any = copy.deepcopy(plain(host, path, "RoPE3D"))
        super().__init__(host)

    def _rotation(self, grid: tuple[int, int, int]) -> Rope:
        rope, device = self._official_rope, self.host.device
        third = self.host.config.attention_head_dim // 3
        places = torch.cartesian_prod(*(torch.arange(n, device=device) for n in grid))
        axes = []
        for axis, (n, name) in enumerate(zip(grid, "thw", strict=True)):
            scale = getattr(rope, f"interpolation_scale_{name}")
            tables = rope.get_cos_sin(third, n, device, torch.float32, scale)
            # The second half of a table repeats the first: a pair's two channels turn alike.
            axes.append([table[places[:, axis], : third // 2] for table in tables])
        cos, sin = (torch.cat(tables, dim=1).contiguous() for tables in zip(*axes, strict=True))
        return cos, sin

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """Read the arguments of OpenSoraT2V.forward."""
        call = super().bind(*args, **kwargs)
        if call.options[0]:
            raise ValueError("return_dict: got True, must be False: the official output class is not imported")
        return call
