"""Blocks that no family has, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pab_kernels.blocks.block import Block, Branch, Norm
from pab_kernels.blocks.branches import CrossAttention, ImageKV, Mlp
from pab_kernels.blocks.linears import Linear
from pab_kernels.blocks.self_attention import SelfAttention

HEADS = 2


class Draw:
    """Random weights of one dtype and device; float32 where a test says so."""

    def __init__(self, channels: int = 16, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        torch.manual_seed(channels)
        self.c, self.dtype, self.device = channels, dtype, device

    def tensor(self, *shape: int, wide: bool = False, by: float = 0.3) -> Tensor:
        return (torch.randn(shape) * by).to(self.device, torch.float32 if wide else self.dtype)

    def linear(self, features: int, channels: int | None = None) -> Linear:
        channels = channels or self.c
        return Linear(self.tensor(features, channels, by=channels**-0.5), self.tensor(features))

    def attention(self, sequence: Any = "spatial", **options: Any) -> SelfAttention:
        return SelfAttention(self.linear(3 * self.c), self.linear(self.c), HEADS, sequence, **options)

    def cross(self, **options: Any) -> CrossAttention:
        return CrossAttention(self.linear(self.c), self.linear(2 * self.c), self.linear(self.c), HEADS, **options)

    def mlp(self, hidden: int = 32) -> Mlp:
        return Mlp(self.linear(hidden), self.linear(self.c, hidden))

    def norm(self, kind: Any = "layer", *, weight: bool = False, bias: bool = False) -> Norm:
        return Norm(
            kind,
            1e-5,
            1 + self.tensor(self.c) if weight else None,
            self.tensor(self.c) if bias else None,
        )


def six_branches(d: Draw) -> list[Block]:
    """Two more kinds of attention and MLP in a block than any family has, and two branches of one kind."""
    norm = d.norm()
    branches = (
        Branch("spatial", d.attention("spatial"), norm, 0, 1, 2),
        Branch("temporal", d.attention("temporal"), norm, 3, 4, 5),
        Branch("cross", d.cross()),
        Branch("cross", d.cross(), norm, gate=5),
        Branch("mlp_spatial", d.mlp(), norm, 6, 7, 8),
        Branch("mlp_temporal", d.mlp(48), norm, 0, 1, 8),
    )
    return [Block("spatial", i, branches, d.tensor(9, d.c)) for i in range(2)]


def no_norm(d: Draw) -> list[Block]:
    branches = (
        Branch("spatial", d.attention("full"), gate=0),
        Branch("mlp_spatial", d.mlp()),
        Branch("cross", d.cross()),
    )
    return [Block("spatial", i, branches, d.tensor(1, d.c)) for i in range(2)]


def affine(d: Draw) -> list[Block]:
    """Affine norms with and without modulation, RMSNorm and LayerNorm, weight alone, bias alone, both."""
    branches = (
        Branch("spatial", d.attention(), d.norm("rms", weight=True), 0, 1, 2),
        Branch("temporal", d.attention("temporal"), d.norm("rms", weight=True)),
        Branch("cross", d.cross(), d.norm("layer", weight=True, bias=True)),
        Branch("mlp_spatial", d.mlp(), d.norm("layer", weight=True, bias=True), 3, 4, 5),
        Branch("mlp_temporal", d.mlp(), d.norm("layer", bias=True), scale=4),
    )
    return [Block("spatial", i, branches, d.tensor(6, d.c)) for i in range(2)]


def parts_of_modulation(d: Draw) -> list[Block]:
    """Gate without shift, shift without scale, scale without shift, a plain norm alone."""
    branches = (
        Branch("spatial", d.attention(), d.norm("rms"), gate=0),
        Branch("temporal", d.attention("temporal"), d.norm("rms"), shift=1),
        Branch("cross", d.cross(), d.norm(), scale=2, gate=0),
        Branch("mlp_spatial", d.mlp(), d.norm()),
    )
    return [Block("spatial", i, branches, d.tensor(3, d.c)) for i in range(2)]


def constants(d: Draw) -> list[Block]:
    """Shift, scale and gate that no timestep changes, beside some that it does."""
    branches = (
        Branch("spatial", d.attention(), d.norm(), d.tensor(d.c), d.tensor(d.c), d.tensor(d.c)),
        Branch("cross", d.cross(), d.norm("rms"), scale=d.tensor(d.c), gate=0),
        Branch("mlp_spatial", d.mlp(), d.norm(weight=True), d.tensor(d.c), 0, d.tensor(d.c), regate=True),
    )
    return [Block("spatial", 0, branches, d.tensor(1, d.c)), Block("spatial", 1, branches[:2], d.tensor(1, d.c))]


def no_modulation(d: Draw) -> list[Block]:
    branches = (
        Branch("spatial", d.attention(), d.norm("layer", weight=True, bias=True)),
        Branch("mlp_spatial", d.mlp(), d.norm()),
    )
    return [Block("spatial", i, branches) for i in range(2)]


def linears(d: Draw) -> list[Block]:
    """Modulation from a linear of each block, of different sizes, beside a block with a table."""
    first = (Branch("spatial", d.attention(), d.norm(), 0, 1, 2), Branch("mlp_spatial", d.mlp(), d.norm(), 3, 4, 5))
    return [
        Block("spatial", 0, first, d.linear(6 * d.c, 8)),
        Block("spatial", 1, (Branch("spatial", d.attention("full"), d.norm(), 0, 1, 2),), d.linear(3 * d.c, 8)),
        Block("spatial", 2, first[1:], d.tensor(6, d.c)),
    ]


def regated(d: Draw) -> list[Block]:
    """One branch is gated anew when it is broadcast, the other is not."""
    branches = (
        Branch("spatial", d.attention(), d.norm(), 0, 1, 2, regate=True),
        Branch("mlp_spatial", d.mlp(), d.norm(), 3, 4, 5),
    )
    return [Block("spatial", i, branches, d.tensor(6, d.c)) for i in range(2)]


def picture(d: Draw) -> list[Block]:
    """Queries and keys normed across heads, a second pair of keys and values, rotation."""
    wide = [1 + d.tensor(d.c) for _ in range(5)]
    text = d.cross(q_norm=wide[0], k_norm=wide[1], norm_eps=1e-5, image=ImageKV(d.linear(2 * d.c), wide[2]))
    full = d.attention("full", q_norm=wide[3], k_norm=wide[4], norm_eps=1e-5, rotary=True)
    branches = (
        Branch("spatial", full, d.norm(), 0, 1, 2, regate=True),
        Branch("cross", text, d.norm(weight=True, bias=True)),
        Branch("mlp_spatial", d.mlp(), d.norm(), 3, 4, 5),
    )
    return [Block("spatial", i, branches, d.tensor(6, d.c, wide=True)) for i in range(2)]


def few_rows(d: Draw) -> list[Block]:
    """For wide streams: no attention weights, which would be large."""
    branches = (
        Branch("mlp_spatial", d.mlp(8), d.norm("rms", weight=True), 0, 1, 2),
        Branch("mlp_spatial", d.mlp(8), d.norm("layer"), 3, 4, 5),
    )
    return [Block("spatial", i, branches, d.tensor(6, d.c)) for i in range(2)]


BLOCKS: dict[str, Callable[[Draw], list[Block]]] = {
    build.__name__: build
    for build in (
        six_branches, no_norm, affine, parts_of_modulation, constants, no_modulation, linears, regated, picture,
    )
}  # fmt: skip
