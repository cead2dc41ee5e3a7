"""What is allocated for one shape of call: the executor with its slots, the text's keys and values, the graphs."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels.blocks.block import BlockStack, Modulation
from pab_kernels.blocks.branches import TextKV
from pab_kernels.config import SWITCHES
from pab_kernels.models.adapter import MODULATION_INDEX, Adapter, Call
from pab_kernels.models.seen import Seen
from pab_kernels.runtime.cache import BroadcastCache, SlotPool
from pab_kernels.runtime.executor import Executor
from pab_kernels.runtime.forecast import AHEAD, ahead_table
from pab_kernels.runtime.graphs import StepGraphs
from pab_kernels.runtime.guidance import Difference
from pab_kernels.runtime.lane import Lane
from pab_kernels.runtime.plan import storage
from pab_kernels.runtime.rectified_flow import euler_step
from pab_kernels.runtime.run import Forward, Run
from pab_kernels.runtime.share import Share
from pab_kernels.schedule import Schedule, StepVariant

TEXT_PADDING = 64
"""For graphs, text is padded to a multiple of this many tokens."""
TEXTS = 4
"""Of so many lengths of text the keys, values and graphs are kept; the one that was not used for longest goes."""


@dataclass
class _Text:
    """Keys and values of a text of one shape, and the graphs that read them where they lie."""

    kv: list[TextKV | None]
    kv_len: Tensor | None
    graphs: dict[bool, StepGraphs] = field(default_factory=dict)
    """Of single calls (False) and of whole steps (True)."""


class Workspace:
    """Runs the calls of one stream of denoising calls, all of one shape.

    Parameters
    ----------
    adapter : Adapter
    stack : BlockStack
        The adapter's, or the same with linears in fp8.
    schedule : Schedule
        Of the first run.
    call : Call
        The first call; its shape is that of all.
    share : Share
        What of it is run here.
    lane : Lane
        Device and stream.
    cuda_graphs : bool
        Replay steps from graphs where the device allows it.
    cache_device : torch.device
        Where the slots lie; see `BroadcastCache`.
    pool, forward : optional
        Whom the slots are shared with; see `BroadcastCache`.
    halves : tuple of int
        Of guidance, in the call's batch; see `Executor`.

    Attributes
    ----------
    run : Run or None
        Whose slots these are.
    """

    def __init__(
        self,
        adapter: Adapter,
        stack: BlockStack,
        schedule: Schedule,
        call: Call,
        share: Share,
        lane: Lane,
        cuda_graphs: bool,
        cache_device: torch.device,
        pool: SlotPool | None = None,
        forward: Forward = 0,
        halves: tuple[int, ...] = (0,),
    ) -> None:
        self._adapter = adapter
        self._lane = lane
        self._halves = halves
        self._guidance_order = schedule.config.guidance_order
        stack = stack if call.temporal else stack.without_temporal()
        self._share = share
        self._executor = Executor(
            stack, schedule, share.layout, cache_device, share.halves, pool, forward, share.shards
        )
        self._difference: Difference | None = None
        self._kept_difference = False
        """Whether this run has."""
        self._ahead: Tensor | None = None
        self._planned: Schedule | None = None
        """Whose `_ahead` it is."""
        self._texts: OrderedDict[Hashable, _Text] = OrderedDict()
        self._text: _Text | None = None
        self._seen = Seen()
        self.run: Run | None = None
        self._table_key: Hashable = None
        self._tables: dict[str, Tensor] = {}
        self._forgotten = 0
        """Graphs that were captured and are gone."""
        self._eager: str | None = None
        if not cuda_graphs:
            self._eager = "switched off"
        elif call.tensors["latents"].device.type != "cuda":
            self._eager = "not on a CUDA device"

    @staticmethod
    def key(call: Call, halves: tuple[int, ...] = (0,)) -> Hashable:
        """What calls of one workspace have in common."""
        own = halves if len(halves) == 2 else ()
        return call.layout, call.tensors["latents"].shape, call.temporal, frozenset(call.tensors), own

    @property
    def cache(self) -> BroadcastCache:
        """The slots."""
        return self._executor.cache

    @property
    def stack(self) -> BlockStack:
        """The blocks as they run."""
        return self._executor.stack

    @property
    def shared(self) -> bool:
        """Whether ranks share the rows of a sequence."""
        return self._share.shards is not None

    def exchanges(self, variant: StepVariant) -> tuple[int, int]:
        """How often a step exchanges rows with other ranks, and the bytes that it sends; see `Executor`."""
        idle = variant.guidance and self._share.idle
        return (0, 0) if idle else self._executor.exchanges(variant)

    @property
    def eager(self) -> str | None:
        """Why steps run without CUDA graphs, None where they have them."""
        return self._eager or next((graphs.failure for graphs in self._all_graphs() if graphs.failure), None)

    @property
    def graphs(self) -> int:
        """How many graphs there are."""
        return sum(map(len, self._all_graphs()))

    @property
    def captured(self) -> int:
        """How many graphs were captured."""
        return self._forgotten + sum(graphs.captured for graphs in self._all_graphs())

    def _all_graphs(self) -> list[StepGraphs]:
        return [graphs for text in self._texts.values() for graphs in text.graphs.values()]

    def serves(self, schedule: Schedule) -> bool:
        """Whether a run of this plan needs the slots that there are."""
        return storage(self.stack, schedule) == self.cache.storage

    def begin_run(self, run: Run) -> None:
        """Forget every slot's content and which text was last seen, and copy anew what was copied from weights."""
        self.run = run
        self.cache.invalidate()
        self._kept_difference = False
        self._planned = None
        self._seen.forget()
        self._table_key = None
        self._executor.refresh()

    def step(
        self, call: Call, schedule: Schedule, step: int, flow: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One denoising call.

        Parameters
        ----------
        call : Call
        schedule : Schedule
            The run's.
        step : int
            The call's.
        flow : dict of Tensor, optional
            From `FlowInputs.at`: take a whole step of rectified flow on these latents, not `call`'s.

        Returns
        -------
        result : Tensor
            The host's prediction [B, C_out, T, H, W], or with `flow` the latents after the step; the next call may
            overwrite it.
        doubts : tuple of Tensor
            Bools on the device: the result is wrong where one is True.

        Raises
        ------
        ValueError
            The step broadcasts from a slot, or a difference of guidance, that this run has not written.
        """
        variant, part, share = self.variant(schedule[step]), self._executor.part(schedule[step]), self._share
        traffic, idle = self._executor.traffic(variant), variant.guidance and share.idle
        if not idle:
            self.cache.require(traffic.reads)
        if variant.guidance and not self._kept_difference:
            raise ValueError("guidance: the difference is read before this run has written it")
        if call.table_key != self._table_key:
            self._update_tables(call)
        text = self._update_text(call)
        tables = self._tables

        def predict(tensors: dict[str, Tensor], modulation: Modulation | None = None) -> Tensor:
            ahead = tensors.get(AHEAD)
            own = {name: part.own(name, share.own(name, value)) for name, value in tensors.items()}
            now = dataclasses.replace(call, tensors={**own, **tables}, layout=part.layout)
            if idle:
                return self._both(share.gather(self._adapter.nothing(now)), variant, ahead)
            modulation = modulation or self._adapter.modulate(now)
            h = self._executor.step(
                self._adapter.embed(now),
                modulation,
                text.kv,
                variant,
                embed=share.frame_embed(self._adapter.frame_embed(call)),
                rope=self._adapter.rope(now),
                index=own.get(MODULATION_INDEX),
                ahead=ahead,
            )
            return self._both(share.gather(self._adapter.project_out(h, now)), variant, ahead)

        def flow_step(tensors: dict[str, Tensor]) -> Tensor:
            latents, packed = tensors["latents"], share.modulation(tensors["modulation"])[part.rows or slice(None)]
            both = latents.repeat(call.layout.batch // len(latents), 1, 1, 1, 1).to(call.tensors["latents"].dtype)
            modulation = Modulation(packed[:, :-2], packed[:, -2], packed[:, -1])
            return euler_step(latents, predict({**tensors, "latents": both}, modulation), *tensors["scales"])

        run, inputs = (predict, call.tensors) if flow is None else (flow_step, flow)
        inputs = {**inputs, **self._ahead_at(schedule, step)}
        if self._eager is None:
            whole = flow is not None
            if whole not in text.graphs or not text.graphs[whole].fit(inputs):
                if whole in text.graphs:
                    self._forgotten += text.graphs[whole].captured
                text.graphs[whole] = StepGraphs(inputs, self._lane)
            result = text.graphs[whole].run(variant, run, inputs)
        else:
            result = run(inputs)
        if not idle:
            self.cache.mark_written(traffic.writes)
        self._kept_difference = self._kept_difference or len(self._halves) == 2
        return result, self._seen.doubts()

    def variant(self, planned: StepVariant) -> StepVariant:
        """What a call of this batch does: one that is no two halves runs whole."""
        return planned if len(self._halves) == 2 else dataclasses.replace(planned, guidance=False)

    def _both(self, prediction: Tensor, variant: StepVariant, ahead: Tensor | None) -> Tensor:
        """Both halves of guidance, of a prediction that is both, or the conditional one alone."""
        if len(self._halves) == 1:
            return prediction
        first = self._halves[0] == 0
        if variant.guidance and self._share.guidance is not None:  # each rank gave one, the others' is nothing
            prediction = prediction.chunk(2)[self._halves.index(0)]
        if variant.guidance:
            assert self._difference is not None
            reach = None
            if ahead is not None and variant.forecasts("guidance"):
                reach = ahead[SWITCHES.index("guidance"), 0, 0]
            other = self._difference.other(prediction, reach)
            return torch.cat([prediction, other] if first else [other, prediction])
        halves = prediction.chunk(2)
        conditional, other = halves if first else halves[::-1]
        if self._difference is None:
            self._difference = Difference(conditional, self._guidance_order)
        self._difference.keep(conditional, other)
        return prediction

    def _ahead_at(self, schedule: Schedule, step: int) -> dict[str, Tensor]:
        """How far the forecasts of a step reach, where a run has any."""
        if self._planned is not schedule:
            self._ahead, self._planned = ahead_table(schedule, self.stack.device), schedule
        return {} if self._ahead is None else {AHEAD: self._ahead[step]}

    def _update_tables(self, call: Call) -> None:
        """Tables for another key, where the graphs know them."""
        tables = self._adapter.tables(call)
        if self._tables:
            for name, table in tables.items():
                self._tables[name].copy_(table)
        else:
            self._tables = tables
        self._table_key = call.table_key

    def _update_text(self, call: Call) -> _Text:
        """Make keys and values of the text, if the caller handed over another one than at the last call.

        For graphs the text is padded to a multiple of `TEXT_PADDING` with its length on the device, so that a prompt
        of another length replays the graphs there are.
        """
        if not self._seen.changed("text", *call.text_sources) and self._text is not None:
            return self._text
        call = self._share.text(call)
        tokens, kv_len = _pack(call.text, call.text_mask)
        if self._eager is None:
            missing = -tokens.shape[1] % TEXT_PADDING
            if kv_len is None and (missing or not self._adapter.full_text):
                kv_len = torch.full((len(tokens),), tokens.shape[1], dtype=torch.int32, device=tokens.device)
            tokens = F.pad(tokens, (0, 0, 0, missing))
        key = (tokens.shape, kv_len is None, None if call.image is None else call.image.shape)
        old = self._texts.get(key)
        if old is not None and old.kv_len is not None and kv_len is not None:
            kv_len = old.kv_len.copy_(kv_len)
        projected = self._adapter.project_text(tokens)
        image = None if call.image is None else self._adapter.project_image(call.image)
        kv = self._executor.text_kv(projected, kv_len, out=None if old is None else old.kv, image=image)
        if old is None:
            self._text = self._texts[key] = _Text(kv, kv_len)
        else:
            self._text = old
        self._texts.move_to_end(key)
        if len(self._texts) > TEXTS:
            _, gone = self._texts.popitem(last=False)
            self._forgotten += sum(graphs.captured for graphs in gone.graphs.values())
        return self._text


def _pack(text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Text [B, L, C] with the tokens that count in front, and how many they are (int32 [B]).

    Attention does not depend on the order of its keys, so a mask with holes becomes a length.
    """
    if mask is None:
        return text, None
    order = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return text.gather(1, order[..., None].expand_as(text)), mask.sum(1, dtype=torch.int32)
