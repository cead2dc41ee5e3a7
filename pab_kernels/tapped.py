"""The blocks of a host with their branches in the open: what the plain form and the profile stand on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Protocol, TypeVar

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformerBlock
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn

from pab_kernels.models.hosts.layers import modulate
from pab_kernels.models.hosts.stdit3 import STDiT3Block

Tapped = TypeVar("Tapped", bound="TappedBlocks")


class Branch(Protocol):
    """A block's way to its branches."""

    def __call__(self, name: str, stream: Tensor, compute: Callable[[], Tensor], gate: Tensor | None = None) -> Tensor:
        """Given a branch's name, the stream it is added to, how to compute it and its gate: the gated output, or a
        kept one."""


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
        self.depth = 0
        """How many blocks a list of the host has: one more than the last index."""
        self._blocks: list[nn.Module] = []
        for path, module in host.named_modules():
            forward = next((each for cls, each in _FORWARDS.items() if isinstance(module, cls)), None)
            if forward is None:
                continue
            block: nn.Module = module
            parent, _, index = path.rpartition(".")
            kind = "temporal" if parent.startswith("temporal") else "spatial"
            run = partial(forward, block, partial(self.branch, kind, int(index)), regate)
            block.forward = partial(self.block, kind, int(index), run)
            self._blocks.append(block)
            self.depth = max(self.depth, int(index) + 1)
        if not self._blocks:
            known = ", ".join(cls.__name__ for cls in _FORWARDS)
            raise TypeError(f"host: a {type(host).__name__} has none of the blocks that are known: {known}")
        self._hook = host.register_forward_pre_hook(self._next, with_kwargs=True)

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

    def block(self, kind: str, index: int, run: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The stream after the block of `kind` at `index`; `run` takes its arguments."""
        return run(*args, **kwargs)

    @abstractmethod
    def branch(
        self,
        kind: str,
        index: int,
        name: str,
        stream: Tensor,
        compute: Callable[[], Tensor],
        gate: Tensor | None = None,
    ) -> Tensor:
        """The output of branch `name` ("attention", "cross" or "mlp") of the block of `kind` at `index`.

        Times its gate, where it is gated here, it is added to `stream`, which has its shape.
        """

    def _next(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before every call of the host."""
        self.call += 1


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
    x = x + branch("attention", x, lambda: block.self_attention(x, shift, scale, rope), gate)
    x = x + branch("cross", x, lambda: block.cross_attention(x, text, mask))
    return x + branch("mlp", x, lambda: block.feed_forward(x, mlp_shift, mlp_scale), mlp_gate)


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
        x = x + branch("attention", x, attend, gate)
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
    return x + branch("mlp", x, lambda: block.ff(modulate(block.norm2(x), mlp_shift, mlp_scale)), mlp_gate)


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
    mlp = branch("mlp", x, lambda: block.ffn(normed(block.norm3, mlp_shift, mlp_scale)).float(), mlp_gate)
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
    return x + branch("mlp", x, lambda: block.ff(modulate(block.norm2(x), mlp_shift, mlp_scale)), mlp_gate)


_FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {
    STDiT3Block: _stdit3_forward,
    BasicTransformerBlock: _basic_forward,
    WanTransformerBlock: _wan_forward,
    LTXVideoTransformerBlock: _ltx_forward,
}
