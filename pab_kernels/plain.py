"""Pyramid Attention Broadcast the plain way: the eager host, its own modules, outputs kept in Python.

This is how the original does it. It shares nothing with the executor but the schedule, so each checks the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformerBlock
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn

from pab_kernels.config import PABConfig
from pab_kernels.models.hosts import OpenSoraPlanV120
from pab_kernels.models.hosts.layers import modulate
from pab_kernels.models.hosts.stdit3 import STDiT3Block
from pab_kernels.schedule import Schedule, StepVariant

Branch = Callable[[str, Tensor, Callable[[], Tensor]], Tensor]
"""Given a branch's name, the stream it is added to and how to compute it: its output, new or kept."""

Tapped = TypeVar("Tapped", bound="TappedBlocks")


class TappedBlocks(ABC):
    """Replaces the forward of a host's blocks by one that asks `branch` for every branch; leaving it puts them back.

    Attention and MLP are gated when they pass here, but attention of Wan and LTX-Video is gated after; cross-attention
    comes after its projection.

    Parameters
    ----------
    host : nn.Module
        Made of STDiT3's blocks, of diffusers' adaLN-single blocks, of Wan's or of LTX-Video's. Blocks in a list named
        ``temporal...`` attend along time.
    regate : bool
        diffusers' adaLN-single blocks gate attention after it has passed here, not before.

    Raises
    ------
    TypeError
        The host has no such blocks.
    """

    def __init__(self, host: nn.Module, regate: bool = False) -> None:
        self.call = -1
        """The host's current call, from 0."""
        self._blocks: list[nn.Module] = []
        for path, module in host.named_modules():
            forward = next((each for cls, each in _FORWARDS.items() if isinstance(module, cls)), None)
            if forward is None:
                continue
            block: nn.Module = module
            parent, _, index = path.rpartition(".")
            kind = "temporal" if parent.startswith("temporal") else "spatial"
            block.forward = partial(forward, block, partial(self.branch, kind, int(index)), regate)
            self._blocks.append(block)
        if not self._blocks:
            known = ", ".join(cls.__name__ for cls in _FORWARDS)
            raise TypeError(f"host: a {type(host).__name__} has none of the blocks that are known: {known}")
        self._hook = host.register_forward_pre_hook(self._next)

    def __enter__(self: Tapped) -> Tapped:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the blocks their own forward back. Closing twice does nothing."""
        self._hook.remove()
        for block in self._blocks:
            del block.forward
        self._blocks.clear()

    @abstractmethod
    def branch(self, kind: str, index: int, name: str, stream: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """The output of branch `name` ("attention", "cross" or "mlp") of the block of `kind` at `index`.

        It is added to `stream`, which has its shape.
        """

    def _next(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.call += 1


class PlainPAB(TappedBlocks):
    """Keeps the outputs of the branches that `config` broadcasts, and hands them out again.

    Attention is kept gated, that of Open-Sora-Plan 1.2, Wan and LTX-Video before its gate; cross-attention after its
    projection; the MLP gated.

    Parameters
    ----------
    host : nn.Module
        As for `TappedBlocks`.
    config : PABConfig
    forwards_per_step : int
        How often a step calls the host. Each of these calls keeps outputs of its own.
    """

    def __init__(self, host: nn.Module, config: PABConfig, forwards_per_step: int = 1) -> None:
        self.config = config
        self.forwards_per_step = forwards_per_step
        self._kept: dict[tuple[str, str, int, int], Tensor] = {}
        self._schedule: Schedule | None = None
        super().__init__(host, regate=isinstance(host, OpenSoraPlanV120))

    def close(self) -> None:
        """Give the blocks their own forward back and forget every output. Closing twice does nothing."""
        super().close()
        self._kept.clear()

    def begin(self, timesteps: Iterable[float]) -> None:
        """Plan a run over `timesteps`, one a step, and forget every output."""
        self._schedule, self.call = Schedule(self.config, timesteps), -1
        self._kept.clear()

    @property
    def _variant(self) -> StepVariant:
        step = self.call // self.forwards_per_step
        if self._schedule is None or step >= len(self._schedule):
            raise ValueError("no run has begun, or its calls are over: call begin(timesteps)")
        return self._schedule[step]

    def branch(self, kind: str, index: int, name: str, stream: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """The branch's output, computed or kept from before."""
        branch = {"attention": kind, "cross": "cross", "mlp": f"mlp_{kind}"}[name]
        has_slot = index in self.config.blocks(branch)
        key = name, kind, index, self.call % self.forwards_per_step
        if has_slot and self._variant.reads(branch, index):
            return self._kept[key]
        value = compute()
        if has_slot and self._variant.writes(branch, index):
            self._kept[key] = value
        return value


