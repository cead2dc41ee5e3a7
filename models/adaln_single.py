"""What the adapters of adaLN-single transformers share: Latte and Open-Sora-Plan, from diffusers, ours or official."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from pab_kernels.blocks.block import Block, BlockStack, Branch, Modulation
from pab_kernels.blocks.branches import CrossAttention, Mlp
from pab_kernels.blocks.self_attention import SelfAttention
from pab_kernels.models.adapter import (
    Adapter,
    Call,
    WeightFuser,
    check_one_device,
    check_value,
    layer_norm_of,
    linear_of,
    plain,
)
from pab_kernels.models.hosts.layers import unpatchify
from pab_kernels.models.seen import Seen


class AdaLNSingleAdapter(Adapter):
    """Base of the adapters for hosts made of diffusers' BasicTransformerBlock (or blocks of its structure).

    Q, K and V (K and V of cross-attention) become views of one fused weight each; `restore` undoes it.
    """

    stack: BlockStack
    regate = False
    """Whether a broadcast attention takes the gate of the current call."""

    def __init__(self, host: Any, processors: tuple[type | str, ...]) -> None:
        self.host = host
        self._processors = processors
        self._signature = inspect.signature(type(host).forward)
        self._fuser = WeightFuser()
        self._seen = Seen()
        config = plain(host, "config")
        for key, allowed in (
            ("norm_type", "ada_norm_single"),
            ("activation_fn", "gelu-approximate"),
            ("attention_bias", True),
            ("norm_elementwise_affine", False),
            ("only_cross_attention", False),
            ("double_self_attention", False),
            ("patch_size_t", 1),
        ):
            value = config.get(key, allowed)
            if value != allowed:
                raise ValueError(f"host.config.{key}: got {value!r}, must be {allowed!r}")
        check_one_device(host)
        for name in (
            "pos_embed.proj",
            "adaln_single",
            "caption_projection",
            "norm_out",
            "scale_shift_table",
            "proj_out",
        ):
            plain(host, name)

    def _block(
        self,
        kind: Literal["spatial", "temporal"],
        index: int,
        path: str,
        *,
        sequence: Literal["spatial", "temporal", "full"],
        cross: bool,
        rotary: bool = False,
        pair_stride: int = 1,
    ) -> Block:
        for name in (path, f"{path}.ff.net.0"):
            plain(self.host, name)
        norm = layer_norm_of(self.host, *(f"{path}.norm{i}" for i in (1, 2, 3)))
        approximate = plain(self.host, f"{path}.ff.net.0.approximate")
        check_value(f"{type(self.host).__name__}.{path}.ff.net.0.approximate", approximate, "tanh")
        attention = SelfAttention(
            heads=self._heads(f"{path}.attn1", rotary),
            qkv=self._fuser.fuse(self.host, [f"{path}.attn1.to_{name}" for name in "qkv"]),
            proj=linear_of(self.host, f"{path}.attn1.to_out.0"),
            sequence=sequence,
            rotary=rotary,
            pair_stride=pair_stride,
        )
        branches = [Branch(kind, attention, norm, shift=0, scale=1, gate=2, regate=self.regate)]
        if cross:
            text = CrossAttention(
                heads=self._heads(f"{path}.attn2"),
                q=linear_of(self.host, f"{path}.attn2.to_q"),
                kv=self._fuser.fuse(self.host, [f"{path}.attn2.to_k", f"{path}.attn2.to_v"]),
                proj=linear_of(self.host, f"{path}.attn2.to_out.0"),
            )
            branches.append(Branch("cross", text))
        mlp = Mlp(linear_of(self.host, f"{path}.ff.net.0.proj"), linear_of(self.host, f"{path}.ff.net.2"))
        branches.append(Branch(f"mlp_{kind}", mlp, norm, shift=3, scale=4, gate=5))
        table = plain(self.host, f"{path}.scale_shift_table").detach()
        return Block(kind, index, tuple(branches), table)

    def _heads(self, path: str, rotary: bool = False) -> int:
        attention = plain(self.host, path, Attention, "Attention")
        processor = plain(self.host, f"{path}.processor", *self._processors)
        for name in ("norm_q", "norm_k", "group_norm", "spatial_norm", "norm_cross", "downsampler"):
            if getattr(attention, name, None) is not None:
                raise TypeError(f"{path}.{name}: is set, must be None")
        for name, allowed in (("residual_connection", False), ("rescale_output_factor", 1.0)):
            check_value(f"{path}.{name}", getattr(attention, name, allowed), allowed)
        # Only official processors have these.
        check_value(f"{path}.processor.use_rope", getattr(processor, "use_rope", rotary), rotary)
        check_value(f"{path}.processor.compress_kv_factor", getattr(processor, "compress_kv_factor", None), None)
        return plain(self.host, f"{path}.heads")

    def _arguments(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        bound = self._signature.bind(self.host, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        for name, allowed in (
            ("use_image_num", 0),
            ("cross_attention_kwargs", None),
        ):
            if given.get(name, allowed) != allowed:
                raise ValueError(f"{name}: got {given[name]!r}, must be {allowed!r}")
        if given["timestep"] is None or given["encoder_hidden_states"] is None:
            raise ValueError("timestep, encoder_hidden_states: got None, must both be given")
        self._check_visible(given.get("attention_mask"))
        return given

    def _check_visible(self, mask: Tensor | None) -> None:
        """Raise ValueError if the official self-attention mask hides something. Only a new one waits for the GPU."""
        if mask is not None and self._seen.changed("attention_mask", mask) and not bool((mask == 1).all()):
            self._seen.forget()
            raise ValueError("attention_mask: hides tokens from self-attention, must be None or all ones")

    def modulate(self, call: Call) -> Modulation:
        """The timestep's share of every block's modulation and of the final one."""
        batch = call.layout.batch
        timestep, embedded = self.host.adaln_single(
            call.tensors["timestep"], {"resolution": None, "aspect_ratio": None}, batch, self.host.dtype
        )
        final = self.host.scale_shift_table + embedded[:, None]  # [B, 2, C]: shift, scale
        return Modulation(timestep.view(batch, 6, -1), final[:, 0], final[:, 1])

    def project_text(self, text: Tensor) -> Tensor:
        """The caption projection."""
        return self.host.caption_projection(text)

    def project_out(self, h: Tensor, call: Call) -> Tensor:
        """The final projection, and the patches put back together."""
        patch = self.host.config.patch_size
        grid = (call.layout.shape[1], call.latent_size[0] // patch, call.latent_size[1] // patch)
        return unpatchify(self.host.proj_out(h).flatten(1, 2), grid, (1, patch, patch))

    def wrap(self, sample: Tensor, call: Call) -> Any:
        """A tuple, or diffusers' output class where return_dict is set."""
        return Transformer2DModelOutput(sample=sample) if call.options[0] else (sample,)

    def restore(self) -> None:
        """Give the host its separate parameters back."""
        self._fuser.restore()
