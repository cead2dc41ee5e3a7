"""Runs the blocks of one denoising call for one `StepVariant`, with the fused ops."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from pab_kernels import ops
from pab_kernels.branches import (
    CrossAttention,
    Fp8Linear,
    Mlp,
    Rope,
    Rows,
    SelfAttention,
    TextKV,
    cross_attention,
    mlp,
    self_attention,
    text_kv,
)
from pab_kernels.cache import BroadcastCache, SlotKey
from pab_kernels.config import KINDS, PABConfig
from pab_kernels.fp8_ops import E4M3
from pab_kernels.quantized import Quantized
from pab_kernels.schedule import StepVariant


@dataclass(frozen=True)
class Block:
    """One DiT block: self-attention, maybe cross-attention, MLP, each a gated (cross: plain) residual branch.

    `table` [6, C] is added to the timestep's modulation: shift, scale and gate of attention, then of the MLP
    (adaLN-single, arXiv:2310.00426). `index` counts the blocks of one kind.
    """

    kind: Literal["spatial", "temporal"]
    index: int
    table: Tensor
    attention: SelfAttention
    cross: CrossAttention | None
    mlp: Mlp
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class BlockStack:
    """What the executor runs: the blocks in order, and what is particular to a family.

    A temporal position embedding is added to the stream before the block at `embed_before`. With `regate` a broadcast
    attention takes the gate of the current call instead of the one of the call that wrote the slot.
    """

    blocks: tuple[Block, ...]
    embed_before: int = -1
    regate: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of attention that these blocks have."""
        present = {block.kind for block in self.blocks} | {"cross" for block in self.blocks if block.cross}
        return tuple(kind for kind in KINDS if kind in present)

    def slot_keys(self, config: PABConfig) -> tuple[SlotKey, ...]:
        """The slots that `config` can ever broadcast."""
        keys = []
        for position, block in enumerate(self.blocks):
            if block.index in config.blocks(block.kind):
                keys.append(SlotKey(block.kind, position))
            if block.cross is not None and block.index in config.blocks("cross"):
                keys.append(SlotKey("cross", position))
            if block.index in config.mlp_blocks(block.kind):
                keys.append(SlotKey("mlp", position))
        return tuple(keys)


@dataclass(frozen=True)
class Traffic:
    """The slots that one `StepVariant` reads and writes."""

    reads: frozenset[SlotKey]
    writes: frozenset[SlotKey]