def _stdit3_forward(
    block: Any,
    branch: Branch,
    regate: bool,
    x: Tensor,
    text: Tensor,
    t: Tensor,
    mask: Tensor | None,
    rope: nn.Module,
) -> Tensor:
    """STDiT3Block.forward, its branches through `branch`."""
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = block.modulation(t)
    x = x + branch("attention", x, lambda: gate * block.self_attention(x, shift, scale, rope))
    x = x + branch("cross", x, lambda: block.cross_attention(x, text, mask))
    return x + branch("mlp", x, lambda: mlp_gate * block.feed_forward(x, mlp_shift, mlp_scale))


def _basic_forward(
    block: Any,
    branch: Branch,
    regate: bool,
    x: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
) -> Tensor:
    """BasicTransformerBlock.forward with adaLN-single, its branches through `branch`."""
    assert timestep is not None
    options = cross_attention_kwargs or {}
    vectors = block.scale_shift_table + timestep.reshape(x.shape[0], 6, -1)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = vectors.chunk(6, dim=1)

    def attend() -> Tensor:
        return block.attn1(modulate(block.norm1(x), shift, scale), attention_mask=attention_mask, **options)

    if regate:
        x = x + gate * branch("attention", x, attend)
    else:
        x = x + branch("attention", x, lambda: gate * attend())
    if block.attn2 is not None:
        x = x + branch(
            "cross",
            x,
            lambda: block.attn2(
                x,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                **options,
            ),
        )
    return x + branch("mlp", x, lambda: mlp_gate * block.ff(modulate(block.norm2(x), mlp_shift, mlp_scale)))


def _wan_forward(
    block: Any,
    branch: Branch,
    regate: bool,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
) -> Tensor:
    """WanTransformerBlock.forward, its branches through `branch`; `temb` [B, 6, C], or [B, N, 6, C] a token."""
    x = hidden_states
    vectors = (block.scale_shift_table + temb.float()).unbind(-2)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (v if temb.ndim == 4 else v[:, None] for v in vectors)

    def normed(norm: nn.Module, shift: Tensor | float = 0.0, scale: Tensor | float = 0.0) -> Tensor:
        return (norm(x.float()) * (1 + scale) + shift).type_as(x)

    attention = branch("attention", x, lambda: block.attn1(normed(block.norm1, shift, scale), None, None, rotary_emb))
    x = (x.float() + attention * gate).type_as(x)
    x = x + branch("cross", x, lambda: block.attn2(normed(block.norm2), encoder_hidden_states, None, None))
    mlp = branch("mlp", x, lambda: block.ffn(normed(block.norm3, mlp_shift, mlp_scale)).float() * mlp_gate)
    return (x.float() + mlp).type_as(x)


def _ltx_forward(
    block: Any,
    branch: Branch,
    regate: bool,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    """LTXVideoTransformerBlock.forward, its branches through `branch`; `temb` [B, 1 or N, 6 * C]."""
    x = hidden_states
    vectors = block.scale_shift_table + temb.unflatten(-1, (6, -1))
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = vectors.unbind(2)
    x = x + gate * branch(
        "attention", x, lambda: block.attn1(modulate(block.norm1(x), shift, scale), image_rotary_emb=image_rotary_emb)
    )
    x = x + branch(
        "cross",
        x,
        lambda: block.attn2(x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask),
    )
    return x + branch("mlp", x, lambda: mlp_gate * block.ff(modulate(block.norm2(x), mlp_shift, mlp_scale)))


_FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {
    STDiT3Block: _stdit3_forward,
    BasicTransformerBlock: _basic_forward,
    WanTransformerBlock: _wan_forward,
    LTXVideoTransformerBlock: _ltx_forward,
}
