"""Runs the blocks of one denoising call for one `StepVariant`, with the fused ops: one loop over branches.

Whether that happens now or when a graph is replayed is the business of `workspace` and `graphs`.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import groupby

import torch
from torch import Tensor

from pab_kernels.blocks.block import BlockStack, Modulation
from pab_kernels.blocks.branches import CrossAttention, Inputs, Rope, TextKV, text_kv
from pab_kernels.blocks.layout import Layout
from pab_kernels.blocks.linears import Fp8Linear
from pab_kernels.blocks.sharded import Shards
from pab_kernels.ops.quantized import DTYPES
from pab_kernels.runtime.cache import BroadcastCache, SlotPool
from pab_kernels.runtime.forecast import Part, Reach, parts
from pab_kernels.runtime.plan import Traffic, places, stack_span, storage
from pab_kernels.runtime.slots import SlotKey, SlotLayout
from pab_kernels.runtime.stream import Stream
from pab_kernels.runtime.vectors import VectorBank
from pab_kernels.schedule import Schedule, StepVariant


class Executor:
    """Runs all blocks for one variant, reading and writing the slots of its cache.

    Parameters
    ----------
    stack : BlockStack
        Its weights give dtype and device.
    schedule : Schedule
        Of the first run; others may follow that need the same slots.
    layout : Layout
        Of the residual stream, and so of every slot.
    cache_device : torch.device
        Where the slots lie; see `BroadcastCache`.
    halves : tuple of int
        The halves of guidance that the batch is made of, in order: 0 is the conditional one, 1 the other. Of two, a
        variant with `guidance` runs the conditional one alone.
    pool, forward : optional
        Whom the slots are shared with; see `BroadcastCache`.
    shards : Shards, optional
        The layout is that of one of several ranks, which share the rows of each sequence.

    Raises
    ------
    torch.cuda.OutOfMemoryError, MemoryError
        The slots do not fit; see `BroadcastCache`.
    ValueError
        Tables of the blocks that do not fit together, see `VectorBank`; a batch that has no halves, or whose halves
        share modulation rows, which then cannot be forecast apart; blocks of the stack that do not follow one another.
    """

    def __init__(
        self,
        stack: BlockStack,
        schedule: Schedule,
        layout: Layout,
        cache_device: torch.device,
        halves: tuple[int, ...] = (0,),
        pool: SlotPool | None = None,
        forward: Hashable = None,
        shards: Shards | None = None,
    ) -> None:
        self.stack = stack
        self.layout = layout
        self._shards = shards
        self._parts = parts(layout, halves, schedule.config)
        self._span = stack_span(stack, schedule.config)
        self._stack_key = SlotKey("stack", self._span.stop - 1)
        self._vectors = VectorBank(stack, layout.modulations)
        self._places = list(zip(places(stack), self._vectors.branches, strict=True))
        numbers = storage(stack, schedule)
        gated = {
            place.key for place, _ in self._places if isinstance(place.branch.gate, int) and not place.branch.regate
        }
        kept = [key for key in numbers if key.at(0) in gated]
        small = schedule.config.cache_dtype
        self.cache = BroadcastCache(
            numbers,
            SlotLayout(layout.shape, stack.dtype if small is None else DTYPES[small]),
            stack.device,
            cache_device,
            gated=tuple(sorted(kept, key=lambda key: key.kind)),
            gate_shape=(layout.modulations, layout.channels),
            gate_dtype=self._vectors.dtype,
            pool=pool,
            forward=forward,
        )
        self._traffic: dict[StepVariant, Traffic] = {}
        self._gate_copies: dict[StepVariant, list[tuple[Tensor, Tensor]]] = {}

    def refresh(self) -> None:
        """Read again what was copied of the blocks' weights: tables, constant vectors and weights of norms."""
        self._vectors.refresh()

    def text_kv(
        self,
        text: Tensor,
        kv_len: Tensor | None = None,
        out: list[TextKV | None] | None = None,
        *,
        image: Tensor | None = None,
    ) -> list[TextKV | None]:
        """Keys and values of the projected text for every branch, None for those that attend to none.

        Parameters
        ----------
        text : Tensor
            [B, L, C].
        kv_len : Tensor, optional
            int32 [B], None: all count.
        out : list of TextKV, optional
            An earlier result for the same sizes, to be overwritten: a captured graph reads it where it lies.
        image : Tensor, optional
            [B, L_image, C], a projected picture, for branches that attend to one too.
        """
        result: list[TextKV | None] = []
        for i, (place, _) in enumerate(self._places):
            weights = place.branch.weights
            if not isinstance(weights, CrossAttention):
                result.append(None)
                continue
            earlier = out[i] if out else None
            picture = image if weights.image is not None else None
            result.append(text_kv(text, weights, kv_len, earlier, image=picture))
        return result

    def traffic(self, variant: StepVariant) -> Traffic:
        """The slots that `variant` reads and writes."""
        if variant not in self._traffic:
            traffic = self._traffic[variant] = Traffic.of(self.stack, self.cache, variant, self._span)
            self._gate_copies[variant] = self._copies(traffic)
        return self._traffic[variant]

    def _copies(self, traffic: Traffic) -> list[tuple[Tensor, Tensor]]:
        """The gates that a step keeps: numbers of vectors, and where they go, neighbours in one launch."""
        numbers = {place.key: vectors.gate for place, vectors in self._places}
        rows = [(row, numbers[key.at(0)]) for row, key in enumerate(self.cache.gated) if key in traffic.writes]
        copies = []
        for _, stretch in groupby(enumerate(rows), key=lambda each: each[1][0] - each[0]):
            found = [row for _, row in stretch]
            first, last = found[0][0], found[-1][0]
            source = torch.tensor([number for _, number in found], device=self.stack.device)
            copies.append((source, self.cache.gates[first : last + 1]))
        return copies

    def part(self, variant: StepVariant) -> Part:
        """What a step of this variant runs: all sequences, or those of the conditional half."""
        return self._parts[-1 if variant.guidance else 0]

    def exchanges(self, variant: StepVariant) -> tuple[int, int]:
        """How often a step of this variant exchanges rows with other ranks, and the bytes that it sends: 0, 0 alone."""
        if self._shards is None:
            return 0, 0
        reads, shape = self.traffic(variant).reads, self.part(variant).layout.shape
        sent: list[int] = []
        for place, _ in self._places:
            key = place.key.at(variant.lane(place.key.kind, place.block.index))
            if key not in reads and not (variant.stack and key.position in self._span):
                sent += place.branch.weights.sent(shape, self._shards, self.stack.dtype.itemsize)
        return len(sent), sum(sent)

    def step(
        self,
        x: Tensor,
        modulation: Modulation,
        text: list[TextKV | None],
        variant: StepVariant,
        *,
        embed: Tensor | None = None,
        rope: Rope | None = None,
        index: Tensor | None = None,
        ahead: Tensor | None = None,
    ) -> Tensor:
        """Run every block that this variant does not leave out, and the final norm and modulation.

        B and G are those of the variant's `part`.

        Parameters
        ----------
        x : Tensor
            Residual stream [B, T, S, C] in the dtype of the blocks' linears, contiguous; used up.
        modulation : Modulation
            Of this timestep, for the G rows of the layout.
        text : list of TextKV
            From `text_kv`, for all sequences.
        variant : StepVariant
        embed : Tensor, optional
            [T, C], the temporal position embedding.
        rope : (cos, sin), optional
            Rotary tables of the rotary blocks, for all positions, also with `shards`.
        index : Tensor, optional
            int32 [B, T * S], where the layout is indexed: the modulation row of each row of x.
        ahead : Tensor, optional
            float32 [kinds, 2, 2], where the variant forecasts: how far, from `ahead_table`.

        Returns
        -------
        Tensor
            [B, T, S, C], normalised and modulated for the final projection.

        Raises
        ------
        TypeError, ValueError
            The stream, the modulation or the index do not fit the layout and the weights.
        """
        part = self.part(variant)
        self._check(x, index, part.layout)
        traffic, cache = self.traffic(variant), self.cache
        bank = self._vectors.compute(modulation, part.layout.modulations)
        for numbers, kept in self._gate_copies[variant]:
            if part.rows is None:
                torch.index_select(bank, 0, numbers, out=kept)
            else:
                kept[:, part.rows] = bank[numbers]

        def vector(number: int | None) -> Tensor | None:
            return None if number is None else bank[number]

        reach = Reach(ahead, part, bank)
        stream = Stream(x, part.layout.groups, index, cache.slots, traffic)

        def broadcast(key: SlotKey, gate: Tensor | None) -> None:
            change_gate = reach.gate(key, key.position in self._span, gate) if key.changed in traffic.reads else None
            stream.broadcast(key, gate, change_gate)

        position = -1
        with cache.slots.step(traffic.reads | traffic.updates, part.batch):
            for (place, vectors), branch_text in zip(self._places, text, strict=True):
                key, branch = place.key.at(variant.lane(place.key.kind, place.block.index)), place.branch
                if key.position != position:
                    position = key.position
                    if self._span and position == self._span.start:
                        if variant.stack:
                            broadcast(self._stack_key, None)
                        else:
                            stream.enter_stack()
                    if self._span and position == self._span.stop and not variant.stack:
                        stream.leave_stack(self._stack_key)
                    if position == self.stack.embed_before and not (variant.stack and position in self._span):
                        stream.embed = embed
                if variant.stack and position in self._span:
                    continue
                if key in traffic.reads:
                    gate = cache.gate(key)
                    broadcast(key, vector(vectors.gate) if gate is None else gate[part.rows or slice(None)])
                    continue
                fp8 = isinstance(branch.weights.linears[0], Fp8Linear)
                h = stream.read(branch.norm, vector(vectors.shift), vector(vectors.scale), fp8=fp8)
                own_text = None if branch_text is None else branch_text.sequences(part.batch)
                out = branch.weights.run(h, stream.out(key), Inputs(own_text, rope, self._shards))
                stream.computed(key, out, vector(vectors.gate))
            if self._span.stop == len(self.stack.blocks) and self._span and not variant.stack:
                stream.leave_stack(self._stack_key)
            h = stream.read(self.stack.final, modulation.shift, modulation.scale)
            assert isinstance(h, Tensor)
            return h

    def _check(self, x: Tensor, index: Tensor | None, layout: Layout) -> None:
        if x.shape != layout.shape or x.dtype != self.stack.dtype:
            raise ValueError(
                f"x: is {list(x.shape)} {x.dtype}, must be {list(layout.shape)} {self.stack.dtype}, the dtype of "
                "the blocks' linears"
            )
        if (index is not None) != layout.indexed:
            raise ValueError(
                f"index: got {'one' if index is not None else 'None'}, must be given where the layout is indexed, "
                "and only there"
            )
