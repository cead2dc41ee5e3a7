"""Self-attention over rows that several ranks hold: those it needs come before it, and its outputs go back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Exchanges(Protocol):
    """What moves rows between ranks: `distributed.exchange.Exchange`."""

    def buffer(
        self, name: str, shape: Sequence[int], largest: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor | None:
        """Where to compute what is to be exchanged; None where that is anywhere."""

    def __call__(
        self, x: Tensor, split: int, join: int, splits: Sequence[int], joins: Sequence[int], *, dense: bool = False
    ) -> Tensor:
        """Part r of x along `split` goes to rank r; what comes is joined along `join`, contiguous where `dense`."""


def near_even(total: int, parts: int) -> tuple[int, ...]:
    """`total` in so many near even parts, the larger ones first: 15 in 2 are 8 and 7."""
    return tuple(total // parts + (part < total % parts) for part in range(parts))


@dataclass(frozen=True)
class Shards:
    """How ranks share a stream [B, T, S, C]: rank r has `sizes[r]` of its frames, or of its tokens where T is 1.

    `rank` is this one. It computes on a stream of its own frames or tokens alone.
    """

    sizes: tuple[int, ...]
    rank: int
    exchange: Exchanges

    def rows(self, own: int) -> tuple[int, ...]:
        """The rows of a sequence that each rank has, where this one has `own`."""
        return tuple(size * (own // self.sizes[self.rank]) for size in self.sizes)

    def span(self, own: int) -> slice:
        """Which of all rows are this rank's `own`."""
        rows = self.rows(own)
        start = sum(rows[: self.rank])
        return slice(start, start + own)

    def buffer(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor | None:
        """Where to compute what has `shape` [B, rows, ...] here, in dtype and on the device of `like`."""
        largest = torch.Size(shape).numel() // self.sizes[self.rank] * max(self.sizes)
        return self.exchange.buffer(name, shape, largest, like.dtype, like.device)

    def around(self, qkv: Tensor, split: int, width: int, attend: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        """Attention on all rows, for a part of the dimension `split`, which is attended to apart: tokens or heads.

        Parameters
        ----------
        qkv : Tensor
            [B, own rows, ...].
        split : int
        width : int
            Numbers of output for each of `split`.
        attend : callable
            From [B, all rows, ...] with this rank's part of `split` to [B, all rows, the same part, width]; the second
            argument is where to put that, None for anywhere, and may be left.

        Returns
        -------
        Tensor
            [B, own rows, all of `split`, width].

        Raises
        ------
        ValueError
            `split` is smaller than the number of ranks.
        """
        rows, parts = self.rows(qkv.shape[1]), near_even(qkv.shape[split], len(self.sizes))
        if min(parts) < 1:
            what = "heads" if split > 2 else "tokens of a frame"
            raise ValueError(f"frames: {qkv.shape[split]} {what} cannot be split over {len(parts)} ranks")
        shape, largest = [len(qkv), sum(rows), parts[self.rank], width], len(qkv) * sum(rows) * max(parts) * width
        place = self.exchange.buffer("attended", shape, largest, qkv.dtype, qkv.device)
        y = attend(self.exchange(qkv, split, 1, parts, rows), place)
        return self.exchange(y, 1, 2, rows, parts, dense=True)

    def sent(self, rows: int, part: int, width: int) -> tuple[int, int]:
        """Elements of a sequence that `around` sends to other ranks before and after attention.

        `rows` are this rank's, `part` is the whole of what is split, each with `width` numbers of output; three times
        as many are queries, keys and values.
        """
        own = near_even(part, len(self.sizes))[self.rank]
        others = sum(self.rows(rows)) - rows
        return 3 * rows * (part - own) * width, others * own * width
