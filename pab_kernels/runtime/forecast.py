"""What a step runs of its batch, and how far its forecasts reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pab_kernels.blocks.layout import Layout
from pab_kernels.config import MLP_KINDS, SWITCHES, PABConfig
from pab_kernels.runtime.slots import SlotKey
from pab_kernels.schedule import Schedule

AHEAD = "ahead"
"""The name among a call's tensors of how far its forecasts reach."""


@dataclass(frozen=True)
class Part:
    """Sequences of a batch that run together: their layout, their halves of guidance in order, where they lie.

    `batch` are the sequences and `rows` the modulation rows, None for all.
    """

    layout: Layout
    halves: tuple[int, ...]
    batch: slice | None = None
    rows: slice | None = None

    def own(self, name: str, value: Tensor) -> Tensor:
        """The part of an input of a call."""
        return value if self.batch is None or whole_run(name, self.layout) else value[self.batch]


def whole_run(name: str, layout: Layout) -> bool:
    """Whether an input of a call is of the whole run or of modulation rows: all others are [B, ...]."""
    return name in (AHEAD, "scales", "modulation") or (name == "timestep" and layout.indexed)


def parts(layout: Layout, halves: tuple[int, ...], config: PABConfig) -> list[Part]:
    """The whole batch, and where it is two halves of guidance the conditional one.

    Raises
    ------
    ValueError
        The batch is odd, or the halves would have to be forecast apart and share modulation rows.
    """
    whole = Part(layout, halves)
    if len(halves) == 1:
        return [whole]
    if layout.batch % 2:
        raise ValueError(
            f"guidance_broadcast: the batch has {layout.batch} sequences, must be two halves; without guidance, "
            "leave it out of the settings"
        )
    if layout.indexed and any(config.order(kind) for kind in SWITCHES if kind != "guidance"):
        raise ValueError(
            "guidance_broadcast: cannot go with a forecast (an order of 1) where each token has a timestep of its own"
        )
    count, modulations = layout.batch // 2, layout.modulations // (1 if layout.indexed else 2)
    place = halves.index(0)
    half = replace(layout, batch=count, modulations=modulations)
    rows = None if layout.indexed else slice(place * modulations, (place + 1) * modulations)
    return [whole, Part(half, (0,), slice(place * count, (place + 1) * count), rows)]


def ahead_table(schedule: Schedule, device: torch.device) -> Tensor | None:
    """How far the forecasts of every call reach, float32 [calls, kinds, 2, 2]; None where there are none.

    Kinds are `SWITCHES`; then blocks outside of the stack's and inside; then the conditional half and the other.
    """
    if not any(step.forecast for step in schedule):
        return None
    values = [
        [[[schedule.ahead(call, kind, inside=inside, half=half) for half in (0, 1)] for inside in (False, True)]
         for kind in SWITCHES]
        for call in range(len(schedule))
    ]  # fmt: skip
    return torch.tensor(values, dtype=torch.float32).to(device)


class Reach:
    """The gates of the changes that a step adds: how far its forecasts reach, times the gates of the outputs.

    Parameters
    ----------
    ahead : Tensor, optional
        float32 [kinds, 2, 2], one call of `ahead_table`.
    part : Part
    bank : Tensor
        [vectors, G, C], the step's vectors: the gates have their shape and device.
    """

    def __init__(self, ahead: Tensor | None, part: Part, bank: Tensor) -> None:
        self._ahead, self._halves, self._bank = ahead, part.halves, bank
        self._dtype = torch.promote_types(bank.dtype, torch.float32)
        self._known: dict[tuple[str, bool], Tensor] = {}

    def gate(self, key: SlotKey, inside: bool, gate: Tensor | None) -> Tensor:
        """The gate [G, C] of the change of slot `key`, whose output has `gate`; `inside` the stack or not."""
        kind = "mlp" if key.kind in MLP_KINDS else key.kind
        inside = inside and kind != "stack"
        if (kind, inside) not in self._known:
            self._known[kind, inside] = self._rows(kind, inside, self._halves)
        reach = self._known[kind, inside]
        return reach if gate is None else reach * gate

    def _rows(self, kind: str, inside: bool, halves: Sequence[int]) -> Tensor:
        if self._ahead is None:
            raise ValueError("ahead: got None, must be a tensor because the variant forecasts")
        values = self._ahead[SWITCHES.index(kind), int(inside)]
        groups, channels = self._bank.shape[1:]
        of_halves = torch.stack([values[half] for half in halves]).to(self._dtype)
        return of_halves[:, None].expand(-1, groups * channels // len(halves)).contiguous().view(groups, channels)
