"""Open-Sora 1.2: STDiT3, our host or a class of the same structure (Open-Sora's own, VideoSys's)."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from pab_kernels.blocks.block import Block, BlockStack, Branch, Modulation
from pab_kernels.blocks.branches import CrossAttention, Mlp, Rope
from pab_kernels.blocks.layout import Layout
from pab_kernels.blocks.linears import Linear
from pab_kernels.blocks.self_attention import SelfAttention
from pab_kernels.models.adapter import (
    Adapter,
    Call,
    check_forward,
    check_one_device,
    check_value,
    embed_patches,
    layer_norm_of,
    linear_of,
    plain,
    rms_norms_of,
)
from pab_kernels.models.hosts.layers import frame_angles, modulate, position_table, repeat_rows, unpatchify
from pab_kernels.models.seen import Seen
from pab_kernels.ops.checks import check_shape, check_tensor


class OpenSoraAdapter(Adapter):
    """Adapter of STDiT3, known by its structure.

    Raises
    ------
    TypeError
        The first attribute that is missing or is not the plain class it must be.
    """

    def __init__(self, host: Any) -> None:
        self.host = host
        self._signature = inspect.signature(type(host).forward)
        check_forward(host, "x", "timestep", "y", "mask", "x_mask", "fps", "height", "width")
        check_one_device(host)
        for name in (
            "x_embedder.proj",
            "t_embedder.mlp",
            "fps_embedder.mlp",
            "t_block",
            "y_embedder.y_proj",
            "input_sq_size",
        ):
            plain(host, name)
        check_value("x_embedder.norm", getattr(host.x_embedder, "norm", None), None)
        skip = getattr(getattr(host, "config", None), "skip_y_embedder", False)
        check_value("config.skip_y_embedder", skip, False)
        self._final = linear_of(host, "final_layer.linear")
        self._final_norm = plain(host, "final_layer.norm_final", nn.LayerNorm)
        self._final_table: Tensor = plain(host, "final_layer.scale_shift_table").detach()
        self._inv_freq: Tensor = plain(host, "pos_embed.inv_freq")
        self._freqs: Tensor = plain(host, "rope.freqs").detach()
        for name, allowed in (("use_xpos", False), ("interpolate_factor", 1.0)):
            check_value(f"rope.{name}", getattr(host.rope, name, allowed), allowed)
        self._patch: tuple[int, int, int] = tuple(self.host.x_embedder.proj.kernel_size)
        self._seen = Seen()
        blocks = []
        for index in range(len(plain(host, "spatial_blocks"))):
            blocks.append(self._block("spatial", index))
            blocks.append(self._block("temporal", index))
        self.stack = BlockStack(tuple(blocks), final=layer_norm_of(host, "final_layer.norm_final"))

    def _block(self, kind: Literal["spatial", "temporal"], index: int) -> Block:
        path = f"{kind}_blocks.{index}"

        def linear(name: str) -> Linear:
            return linear_of(self.host, f"{path}.{name}")

        # By name, since their packages are not imported: ours, VideoSys', Open-Sora's.
        attention = self._named(f"{path}.attn", "SelfAttention", "OpenSoraAttention", "Attention")
        crosses = ("CrossAttention", "OpenSoraMultiHeadCrossAttention", "MultiHeadCrossAttention")
        self._named(f"{path}.cross_attn", *crosses)
        rotates = getattr(attention, "rope", kind == "temporal")
        check_value(f"{path}.attn.rope", rotates, kind == "temporal")
        activation = getattr(plain(self.host, f"{path}.mlp"), "act", None)
        if activation is not None:
            plain(self.host, f"{path}.mlp.act", nn.GELU)
            check_value(f"{path}.mlp.act.approximate", activation.approximate, "tanh")
        if getattr(attention, "qk_norm_legacy", False):
            raise TypeError(f"{path}.attn.qk_norm_legacy: is set, must not be: it norms after the rotation")
        heads = plain(self.host, f"{path}.attn.num_heads")
        norms = [
            self._named(f"{path}.attn.{name}", "Identity", "RMSNorm", "LlamaRMSNorm", "FusedRMSNorm")
            for name in ("q_norm", "k_norm")
        ]
        (q_norm, k_norm), eps = rms_norms_of([f"{path}.attn.{name}" for name in ("q_norm", "k_norm")], norms)
        self_attention = SelfAttention(
            qkv=linear("attn.qkv"),
            proj=linear("attn.proj"),
            heads=heads,
            sequence=kind,
            q_norm=q_norm,
            k_norm=k_norm,
            norm_eps=eps,
            rotary=kind == "temporal",
        )
        text = CrossAttention(
            linear("cross_attn.q_linear"), linear("cross_attn.kv_linear"), linear("cross_attn.proj"), heads
        )
        norm = layer_norm_of(self.host, f"{path}.norm1", f"{path}.norm2")
        branches = (
            Branch(kind, self_attention, norm, shift=0, scale=1, gate=2),
            Branch("cross", text),
            Branch(f"mlp_{kind}", Mlp(linear("mlp.fc1"), linear("mlp.fc2")), norm, shift=3, scale=4, gate=5),
        )
        return Block(kind, index, branches, plain(self.host, f"{path}.scale_shift_table").detach())

    def _named(self, path: str, *names: str) -> Any:
        """The plain module at `path`, whose class must have one of `names`."""
        module = plain(self.host, path)
        if type(module).__name__ not in names:
            raise TypeError(f"{path}: is a {type(module).__name__}, must be a {' or '.join(names)}")
        return module

    @property
    def _dtype(self) -> torch.dtype:
        return self.host.x_embedder.proj.weight.dtype

    def bind(self, *args: Any, **kwargs: Any) -> Call:
        """Read the arguments of STDiT3's forward."""
        arguments = self._signature.bind(self.host, *args, **kwargs)
        arguments.apply_defaults()
        given = arguments.arguments
        depth = len(self.host.spatial_blocks)
        if given.get("kwargs", {}).get("valid_depth", depth) != depth:
            raise ValueError(f"valid_depth: got {given['kwargs']['valid_depth']!r}, must be all {depth} blocks")
        channels = self.host.x_embedder.proj.in_channels
        x = check_tensor("x", given["x"])
        check_shape("x", x, ("B", channels, "T", "H", "W"))
        batch = x.shape[0]
        t, h, w = (-(-size // patch) for size, patch in zip(x.shape[2:], self._patch, strict=True))
        check_shape("timestep", check_tensor("timestep", given["timestep"]), (batch,))
        y, mask, x_mask = given["y"], given["mask"], given["x_mask"]
        check_shape("y", check_tensor("y", y), (batch, 1, "L", self.host.y_embedder.y_proj.fc1.in_features))
        tensors = {
            "latents": x.to(self._dtype),
            "timestep": given["timestep"],
            "fps": repeat_rows("fps", check_tensor("fps", given["fps"]), batch),
        }
        text_mask = None
        if mask is not None:
            check_shape("mask", check_tensor("mask", mask), ("rows", y.shape[2]))
            text_mask = repeat_rows("mask", mask, batch).bool()
        if x_mask is not None:
            check_shape("x_mask", check_tensor("x_mask", x_mask), (batch, t))
            tensors["x_mask"] = x_mask.bool()
        # The size comes as tensors; on a GPU, reading it waits.
        height, width = (self._first(name, given[name]) for name in ("height", "width"))
        return Call(
            tensors=tensors,
            text=y.squeeze(1).to(self._dtype),
            text_sources=(y,) if mask is None else (y, mask),
            layout=Layout.video((batch, t, h * w, self._final.weight.shape[1]), batch if x_mask is None else batch * t),
            latent_size=(x.shape[3], x.shape[4]),
            text_mask=text_mask,
            options=(x.shape[2],),
            table_key=(t, h, w, (height * width) ** 0.5),
            doubts=self._seen.doubts(),
            split={"latents": 2, "x_mask": 1},
        )

    def _first(self, name: str, tensor: Tensor) -> float:
        """The first element of a tensor, as the host reads it."""
        if check_tensor(name, tensor).numel() == 0:
            raise ValueError(f"{name}: shape is {list(tensor.shape)}, must have an element")
        return self._seen.values(name, tensor)[0]

    def tables(self, call: Call) -> dict[str, Tensor]:
        """The position table of this size in pixels, and the rotary tables of this many frames."""
        frames, h, w, side = call.table_key
        scale = side / self.host.input_sq_size
        angles = frame_angles(self._freqs, frames).float()
        return {
            "positions": position_table(self._inv_freq, h, w, scale, base_size=round((h * w) ** 0.5)),
            "cos": angles.cos().contiguous(),
            "sin": angles.sin().contiguous(),
        }

    def embed(self, call: Call) -> Tensor:
        """Patches and their 2D positions."""
        return embed_patches(call.tensors["latents"], self.host.x_embedder.proj).add_(call.tensors["positions"])

    def rope(self, call: Call) -> Rope | None:
        """Rotary tables along time."""
        return call.tensors["cos"], call.tensors["sin"]

    def _time(self, call: Call, timestep: Tensor) -> Tensor:
        """Embedding [B, C] of timestep and frame rate, rounded to the weights' dtype first, as in training."""
        parts = []
        for value, embedder in ((timestep, self.host.t_embedder), (call.tensors["fps"], self.host.fps_embedder)):
            frequencies = embedder.mlp[0].in_features
            waves = get_timestep_embedding(value, frequencies, flip_sin_to_cos=True, downscale_freq_shift=0)
            parts.append(embedder.mlp(waves.to(self._dtype)))
        return parts[0] + parts[1]

    def modulate(self, call: Call) -> Modulation:
        """The timestep's share of every block's modulation and of the final one; given frames have timestep 0."""
        timestep = call.tensors["timestep"].to(self._dtype)
        embedded = self._time(call, timestep)
        blocks = self.host.t_block(embedded)
        final = self._final_table + embedded[:, None]  # [B, 2, C]: shift, scale
        if "x_mask" in call.tensors:
            frames = call.layout.shape[1]
            given = self.host.t_block(self._time(call, torch.zeros_like(timestep)))
            blocks = torch.where(call.tensors["x_mask"][..., None], blocks[:, None], given[:, None])
            final = final.repeat_interleave(frames, 0)
        return Modulation(blocks.reshape(call.layout.modulations, 6, -1), final[:, 0], final[:, 1])

    def project_text(self, text: Tensor) -> Tensor:
        """The caption projection."""
        return self.host.y_embedder.y_proj(text)

    def project_out(self, h: Tensor, call: Call) -> Tensor:
        """The final projection, and the patches put back together and cropped: [B, C_out, T, H, W] float32."""
        t = call.layout.shape[1]
        if "x_mask" in call.tensors:
            # The official final layer normalises given frames a second time, with timestep 0.
            embedded = self._time(call, torch.zeros_like(call.tensors["fps"], dtype=self._dtype))
            shift, scale = (self._final_table + embedded[:, None])[:, :, None, None].unbind(1)
            again = modulate(self._final_norm(h), shift, scale)
            h = torch.where(call.tensors["x_mask"][:, :, None, None], h, again)
        tokens = nn.functional.linear(h, self._final.weight, self._final.bias).flatten(1, 2)
        height, width = call.latent_size
        grid = (t, -(-height // self._patch[1]), -(-width // self._patch[2]))
        out = unpatchify(tokens, grid, self._patch)[:, :, : call.options[0], :height, :width]
        return out.to(torch.promote_types(self._dtype, torch.float32))

    def wrap(self, sample: Tensor, call: Call) -> Tensor:
        """STDiT3 returns the bare tensor."""
        return sample

    def restore(self) -> None:
        """The host was not changed."""
