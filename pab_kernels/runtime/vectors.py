"""Shift, scale and gate of every branch of a step, computed together in a few launches."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pab_kernels.blocks.block import BlockStack, Branch, Modulation, Vector
from pab_kernels.blocks.linears import Linear, linear
from pab_kernels.ops.checks import check_shape, check_tensor

PARTS = ("table", "linear", "constant", "fold")

Ref = tuple[str, int]
"""A vector by its part of the bank and its place there."""


@dataclass(frozen=True)
class BranchVectors:
    """One branch's shift, scale and gate: their numbers in the bank, None where there is none."""

    shift: int | None
    scale: int | None
    gate: int | None


class VectorBank:
    """All vectors of a stack's branches, for the G modulation rows of a call.

    Its parts, in this order: vectors of the blocks' tables; of the blocks' linears; constants; and those that the
    weight w and bias b of an affine norm are folded into, since ``(norm * w + b) * (1 + scale) + shift`` is
    ``norm * (1 + scale') + shift'`` with ``scale' = w * (1 + scale) - 1`` and ``shift' = b * (1 + scale) + shift``.

    Parameters
    ----------
    stack : BlockStack
        Its tables, constants and norms are copied; `refresh` reads them again.
    rows : int
        G.

    Attributes
    ----------
    branches : list of BranchVectors
        One a branch, in the order in which a step comes to them.
    dtype : torch.dtype
        That of the blocks' linears; float32 where a table has it, or a norm has weights.

    Raises
    ------
    ValueError
        Tables of different shapes.
    """

    def __init__(self, stack: BlockStack, rows: int) -> None:
        self._rows, self._channels = rows, stack.channels
        self._tables = [block.modulation for block in stack.blocks if isinstance(block.modulation, Tensor)]
        if len({table.shape for table in self._tables}) > 1:
            shapes = sorted({tuple(table.shape) for table in self._tables})
            raise ValueError(f"modulation: the blocks' tables have the shapes {shapes}, must be all alike")
        self._linears: list[tuple[int, Linear]] = []
        """Each with the place of its first vector."""
        self._constants: list[Tensor] = []
        self._folds: list[tuple[Tensor, Ref, Ref]] = []
        """Weight or bias, its scale, and what is added to the product."""
        sizes = dict.fromkeys(PARTS, 0)
        refs: list[tuple[Ref | None, Ref | None, Ref | None]] = []
        for block in stack.blocks:
            part = "table"
            if isinstance(block.modulation, Linear):
                part = "linear"
                self._linears.append((sizes[part], block.modulation))
            refs += [self._refs(branch, (part, sizes[part])) for branch in block.branches]
            sizes[part] += block.vectors
        sizes |= {"constant": len(self._constants), "fold": len(self._folds)}
        *ends, self._size = accumulate(sizes.values())
        self._starts = dict(zip(PARTS, (0, *ends), strict=True))
        self.branches = [BranchVectors(*map(self._number, each)) for each in refs]

        self.dtype = torch.promote_types(stack.dtype, torch.float32) if self._folds else stack.dtype
        for table in self._tables:
            self.dtype = torch.promote_types(self.dtype, table.dtype)
        options: dict[str, Any] = {"dtype": self.dtype, "device": stack.device}
        vectors = len(self._tables[0]) if self._tables else 0
        self._table = torch.empty(len(self._tables), vectors, 1, self._channels, **options)
        self._constant = torch.empty(len(self._constants), 1, self._channels, **options)
        self._weight = torch.empty(len(self._folds), 1, self._channels, **options)
        numbers = [[self._number(scale), self._number(added)] for _, scale, added in self._folds]
        self._scale, self._added = torch.tensor(numbers, dtype=torch.int64, device=stack.device).view(-1, 2).unbind(1)
        self.refresh()

    def _refs(self, branch: Branch, source: Ref) -> tuple[Ref | None, Ref | None, Ref | None]:
        """Shift, scale and gate of a branch whose block's vectors begin at `source`."""
        shift, scale, gate = (self._ref(vector, source) for vector in (branch.shift, branch.scale, branch.gate))
        norm = branch.norm
        if norm is not None and norm.affine:
            before = scale or self._keep(torch.zeros(self._channels))
            if norm.weight is not None:
                scale = self._fold(norm.weight, before, self._keep(torch.full((self._channels,), -1.0)))
            if norm.bias is not None:
                shift = self._fold(norm.bias, before, shift or self._keep(torch.zeros(self._channels)))
        return shift, scale, gate

    def _ref(self, vector: Vector, source: Ref) -> Ref | None:
        if isinstance(vector, Tensor):
            return self._keep(vector)
        return None if vector is None else (source[0], source[1] + vector)

    def _keep(self, constant: Tensor) -> Ref:
        self._constants.append(constant)
        return "constant", len(self._constants) - 1

    def _fold(self, weight: Tensor, scale: Ref, added: Ref) -> Ref:
        self._folds.append((weight, scale, added))
        return "fold", len(self._folds) - 1

    def _number(self, ref: Ref | None) -> int | None:
        return None if ref is None else self._starts[ref[0]] + ref[1]

    def refresh(self) -> None:
        """Read the tables, constants and norms of the blocks again, into the memory that graphs know."""
        for copies, sources in (
            (self._table, self._tables),
            (self._constant, self._constants),
            (self._weight, [weight for weight, _, _ in self._folds]),
        ):
            for copy, source in zip(copies, sources, strict=True):
                copy.copy_(source.view(copy.shape))

    def compute(self, modulation: Modulation, rows: int | None = None) -> Tensor:
        """The bank [vectors, G, C] for a call, or for `rows` of its modulation rows.

        Raises
        ------
        TypeError, ValueError
            The modulation has no `blocks` or no `embedding` where there are tables or linears, or another shape.
        """
        rows = self._rows if rows is None else rows
        bank = torch.empty(self._size, rows, self._channels, dtype=self.dtype, device=self._constant.device)
        if self._tables:
            count, vectors = self._table.shape[:2]
            blocks = check_tensor("modulation.blocks", modulation.blocks)
            check_shape("modulation.blocks", blocks, (rows, vectors, self._channels))
            own = bank[: count * vectors].view(count, vectors, rows, self._channels)
            torch.add(self._table, blocks.transpose(0, 1), out=own)
        for first, weights in self._linears:
            embedding = check_tensor("modulation.embedding", modulation.embedding)
            found = linear(embedding, weights).view(rows, -1, self._channels).transpose(0, 1)
            begin = self._starts["linear"] + first
            bank[begin : begin + len(found)].copy_(found)
        if self._constants:
            bank[self._starts["constant"] : self._starts["fold"]].copy_(self._constant)
        if self._folds:
            torch.addcmul(bank[self._added], self._weight, 1 + bank[self._scale], out=bank[self._starts["fold"] :])
        return bank
