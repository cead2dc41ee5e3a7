"""The description of a transformer that adapters fill in: a stack of blocks, each a tuple of branches."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pab_kernels.blocks.branches import Weights
from pab_kernels.blocks.linears import Fp8Linear, Linear
from pab_kernels.config import BRANCHES, KINDS

Vector = int | Tensor | None
"""Shift, scale or gate of a branch: which of the block's modulation vectors, a constant [C], or none."""


@dataclass(frozen=True)
class Norm:
    """LayerNorm or RMSNorm over the C channels of a row.

    `weight` and `bias` [C] make it affine. They are folded into shift and scale, in float32, before a pass sees them.
    """

    kind: Literal["layer", "rms"] = "layer"
    eps: float = 1e-6
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def affine(self) -> bool:
        """Whether it has weights of its own."""
        return self.weight is not None or self.bias is not None


@dataclass(frozen=True)
class Branch:
    """One residual contribution: ``x += gate * weights(norm(x) * (1 + scale) + shift)``.

    Parameters
    ----------
    kind : {"spatial", "temporal", "cross", "mlp_spatial", "mlp_temporal"}
        The settings that broadcast it, and so the name of its slot. Full attention over a video counts as spatial; an
        MLP goes with the attention of its block.
    weights : SelfAttention, CrossAttention, Mlp or other Weights
        What runs.
    norm : Norm, optional
        None reads the stream itself.
    shift, scale, gate : Vector
        An int is the number of a vector of the block's modulation; a tensor [C] a constant; None none.
    regate : bool
        Broadcast with the gate of the current call, instead of the gate of the call that wrote the slot.

    Raises
    ------
    ValueError
        An unknown kind, or shift or scale without a norm.
    """

    kind: str
    weights: Weights
    norm: Norm | None = None
    shift: Vector = None
    scale: Vector = None
    gate: Vector = None
    regate: bool = False

    def __post_init__(self) -> None:
        if self.kind not in BRANCHES:
            raise ValueError(f"kind: got {self.kind!r}, must be one of {', '.join(BRANCHES)}")
        if self.norm is None and (self.shift is not None or self.scale is not None):
            raise ValueError("shift, scale: given without a norm, must be None where the stream itself is read")


@dataclass(frozen=True)
class Block:
    """One DiT block: branches, run in order, and where their modulation comes from.

    Parameters
    ----------
    kind : str
        Names the block in settings of layers: ``{kind}.{index}.{layer}``, such as "spatial.0.qkv".
    index : int
        Counts the blocks of one kind; what ``{kind}_block`` and the timestep-keyed MLP settings are about.
    branches : tuple of Branch
    modulation : Tensor or Linear, optional
        A table [K, C] that is added to the timestep's K vectors (adaLN-single, arXiv:2310.00426), or a linear
        [K * C, E] of the timestep's embedding (adaLN-zero, arXiv:2212.09748). Its dtype may be float32 in a model of
        another one. All tables of a stack have the same K.
    """

    kind: str
    index: int
    branches: tuple[Branch, ...]
    modulation: Tensor | Linear | None = None

    def __post_init__(self) -> None:
        for branch in self.branches:
            for vector in (branch.shift, branch.scale, branch.gate):
                if isinstance(vector, int) and not 0 <= vector < self.vectors:
                    raise ValueError(f"{self.name}: a branch takes vector {vector}, must be one of {self.vectors}")

    @property
    def vectors(self) -> int:
        """How many vectors K its modulation has."""
        if self.modulation is None:
            return 0
        if isinstance(self.modulation, Tensor):
            return self.modulation.shape[0]
        return self.modulation.weight.shape[0] // self.branches[0].weights.linears[-1].weight.shape[0]

    @property
    def name(self) -> str:
        """Such as "spatial.0"."""
        return f"{self.kind}.{self.index}"


@dataclass(frozen=True)
class BlockStack:
    """What the executor runs: the blocks in order, and what is particular to a family.

    A temporal position embedding is added to the stream before the block at `embed_before`. `final` is the norm after
    the last block, modulated by the call's own shift and scale; it has no weights.
    """

    blocks: tuple[Block, ...]
    embed_before: int = -1
    final: Norm = Norm()

    def __post_init__(self) -> None:
        if self.final.affine:
            raise ValueError("final: is affine, must have neither weight nor bias")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of attention that these blocks have."""
        present = {branch.kind for block in self.blocks for branch in block.branches}
        return tuple(kind for kind in KINDS if kind in present)

    def without_temporal(self) -> BlockStack:
        """The blocks along space alone, and no position in time: images."""
        blocks = tuple(block for block in self.blocks if block.kind != "temporal")
        return dataclasses.replace(self, blocks=blocks, embed_before=-1)

    @property
    def _projection(self) -> Linear | Fp8Linear:
        return self.blocks[0].branches[0].weights.linears[-1]

    @property
    def channels(self) -> int:
        """C of the residual stream."""
        return self._projection.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream and the slots: that of the blocks' linears."""
        return self._projection.bias.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self._projection.bias.device


@dataclass(frozen=True)
class Modulation:
    """What the timestep says, for each of the G modulation rows of a call.

    `blocks` [G, K, C] is added to the blocks' tables; `embedding` [G, E] is what blocks with a modulation linear apply
    it to, activation included. `shift` and `scale` [G, C] are those of the final norm. Each in the dtype of the stream,
    or float32.
    """

    blocks: Tensor | None
    shift: Tensor
    scale: Tensor
    embedding: Tensor | None = None
