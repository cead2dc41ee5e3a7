"""Self-attention over rows that several ranks hold: those it needs come before it, and its outputs go back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

PIECE = 8 * 2**20
"""Least elements of queries, keys and values that are worth an exchange of their own, beside other work."""
Piece = tuple[slice, slice]
"""Some sequences of the batch, and some of the rows that this rank has of them, or its part of what is split."""


class Along(NamedTuple):
    """Parts of a dimension, one a rank: from `starts` on so many as `sizes` say."""

    dim: int
    sizes: tuple[int, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, dim: int, sizes: Sequence[int]) -> Along:
        """One part after the other."""
        return cls(dim, tuple(sizes), (0, *accumulate(sizes[:-1])))

    def divided(self, count: int) -> list[Along]:
        """Every part in so many near even ones: the first of each rank, the second of each, ..."""
        each = [Along.of(self.dim, near_even(size, count)) for size in self.sizes]
        return [
            Along(
                self.dim,
                tuple(own.sizes[i] for own in each),
                tuple(start + own.starts[i] for start, own in zip(self.starts, each, strict=True)),
            )
            for i in range(count)
        ]

    def span(self, rank: int) -> slice:
        """The part of a rank."""
        return slice(self.starts[rank], self.starts[rank] + self.sizes[rank])


class Exchanges(Protocol):
    """What moves rows between ranks: `distributed.exchange.Exchange`."""

    apart: bool
    """Whether rows should move in pieces, one beside the computation of the next."""

    def buffer(self, name: str, shape: Sequence[int], take: Along, like: Tensor) -> Tensor | None:
        """Where to compute what `begin` is to move; None where that is anywhere."""

    def begin(
        self, name: str, x: Tensor, give: Along, take: Along, out: Tensor | None = None, *, dense: bool = False
    ) -> Callable[[], Tensor]:
        """Begin to move rows; the result waits for them, and returns them."""


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

    def largest(self, x: Tensor) -> Callable[[], Tensor]:
        """Of each number of x the largest of all ranks: begins to fetch theirs; the result waits for them.

        It is to be called once. Between two of these some rank's rows must have been waited for, as `around` does:
        till then others may still read what the first one gave.
        """
        ranks = len(self.sizes)
        each = x.expand(ranks, 1, *x.shape)
        come = self.exchange.begin("largest", each, Along.of(0, (1,) * ranks), Along.of(1, (1,) * ranks))
        return lambda: come()[0].amax(0)

    def _pieces(self, batch: int, rows: Sequence[int], numbers: int) -> tuple[list[slice], list[Along]]:
        """The batch in parts, and the rows of all ranks in parts: of each of both a piece that moves by itself.

        `numbers` are those of a row. Two pieces, where there are as many sequences or rows, and each is large enough;
        the same on all ranks.
        """
        large = self.exchange.apart and batch * max(rows) * numbers >= 2 * PIECE
        groups = 2 if large and batch > 1 else 1
        count = 2 if large and batch == 1 and min(rows) > 1 else 1
        sequences = Along.of(0, near_even(batch, groups))
        return [sequences.span(i) for i in range(groups)], Along.of(1, rows).divided(count)

    def around(
        self,
        shape: Sequence[int],
        split: int,
        width: int,
        like: Tensor,
        dtype: torch.dtype,
        project: Callable[[Piece, Tensor | None], Tensor],
        attend: Callable[[Piece, Tensor, Tensor | None], Tensor],
        finish: Callable[[Piece, Tensor], object],
    ) -> None:
        """Attention on all rows, for a part of the dimension `split`, which is attended to apart: tokens or heads.

        Some sequences move while others are computed, or of one sequence some rows.

        Parameters
        ----------
        shape : sequence of int
            Of queries, keys and values: [B, own rows, ...].
        split : int
        width : int
            Numbers of output for each of `split`.
        like : Tensor
            Of the dtype of queries, keys and values, on their device.
        dtype : torch.dtype
            Of what attention gives.
        project : callable
            From a piece, some of B and of the rank's rows, to its queries, keys and values, as `shape`; the second
            argument is where to put them, None for anywhere.
        attend : callable
            From a piece, some of B and this rank's part of `split`, and its [some of B, all rows, ...] to [the same,
            all rows, that part, width]; the last argument is where to put that, None for anywhere, and may be left.
        finish : callable
            Takes a piece and what attention gave for it: [some of B, some rows, all of `split`, width], contiguous.

        Raises
        ------
        ValueError
            `split` is smaller than the number of ranks.
        """
        batch, own, *rest = shape
        rows, parts = self.rows(own), near_even(shape[split], len(self.sizes))
        if min(parts) < 1:
            what = "heads" if split > 2 else "tokens of a frame"
            most = f"must be at most {shape[split]}"
            raise ValueError(f"frames: {shape[split]} {what} cannot be split over {len(parts)} ranks, {most}")
        first, buffer, begin = sum(rows[: self.rank]), self.exchange.buffer, self.exchange.begin
        groups, pieces = self._pieces(batch, rows, math.prod(rest))
        before, after = Along.of(split, parts), Along.of(2, parts)
        given = like.new_empty(0, dtype=dtype)
        own_rows = [slice(each.start - first, each.stop - first) for each in (p.span(self.rank) for p in pieces)]
        coming: list[list[Callable[[], Tensor]]] = []
        for group, sequences in enumerate(groups):
            count = sequences.stop - sequences.start
            all_rows = None
            if len(pieces) > 1:
                all_rows = like.new_empty(
                    count, sum(rows), *(parts[self.rank] if i == split else n for i, n in enumerate(rest, 2))
                )
            waits = []
            for i, piece in enumerate(pieces):
                name = f"qkv {group} {i}"
                place = buffer(name, (count, piece.sizes[self.rank], *rest), piece, like)
                waits.append(begin(name, project((sequences, own_rows[i]), place), before, piece, all_rows))
            coming.append(waits)
        back = []
        for group, (sequences, waits) in enumerate(zip(groups, coming, strict=True)):
            qkv = [wait() for wait in waits][-1]
            name, there = f"attended {group}", (len(qkv), sum(rows), parts[self.rank], width)
            y = attend((sequences, before.span(self.rank)), qkv, buffer(name, there, after, given))
            back += [
                ((sequences, own), begin(name, y, piece, after, dense=True))
                for own, piece in zip(own_rows, pieces, strict=True)
            ]
        for piece_of, wait in back:
            finish(piece_of, wait())

    def sent(self, batch: int, rows: int, part: int, width: int, qkv_bytes: int, out_bytes: int) -> tuple[int, ...]:
        """Bytes that `around` sends to other ranks, of each exchange.

        `rows` are this rank's, `part` is the whole of what is split, each with `width` numbers of output of `out_bytes`
        each; three times as many, of `qkv_bytes`, are queries, keys and values.
        """
        own = near_even(part, len(self.sizes))[self.rank]
        groups, pieces = self._pieces(batch, self.rows(rows), 3 * part * width)
        counts = [group.stop - group.start for group in groups]
        there = [3 * count * p.sizes[self.rank] * (part - own) * width for count in counts for p in pieces]
        others = [sum(p.sizes) - p.sizes[self.rank] for p in pieces]
        back = [count * number * own * width for count in counts for number in others]
        return *(qkv_bytes * each for each in there), *(out_bytes * each for each in back)
