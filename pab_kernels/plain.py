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

    Attention and MLP are gated when they pass here; cross-attention comes after its projection.

    Parameters
    ----------
    host : nn.Module
        Made of STDiT3's blocks, or of diffusers' adaLN-single blocks. Blocks in a list named ``temporal...`` attend
        along time.
    regate : bool
        Blocks of diffusers' kind gate attention after it has passed here, not before.

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
            if not isinstance(module, STDiT3Block | BasicTransformerBlock):
                continue
            block: nn.Module = module
            parent, _, index = path.rpartition(".")
            kind = "temporal" if parent.startswith("temporal") else "spatial"
            forward = _stdit3_forward if isinstance(module, STDiT3Block) else _basic_forward
            block.forward = partial(forward, block, partial(self.branch, kind, int(index)), regate)
            self._blocks.append(block)
        if not self._blocks:
            raise TypeError(f"host: a {type(host).__name__} has neither STDiT3's blocks nor diffusers' adaLN-single")
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

    Attention is kept gated, that of Open-Sora-Plan 1.2 before its gate; cross-attention after its projection; the MLP
    gated.

    Parameters
    ----------
    host : nn.Module
        As for `TappedBlocks`.
    config : PABConfig
    """

    def __init__(self, host: nn.Module, config: PABConfig) -> None:
        self.config = config
        self._kept: dict[tuple[str, str, int], Tensor] = {}
        self._schedule: Schedule | None = None
        super().__init__(host, regate=isinstance(host, OpenSoraPlanV120))

    def close(self) -> None:
        """Give the blocks their own forward back and forget every output. Closing twice does nothing."""
        super().close()
        self._kept.clear()

    def begin(self, timesteps: Iterable[float]) -> None:
        """Plan a run over `timesteps`, one a call of the host, and forget every output."""
        self._schedule, self.call = Schedule(self.config, timesteps), -1
        self._kept.clear()

    @property
    def _variant(self) -> StepVariant:
        if self._schedule is None or self.call >= len(self._schedule):
            raise ValueError("no run has begun, or its calls are over: call begin(timesteps)")
        return self._schedule[self.call]

    def branch(self, kind: str, index: int, name: str, stream: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """The branch's output, computed or kept from before."""
        branch = {"attention": kind, "cross": "cross", "mlp": f"mlp_{kind}"}[name]
        has_slot = index in self.config.blocks(branch)
        if has_slot and self._variant.reads(branch, index):
            return self._kept[name, kind, index]
        value = compute()
        if has_slot and self._variant.writes(branch, index):
            self._kept[name, kind, index] = value
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
