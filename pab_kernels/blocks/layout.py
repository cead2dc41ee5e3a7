"""How the rows of the residual stream lie, and which row of the modulation each of them takes."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Tokens of one sort, T times S of them in each sequence: the video's, or in joint models the text's (T is 1)."""

    name: str
    frames: int
    tokens: int

    @property
    def rows(self) -> int:
        """Rows of the stream, of each sequence."""
        return self.frames * self.tokens


@dataclass(frozen=True)
class Layout:
    """The residual stream of a call.

    A model whose stream is the video alone has one segment, [B, T, S, C]. In a joint model the sequences hold several,
    one after the other, and the stream is [B, 1, N, C]: every pass, GEMM and slot works on all rows alike, and what
    differs between segments is the modulation row that their rows take, and the weights of a branch that keeps some
    for each (see docs/adding-a-family.md).

    Parameters
    ----------
    batch : int
        Sequences B.
    segments : tuple of Segment
        In the order in which they lie in a sequence.
    channels : int
        C.
    modulations : int
        Rows G of the modulation. Without an index the rows of the stream, in order, are G groups of the same size, and
        group g takes row g: G is B, or B * T where each frame has its own.
    indexed : bool
        Each row of the stream names its modulation row instead: the call brings ``modulation_index`` among its tensors,
        int32 [B, N]. So a timestep a token costs 4 bytes a row, however many blocks there are.

    Raises
    ------
    ValueError
        The rows are not a multiple of the groups.
    """

    batch: int
    segments: tuple[Segment, ...]
    channels: int
    modulations: int
    indexed: bool = False

    def __post_init__(self) -> None:
        if self.modulations < 1 or (not self.indexed and self.rows % self.modulations):
            raise ValueError(f"modulations: got {self.modulations}, must divide the {self.rows} rows of the stream")

    @classmethod
    def video(
        cls, shape: tuple[int, int, int, int], modulations: int | None = None, *, indexed: bool = False
    ) -> Layout:
        """Of a stream [B, T, S, C] that is a video alone; B modulation rows unless said otherwise."""
        batch, frames, tokens, channels = shape
        rows = batch if modulations is None else modulations
        return cls(batch, (Segment("video", frames, tokens),), channels, rows, indexed)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, T, S, C) of the stream, and of every slot; T is 1 where there are several segments."""
        if len(self.segments) == 1:
            return self.batch, self.segments[0].frames, self.segments[0].tokens, self.channels
        return self.batch, 1, sum(segment.rows for segment in self.segments), self.channels

    @property
    def rows(self) -> int:
        """All rows of the stream, B * N."""
        return math.prod(self.shape[:3])

    @property
    def groups(self) -> int:
        """In how many groups of the same size the passes take the rows: a modulation row each, or with an index B."""
        return self.batch if self.indexed else self.modulations
