"""The residual stream, with the branch outputs not added yet, so that each addition rides on the next pass.

The pass itself, between two GEMMs, is `ops.residual_norm_modulate`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pab_kernels import ops
from pab_kernels.blocks.block import Norm
from pab_kernels.blocks.linears import Rows
from pab_kernels.ops.fp8_linear import E4M3
from pab_kernels.ops.quantized import Quantized
from pab_kernels.runtime.plan import Traffic
from pab_kernels.runtime.slots import SlotKey, SlotStore


class Stream:
    """One step's residual stream.

    Parameters
    ----------
    x : Tensor
        [B, T, S, C], contiguous; used up.
    groups : int
        G of the passes, which take x as [G, N, C].
    index : Tensor, optional
        int32, one a row of x: which modulation row it takes. None: row g for group g.
    slots : SlotStore
    traffic : Traffic
        What the step reads and writes: the slots' sequences that are x's.

    Attributes
    ----------
    embed : Tensor or None
        [P, C], to be added by the next pass.
    """

    def __init__(self, x: Tensor, groups: int, index: Tensor | None, slots: SlotStore, traffic: Traffic) -> None:
        self.x = x
        self.embed: Tensor | None = None
        self._rows = x.view(groups, -1, x.shape[-1])
        self._index = None if index is None else index.view(self._rows.shape[:2])
        self._slots = slots
        self._writes = traffic.writes
        self._updates = traffic.updates
        self._before: Tensor | None = None
        """The stream as it came to the blocks of the stack."""
        self._save: SlotKey | None = None
        """The slot that the next pass writes, since the first pending branch was not computed into it."""
        self._old: Rows | None = None
        """What that slot holds, where its change is kept."""
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
        if key not in self._writes or self._copied(key):
            return self._scratch
        slot = self._slots.out(key)
        assert isinstance(slot, Tensor)
        return slot

    def computed(self, key: SlotKey, branch: Tensor, gate: Tensor | None) -> None:
        """Add a branch that was computed into `out`. It follows a pass, so nothing else is pending."""
        if key in self._writes:
            if self._copied(key):
                self._take_old(key)
            else:
                self._slots.wrote(key)
        self._add(branch, gate)

    def _copied(self, key: SlotKey) -> bool:
        """Whether a slot is written by the pass that adds its branch, and not by the branch."""
        return self._slots.layout.quantized or key in self._updates

    def broadcast(self, key: SlotKey, gate: Tensor | None, change_gate: Tensor | None = None) -> None:
        """Add what a slot holds, and its change where that has a gate."""
        slots = [(key, gate)] if change_gate is None else [(key, gate), (key.changed, change_gate)]
        if len(self._branches) + len(slots) > ops.MAX_BRANCHES:
            self.read(None)
        for slot, vector in slots:
            self._add(self._slots.read(slot), vector)

    def enter_stack(self) -> None:
        """The blocks begin whose sum is to be kept."""
        self.read(None)
        self._before = self.x.clone()

    def leave_stack(self, key: SlotKey) -> None:
        """They end: write what they added to the slot `key`."""
        assert self._before is not None
        self.read(None)
        added = self.x - self._before
        # A pass writes slots of all sorts; what it adds up here is nobody's.
        self._take_old(key)
        self._pass(self._before.view(*self._rows.shape), [added.view(*self._rows.shape)], [None])
        self._before = None

    def _take_old(self, key: SlotKey) -> None:
        """The next pass writes this slot. What it holds is asked for now: slots are read in order."""
        self._save = key
        self._old = self._slots.read(key) if key in self._updates else None

    def _add(self, branch: Rows, gate: Tensor | None) -> None:
        self._branches.append(branch.view(*self._rows.shape))
        self._gates.append(gate)

    def read(
        self, norm: Norm | None, shift: Tensor | None = None, scale: Tensor | None = None, *, fp8: bool = False
    ) -> Rows:
        """Add what is pending; the stream [B, T, S, C] itself, or normed and modulated. With `fp8` in e4m3."""
        out: Rows | None = self._quantized if fp8 else None if norm is None else self._modulated
        if self._branches or self.embed is not None or out is not None:
            self._pass(
                self._rows,
                self._branches,
                self._gates,
                shift=shift,
                scale=scale,
                embed=self.embed,
                norm=None if norm is None else norm.kind,
                index=self._index,
                eps=0.0 if norm is None else norm.eps,
                out=None if out is None else out.view(*self._rows.shape),
            )
        self._branches, self._gates, self.embed = [], [], None
        return self.x if out is None else out

    def _pass(self, rows: Tensor, branches: list[Rows], gates: list[Tensor | None], **options: Any) -> None:
        """One pass, which also writes the first branch to the slot that is to be saved, and its change."""
        targets: dict[str, Rows] = {}
        if self._save is not None and self._old is not None:
            targets = {"saved": self._old, "change": self._slots.out(self._save.changed)}
        elif self._save is not None:
            targets = {"saved": self._slots.out(self._save)}
        options |= {name: target.view(*self._rows.shape) for name, target in targets.items()}
        ops.residual_norm_modulate(rows, branches, gates, **options)
        if self._save is not None:
            for key in (self._save, self._save.changed)[: len(targets)]:
                self._slots.wrote(key)
        self._save = self._old = None
        self._slots.release()
