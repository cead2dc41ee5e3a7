"""What one rank of a mesh runs of a call, and how its prediction becomes all of it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pab_kernels.blocks.block import BlockStack
from pab_kernels.blocks.layout import Layout, Segment
from pab_kernels.blocks.sharded import Shards, near_even
from pab_kernels.distributed.exchange import Exchange
from pab_kernels.distributed.mesh import Ranks
from pab_kernels.models.adapter import Call
from pab_kernels.runtime.forecast import whole_run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """A rank's share of a call: a half of its batch, and some of its frames (or tokens); all, without a mesh.

    Attributes
    ----------
    layout : Layout
        Of the rank's residual stream.
    halves : tuple of int
        Of guidance, in the rank's batch.
    batch : slice or None
        Its sequences of the call's, None for all.
    shards : Shards or None
        How frames are split, None where they are not.
    """

    whole: Layout
    layout: Layout
    halves: tuple[int, ...]
    batch: slice | None = None
    shards: Shards | None = None
    split: Mapping[str, int] = dataclasses.field(default_factory=dict)
    guidance: Exchange | None = None
    frames: Exchange | None = None

    @classmethod
    def of(
        cls, call: Call, stack: BlockStack, halves: tuple[int, ...], ranks: Ranks | None, split: bool = True
    ) -> Share:
        """The share of the rank `ranks`.

        A batch that has no two halves, or may not be `split`, is run whole by the ranks of both, which do the same.

        Raises
        ------
        ValueError
            Frames cannot be split: there are fewer than ranks, or the model has branches that know nothing of ranks.
        """
        share = cls(call.layout, call.layout, halves)
        if ranks is None:
            return share
        if split and ranks.mesh.guidance > 1:
            if call.layout.batch % 2 == 0:
                share = share._half(ranks)
            else:
                log.info("a batch of %d has no two halves: the ranks of both do the same", call.layout.batch)
        return share._frames(call, stack, ranks) if ranks.mesh.frames > 1 else share

    def _half(self, ranks: Ranks) -> Share:
        whole, count = self.whole, self.whole.batch // 2
        halves = self.halves if len(self.halves) == 1 else (self.halves[ranks.guidance],)
        modulations = whole.modulations // (1 if whole.indexed else 2)
        return dataclasses.replace(
            self,
            layout=dataclasses.replace(whole, batch=count, modulations=modulations),
            halves=halves,
            batch=slice(ranks.guidance * count, (ranks.guidance + 1) * count),
            guidance=ranks.exchange("guidance"),
        )

    def _frames(self, call: Call, stack: BlockStack, ranks: Ranks) -> Share:
        layout, count = self.layout, ranks.mesh.frames
        if len(layout.segments) > 1 or not call.split:
            raise ValueError(f"mesh: frames={count} cannot split sequences of several segments, must be 1")
        exchange = ranks.exchange("frames")
        segment = layout.segments[0]
        total = segment.frames if call.split_frames else segment.tokens
        shards = Shards(near_even(total, count), ranks.frames, exchange)
        what = "latent frames" if call.split_frames else "tokens"
        if call.tensors["latents"].shape[call.split["latents"]] % total:
            raise ValueError(f"mesh: frames={count} cannot split {total} patches of latent frames of which one is cut")
        if min(shards.sizes) < 1:
            raise ValueError(f"mesh: frames={count} for {total} {what}, must be at most as many")
        own = shards.sizes[shards.rank]
        local = Segment(segment.name, own, segment.tokens) if call.split_frames else Segment(segment.name, 1, own)
        modulations = layout.modulations
        if not layout.indexed and modulations > layout.batch:
            modulations = modulations // segment.frames * own
        share = dataclasses.replace(
            self,
            layout=dataclasses.replace(layout, segments=(local,), modulations=modulations),
            shards=shards,
            split=call.split,
            frames=exchange,
        )
        for block in stack.blocks:
            for branch in block.branches:
                branch.weights.sent(share.layout.shape, shards, 1)  # or it says that it cannot
        return share

    @property
    def rows(self) -> int:
        """Rows of the stream on the rank that has most."""
        if self.shards is None:
            return self.layout.rows
        return self.layout.rows // self.shards.sizes[self.shards.rank] * max(self.shards.sizes)

    @property
    def idle(self) -> bool:
        """Whether this rank has nothing of the conditional half."""
        return 0 not in self.halves

    def own(self, name: str, value: Tensor) -> Tensor:
        """The rank's part of an input of the call."""
        if self.batch is not None and not whole_run(name, self.whole):
            value = value[self.batch]
        if self.shards is not None and name in self.split:
            dim = self.split[name]
            value = self._cut(value, dim)
        return value

    def _cut(self, value: Tensor, dim: int) -> Tensor:
        assert self.shards is not None
        own = value.shape[dim] * self.shards.sizes[self.shards.rank] // sum(self.shards.sizes)
        span = self.shards.span(own)
        return value.narrow(dim, span.start, own)

    def modulation(self, rows: Tensor) -> Tensor:
        """Of the modulation rows [G, ...] of the call those of the rank."""
        if self.whole.indexed or (self.batch is None and self.shards is None):
            return rows
        each = rows.unflatten(0, (self.whole.batch, -1))
        each = each if self.batch is None else each[self.batch]
        if self.shards is not None and each.shape[1] > 1:
            each = self._cut(each, 1)
        return each.flatten(0, 1)

    def frame_embed(self, embed: Tensor | None) -> Tensor | None:
        """Of the frames' embedding [T, C] that of the rank's."""
        return embed if embed is None or self.shards is None else self._cut(embed, 0)

    def text(self, call: Call) -> Call:
        """The call with the rank's text and pictures."""
        if self.batch is None:
            return call
        image = call.image
        if image is not None:
            image = image.unflatten(0, (self.whole.batch, -1))[self.batch].flatten(0, 1)
        mask = None if call.text_mask is None else call.text_mask[self.batch]
        return dataclasses.replace(call, text=call.text[self.batch], text_mask=mask, image=image)

    def gather(self, prediction: Tensor) -> Tensor:
        """The prediction of the whole call, from this rank's."""
        if self.shards is not None and self.frames is not None:
            dim = self.split["latents"]
            prediction = self.frames.gather(prediction, dim, self.shards.rows(prediction.shape[dim]))
        if self.guidance is not None:
            prediction = self.guidance.gather(prediction, 0, [len(prediction)] * self.guidance.size)
        return prediction
