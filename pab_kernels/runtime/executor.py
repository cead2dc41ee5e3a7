"""Runs the blocks of one denoising call for one `StepVariant`, with the fused ops."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from pab_kernels import ops
from pab_kernels.blocks.branches import (
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
from pab_kernels.config import KINDS, PABConfig
from pab_kernels.ops.fp8_linear import E4M3
from pab_kernels.ops.quantized import DTYPES, Quantized
from pab_kernels.runtime.cache import BroadcastCache
from pab_kernels.runtime.slots import SlotKey, SlotStore
from pab_kernels.schedule import Schedule, StepVariant


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
        """The slots that `config` can ever broadcast, in the order in which a step comes to them."""
        keys = []
        for position, block in enumerate(self.blocks):
            if block.index in config.blocks(block.kind):
                keys.append(SlotKey(block.kind, position))
            if block.cross is not None and block.index in config.blocks("cross"):
                keys.append(SlotKey("cross", position))
            if block.index in config.mlp_blocks(block.kind):
                keys.append(SlotKey("mlp", position))
        return tuple(keys)

    def storage(self, schedule: Schedule) -> dict[SlotKey, int]:
        """The slots of a run, and for each the number of the tensor that it lies in.

        An attention slot has a tensor of its own, since it is written by every call that computes it. MLP slots that
        are never alive at the same call share one: as soon as a window has ended, its memory serves the blocks of the
        next. Nothing is freed within a run, since graphs know the slots by their addresses, and the peak was before.
        """
        storage: dict[SlotKey, int] = {}
        in_use: list[set[int]] = []  # for each tensor, the calls at which one of its slots is alive
        for key in self.slot_keys(schedule.config):
            block = self.blocks[key.position]
            alive = schedule.mlp_alive(block.kind, block.index) if key.branch == "mlp" else range(len(schedule))
            if not alive:
                continue  # an MLP that this run never broadcasts
            number = next((i for i, calls in enumerate(in_use) if calls.isdisjoint(alive)), len(in_use))
            if number == len(in_use):
                in_use.append(set())
            in_use[number].update(alive)
            storage[key] = number
        return storage


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
    schedule : Schedule
        Of the first run; others may follow that need the same slots.
    shape : (B, T, S, C)
        Of the residual stream, and so of every slot.
    groups : int
        Rows G of the modulation, B or B * T.
    cache_device : torch.device
        Where the slots lie; see `BroadcastCache`.

    Raises
    ------
    torch.cuda.OutOfMemoryError, MemoryError
        The slots do not fit; see `BroadcastCache`.
    """

    def __init__(
        self,
        stack: BlockStack,
        schedule: Schedule,
        shape: tuple[int, int, int, int],
        groups: int,
        cache_device: torch.device,
    ) -> None:
        self.stack = stack
        self.shape = shape
        self.groups = groups
        table = stack.blocks[0].table
        storage = stack.storage(schedule)
        name = schedule.config.cache_dtype
        small = None if name is None else DTYPES[name]
        self.cache = BroadcastCache(storage, shape, groups, table.dtype, table.device, cache_device, small)
        self.tables = torch.stack([block.table for block in stack.blocks])  # [blocks, 6, C]
        self._traffic: dict[StepVariant, Traffic] = {}

    def refresh(self) -> None:
        """Copy anew what was copied from weights, in place: graphs know where it lies."""
        torch.stack([block.table for block in self.stack.blocks], out=self.tables)

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
        traffic, cache = self.traffic(variant), self.cache
        tables = self.tables[:, None] + modulation  # [blocks, G, 6, C]
        for kind, gates in cache.gates.items():
            if kind != "mlp" and not getattr(variant, kind):
                # All blocks of a kind write their slots on the same steps, so their gates are kept in one launch.
                torch.index_select(tables[:, :, 2], 0, cache.positions[kind], out=gates)
        stream = Stream(x, modulation.shape[0], cache.slots, traffic)
        with cache.slots.step(traffic.reads):
            for position, block in enumerate(self.stack.blocks):
                shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = tables[position].unbind(1)
                if position == self.stack.embed_before:
                    stream.embed = embed

                key = SlotKey(block.kind, position)
                if key in traffic.reads:
                    stream.broadcast(key, gate if self.stack.regate else cache.gate(key))
                else:
                    fp8 = isinstance(block.attention.qkv, Fp8Linear)
                    h = stream.norm_modulate(shift, scale, block.norm_eps, fp8=fp8)
                    stream.computed(key, self_attention(h, block.attention, stream.out(key), rope), gate)

                if block.cross is not None:
                    key = SlotKey("cross", position)
                    if key in traffic.reads:
                        stream.broadcast(key, None)
                    else:
                        kv = text[position]
                        assert kv is not None
                        h = stream.flush(fp8=isinstance(block.cross.q, Fp8Linear))
                        stream.computed(key, cross_attention(h, block.cross, kv, stream.out(key)), None)

                key = SlotKey("mlp", position)
                if key in traffic.reads:
                    stream.broadcast(key, cache.gate(key))
                else:
                    fp8 = isinstance(block.mlp.up, Fp8Linear)
                    h = stream.norm_modulate(mlp_shift, mlp_scale, block.norm_eps, fp8=fp8)
                    stream.computed(key, mlp(h, block.mlp, stream.out(key)), mlp_gate)
                    kept = cache.gate(key)
                    if kept is not None and key in traffic.writes:
                        kept.copy_(mlp_gate)
            h = stream.norm_modulate(*final, final_eps)
            assert isinstance(h, Tensor)
            return h


class Stream:
    """The residual stream with the branch outputs not added yet, so that each addition rides on the next pass."""

    def __init__(self, x: Tensor, groups: int, slots: SlotStore, traffic: Traffic) -> None:
        self.x = x
        self.rows = x.view(groups, -1, x.shape[-1])
        self.embed: Tensor | None = None
        self._slots = slots
        self._writes = traffic.writes
        self._save: SlotKey | None = None
        """The slot of one byte an element that the next pass writes: a copy of the first pending branch."""
        self._branches: list[Rows] = []
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

    def out(self, key: SlotKey) -> Tensor:
        """Where a branch is computed: its slot, or one tensor for all, since each follows a pass that used it."""
        if key not in self._writes or self._slots.layout.quantized:
            return self._scratch
        slot = self._slots.out(key)
        assert isinstance(slot, Tensor)
        return slot

    def computed(self, key: SlotKey, branch: Tensor, gate: Tensor | None) -> None:
        """Add a branch that was computed into `out`. It follows a pass, so nothing else is pending."""
        if key in self._writes:
            if self._slots.layout.quantized:
                self._save = key
            else:
                self._slots.wrote(key)
        self._add(branch, gate)

    def broadcast(self, key: SlotKey, gate: Tensor | None) -> None:
        """Add what a slot holds."""
        if len(self._branches) == ops.MAX_BRANCHES:
            self.flush()
        self._add(self._slots.read(key), gate)

    def _add(self, branch: Rows, gate: Tensor | None) -> None:
        self._branches.append(branch.view(*self.rows.shape))
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
            saved = None if self._save is None else self._slots.out(self._save)
            assert not isinstance(saved, Tensor)
            ops.residual_norm_modulate(
                self.rows,
                self._branches,
                self._gates,
                shift,
                scale,
                embed=self.embed,
                eps=eps,
                out=None if out is None else out.view(*self.rows.shape),
                saved=None if saved is None else saved.view(*self.rows.shape),
            )
            if self._save is not None:
                self._slots.wrote(self._save)
                self._save = None
            self._slots.release()
        self._branches, self._gates, self.embed = [], [], None
