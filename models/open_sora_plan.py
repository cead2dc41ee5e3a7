"""Open-Sora-Plan: 1.1 is Latte with a text mask; 1.2 attends over the whole video and rotates in three dimensions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pab_kernels.branches import Rope
from pab_kernels.executor import BlockStack
from pab_kernels.models.adaln_single import AdaLNSingleAdapter
from pab_kernels.models.adapter import Call
from pab_kernels.models.hosts.layers import PlanAttnProcessor, check_text_mask
from pab_kernels.models.hosts.open_sora_plan import check_inputs
from pab_kernels.models.latte import LatteAdapter


def _text_mask(mask: Tensor | None, text: Tensor) -> Tensor | None:
    """Which tokens [B, L] count. The hosts' finite bias lets a prompt without any token attend to all of them."""
    if mask is None:
        return None
    mask = check_text_mask(mask, text) != 0
    return mask | ~mask.any(1, keepdim=True)


def _sources(text: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    return (text,) if mask is None else (text, mask)


class OpenSoraPlanV110Adapter(LatteAdapter):
    """Adapter of `OpenSoraPlanV110`."""

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """Read the arguments of OpenSoraPlanV110.forward."""
        given = self._arguments(*args, **kwargs)
        latents, text, mask = (
            given[name] for name in ("hidden_states", "encoder_hidden_states", "encoder_attention_mask")
        )
        check_inputs(self.host.config, self.host.video_length, latents, given["timestep"], text)
        return self._call(
            latents.to(self.host.dtype),
            given["timestep"],
            text.squeeze(1).to(self.host.dtype),
            _sources(text, mask),
            _text_mask(mask, text),
            given["return_dict"],
        )


class OpenSoraPlanV120Adapter(AdaLNSingleAdapter):
    """Adapter of `OpenSoraPlanV120`: its self-attention counts as spatial, and is gated anew when broadcast."""

    def __init__(self, host: Any) -> None:
        super().__init__(host, (PlanAttnProcessor,))
        self._rope: Rope | None = None
        self._grid: tuple[int, int, int] | None = None
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
        except (TypeError, ValueError):
            self.restore()
            raise
        self.stack = BlockStack(tuple(blocks), regate=True)

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
            shape=(
                batch,
                frames,
                height // patch * (width // patch),
                config.num_attention_heads * config.attention_head_dim,
            ),
            latent_size=(height, width),
            groups=batch,
            text_mask=_text_mask(mask, text),
            options=(given["return_dict"],),
        )

    def prepare(self, call: Call) -> None:
        """The rotary tables of this grid of patches."""
        patch = self.host.config.patch_size
        grid = (call.shape[1], call.latent_size[0] // patch, call.latent_size[1] // patch)
        if grid != self._grid:
            angles = self.host.rope_angles(grid, self.host.device).flatten(1).float()
            self._rope = (angles.cos().contiguous(), angles.sin().contiguous())
            self._grid = grid

    def embed(self, call: Call) -> Tensor:
        """Patches; positions come in by rotation."""
        patches = self.host.pos_embed.proj(call.tensors["latents"].transpose(1, 2).flatten(0, 1))
        return patches.flatten(2).mT.contiguous().view(call.shape)

    def frame_embed(self, call: Call) -> None:
        """There is none."""

    def rope(self, call: Call) -> Rope | None:
        """Rotary tables over time, rows and columns."""
        return self._rope