class Executor:
    """Runs all blocks for one variant, reading and writing the slots of its cache.

    Parameters
    ----------
    stack : BlockStack
        Its weights give dtype and device.
    config : PABConfig
    shape : (B, T, S, C)
        Of the residual stream, and so of every slot.
    groups : int
        Rows G of the modulation, B or B * T.

    Raises
    ------
    torch.cuda.OutOfMemoryError
        The slots do not fit; see `BroadcastCache`.
    """

    def __init__(self, stack: BlockStack, config: PABConfig, shape: tuple[int, int, int, int], groups: int) -> None:
        self.stack = stack
        self.shape = shape
        self.groups = groups
        table = stack.blocks[0].table
        self.cache = BroadcastCache(stack.slot_keys(config), shape, groups, table.dtype, table.device)
        self.tables = torch.stack([block.table for block in stack.blocks])  # [blocks, 6, C]
        self._traffic: dict[StepVariant, Traffic] = {}

    def text_kv(
        self, text: Tensor, kv_len: Tensor | None = None, out: list[TextKV | None] | None = None
    ) -> list[TextKV | None]:
        """Keys and values of the projected text for every block, None where there is no cross-attention.

        Parameters
        ----------
        text : Tensor
            [B, L, C].
        kv_len : Tensor, optional
            int32 [B], None: all count.
        out : list of TextKV, optional
            An earlier result for the same B and L, to be overwritten: a captured graph reads it where it lies.
        """
        result: list[TextKV | None] = []
        for position, block in enumerate(self.stack.blocks):
            if block.cross is None:
                result.append(None)
                continue
            earlier = None if out is None else out[position]
            kv = None if earlier is None else earlier.kv.flatten(2)
            result.append(text_kv(text, block.cross, kv_len, kv))
        return result

    def traffic(self, variant: StepVariant) -> Traffic:
        """The slots that `variant` reads and writes."""
        if variant not in self._traffic:
            reads, writes = set(), set()
            for key in self.cache:
                block = self.stack.blocks[key.position]
                if key.branch == "mlp":
                    decision = variant.mlp(block.kind)
                    if block.index in decision.broadcast:
                        reads.add(key)
                    elif block.index in decision.keep:
                        writes.add(key)
                else:
                    (reads if getattr(variant, key.branch) else writes).add(key)
            self._traffic[variant] = Traffic(frozenset(reads), frozenset(writes))
        return self._traffic[variant]

    def step(
        self,
        x: Tensor,
        modulation: Tensor,
        text: list[TextKV | None],
        final: tuple[Tensor, Tensor],
        variant: StepVariant,
        embed: Tensor | None = None,
        rope: Rope | None = None,
        final_eps: float = 1e-6,
    ) -> Tensor:
        """Run every block, and the final norm and modulation.

        Parameters
        ----------
        x : Tensor
            Residual stream [B, T, S, C], contiguous; used up.
        modulation : Tensor
            [G, 6, C] from the timestep, G is B or B * T.
        text : list of TextKV
            From `text_kv`.
        final : (shift, scale)
            [G, C] each.
        variant : StepVariant
        embed : Tensor, optional
            [T, C], the temporal position embedding.
        rope : (cos, sin), optional
            Rotary tables of the rotary blocks.
        final_eps : float
            Of the final LayerNorm.

        Returns
        -------
        Tensor
            [B, T, S, C], normalised and modulated for the final projection.
        """
        traffic = self.traffic(variant)
        tables = self.tables[:, None] + modulation  # [blocks, G, 6, C]
        for kind, gates in self.cache.gates.items():
            if kind != "mlp" and not getattr(variant, kind):
                # All blocks of a kind write their slots on the same steps, so their gates are kept in one launch.
                torch.index_select(tables[:, :, 2], 0, self.cache.positions[kind], out=gates)
        stream = Stream(x, modulation.shape[0])
        for position, block in enumerate(self.stack.blocks):
            shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = tables[position].unbind(1)
            if position == self.stack.embed_before:
                stream.embed = embed

            key = SlotKey(block.kind, position)
            slot = self.cache.get(key)
            if slot is not None and key in traffic.reads:
                stream.add(slot.value, gate if self.stack.regate else slot.gate)
            else:
                h = stream.norm_modulate(shift, scale, block.norm_eps, fp8=isinstance(block.attention.qkv, Fp8Linear))
                out = stream.scratch() if slot is None else slot.value
                stream.add(self_attention(h, block.attention, out, rope), gate)

            if block.cross is not None:
                key = SlotKey("cross", position)
                slot = self.cache.get(key)
                if slot is not None and key in traffic.reads:
                    stream.add(slot.value, None)
                else:
                    kv = text[position]
                    assert kv is not None
                    out = stream.scratch() if slot is None else slot.value
                    h = stream.flush(fp8=isinstance(block.cross.q, Fp8Linear))
                    stream.add(cross_attention(h, block.cross, kv, out), None)

            key = SlotKey("mlp", position)
            slot = self.cache.get(key)
            if slot is not None and key in traffic.reads:
                stream.add(slot.value, slot.gate)
            else:
                h = stream.norm_modulate(mlp_shift, mlp_scale, block.norm_eps, fp8=isinstance(block.mlp.up, Fp8Linear))
                keeps = slot is not None and key in traffic.writes
                out = slot.value if slot is not None and keeps else stream.scratch()
                stream.add(mlp(h, block.mlp, out), mlp_gate)
                if slot is not None and slot.gate is not None and keeps:
                    slot.gate.copy_(mlp_gate)
        h = stream.norm_modulate(*final, final_eps)
        assert isinstance(h, Tensor)
        return h


class Stream:
    """The residual stream with the branch outputs not added yet, so that each addition rides on the next pass."""

    def __init__(self, x: Tensor, groups: int) -> None:
        self.x = x
        self.rows = x.view(groups, -1, x.shape[-1])
        self.embed: Tensor | None = None
        self._branches: list[Tensor] = []
        self._gates: list[Tensor | None] = []

    @cached_property
    def _scratch(self) -> Tensor:
        return torch.empty_like(self.x)

    @cached_property
    def _modulated(self) -> Tensor:
        return torch.empty_like(self.x)

    @cached_property
    def _quantized(self) -> Quantized:
        return Quantized.empty(tuple(self.x.shape), E4M3, self.x.device)

    def scratch(self) -> Tensor:
        """Where a branch without a slot goes: one tensor, since every computed branch follows a pass that used it."""
        return self._scratch

    def add(self, branch: Tensor, gate: Tensor | None) -> None:
        """A branch's output, to be added by the next pass."""
        if len(self._branches) == ops.MAX_BRANCHES:
            self.flush()
        self._branches.append(branch.view(self.rows.shape))
        self._gates.append(gate)

    def flush(self, *, fp8: bool = False) -> Rows:
        """Add what is pending; the stream [B, T, S, C], or with `fp8` a copy of it in e4m3."""
        out = self._quantized if fp8 else None
        self._pass(None, None, 0.0, out)
        return self.x if out is None else out

    def norm_modulate(self, shift: Tensor, scale: Tensor, eps: float, *, fp8: bool = False) -> Rows:
        """Add what is pending; the stream normalised and modulated, [B, T, S, C], with `fp8` in e4m3."""
        out = self._quantized if fp8 else self._modulated
        self._pass(shift, scale, eps, out)
        return out

    def _pass(self, shift: Tensor | None, scale: Tensor | None, eps: float, out: Rows | None) -> None:
        if self._branches or self.embed is not None or out is not None:
            ops.residual_norm_modulate(
                self.rows,
                self._branches,
                self._gates,
                shift,
                scale,
                embed=self.embed,
                eps=eps,
                out=None if out is None else out.view(*self.rows.shape),
            )
        self._branches, self._gates, self.embed = [], [], None
