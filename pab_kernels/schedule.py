"""Which branch is computed and which is broadcast, for every denoising call of a run. Pure: no torch, no tensors."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

from pab_kernels.config import ALL_BLOCKS, KINDS, MLP_KINDS, NO_BLOCKS, SWITCHES, Blocks, MlpWindow, PABConfig


@dataclass(frozen=True)
class MlpVariant:
    """For the MLPs of one block kind: which blocks read their slot, and which write it.

    A block has a second slot where two windows hand its outputs on at the same time. `lanes` are pairs of a block and
    the number of the slot that it reads or writes, for those where it is not the first, 0.
    """

    broadcast: Blocks = NO_BLOCKS
    keep: Blocks = NO_BLOCKS
    lanes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class StepVariant:
    """What one denoising call does. `spatial`, `temporal` and `cross` are True where that branch is broadcast.

    `stack` is True where the blocks of `stack_block` do not run, and what they added is broadcast; where that is all
    blocks, so are all branches. `guidance` is True where only the conditional half runs. `forecast` names the
    `SWITCHES` whose broadcasts add a change to what is kept.
    """

    spatial: bool = False
    temporal: bool = False
    cross: bool = False
    mlp_spatial: MlpVariant = MlpVariant()
    mlp_temporal: MlpVariant = MlpVariant()
    stack: bool = False
    guidance: bool = False
    forecast: frozenset[str] = frozenset()

    def reads(self, kind: str, index: int) -> bool:
        """Whether the branch of `kind` (one of `BRANCHES`) of block `index` reads its slot, where it has one."""
        decision: bool | MlpVariant = getattr(self, kind)
        return decision if isinstance(decision, bool) else index in decision.broadcast

    def writes(self, kind: str, index: int) -> bool:
        """Whether it writes its slot, where it has one."""
        decision: bool | MlpVariant = getattr(self, kind)
        return not decision if isinstance(decision, bool) else index in decision.keep

    def broadcasts(self, kind: str) -> bool:
        """Whether `kind`, one of `SWITCHES` or of `MLP_KINDS`, is broadcast, in some block at least."""
        if kind == "mlp":
            return any(map(self.broadcasts, MLP_KINDS))
        decision: bool | MlpVariant = getattr(self, kind)
        return decision if isinstance(decision, bool) else len(decision.broadcast) > 0

    def forecasts(self, kind: str) -> bool:
        """Whether a broadcast of `kind`, one of `SWITCHES` and of `MLP_KINDS`, adds a change to what is kept."""
        return ("mlp" if kind in MLP_KINDS else kind) in self.forecast

    def lane(self, kind: str, index: int) -> int:
        """Which of its slots that is: 0 but for the second one of an MLP, see `MlpVariant`."""
        decision: bool | MlpVariant = getattr(self, kind)
        return 0 if isinstance(decision, bool) or not decision.lanes else dict(decision.lanes).get(index, 0)

    @property
    def broadcasting(self) -> tuple[str, ...]:
        """What is broadcast: kinds of branches, "stack", "guidance". Where no block runs, no branches are named."""
        parts = (*KINDS, *MLP_KINDS, "stack", "guidance")
        whole = self == replace(WHOLE, guidance=self.guidance, forecast=self.forecast)
        return tuple(kind for kind in parts[-2 if whole else 0 :] if self.broadcasts(kind))

    def __str__(self) -> str:
        repeated = [kind for kind in self.broadcasting if not self.forecasts(kind)]
        forecast = [kind for kind in self.broadcasting if self.forecasts(kind)]
        named = (("broadcast", repeated), ("forecast", forecast))
        return ", ".join(f"{verb} {'+'.join(kinds)}" for verb, kinds in named if kinds) or "compute"


WHOLE = StepVariant(True, True, True, MlpVariant(broadcast=ALL_BLOCKS), MlpVariant(broadcast=ALL_BLOCKS), stack=True)
"""No block runs."""

Ahead = dict[tuple[str, bool, int], float]
"""How far a call's forecasts reach, by kind, whether in a block of the stack's, and half of guidance."""


class Schedule(Sequence[StepVariant]):
    """The plan of one run: one `StepVariant` a denoising call.

    Parameters
    ----------
    config : PABConfig
    timesteps : iterable of float
        The timestep of every denoising call that will really happen, in order (PNDM: 159 for 150 steps).
        ``int()`` of each is compared with the thresholds.

    Raises
    ------
    ValueError
        No timesteps, or one that is not finite.

    Warns
    -----
    UserWarning
        A timestep-keyed MLP window whose key does not occur: it would do nothing.
    """

    def __init__(self, config: PABConfig, timesteps: Iterable[float]) -> None:
        self.config = config
        self.timesteps = tuple(float(t) for t in timesteps)
        if not self.timesteps:
            raise ValueError("timesteps: got none, must be at least one")
        for t in self.timesteps:
            if not math.isfinite(t):
                raise ValueError(f"timesteps: got {t}, must be finite")
        ints = [int(t) for t in self.timesteps]
        if config.mlp_broadcast:
            for kind in MLP_KINDS:
                _warn_missing(kind, config.mlp_windows(kind), ints)
        self._steps, self._ahead = _plan(config, ints)

    def __len__(self) -> int:
        return len(self._steps)

    @overload
    def __getitem__(self, index: int) -> StepVariant: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[StepVariant, ...]: ...
    def __getitem__(self, index: int | slice) -> StepVariant | tuple[StepVariant, ...]:
        return self._steps[index]

    def resumed(self, call: int) -> Schedule:
        """This plan where nothing of what was computed before `call` may be used: another batch runs from there on.

        From `call` on it is the plan of the timesteps that are left, without guidance: a batch that changes within a
        run is one whose guidance has ended.
        """
        again = copy.copy(self)
        again.config = replace(self.config, guidance_broadcast=False)
        steps, ahead = _plan(again.config, [int(t) for t in self.timesteps[call:]])
        again._steps, again._ahead = self._steps[:call] + steps, self._ahead[:call] + ahead
        return again

    def ahead(self, call: int, kind: str, *, inside: bool = False, half: int = 0) -> float:
        """How far a forecast of `kind` (one of `SWITCHES` or of `MLP_KINDS`) reaches at `call`.

        It is the number of calls since the last that computed it, over the number between the last two. 0 where
        nothing is forecast.

        Parameters
        ----------
        call : int
        kind : str
        inside : bool
            Of a block that `stack_block` covers: it computes less often than others.
        half : {0, 1}
            Of the conditional rows or of the others, which compute less often.
        """
        return self._ahead[call].get(("mlp" if kind in MLP_KINDS else kind, inside, half), 0.0)

    def alive(self, kind: str, index: int, lane: int = 0) -> Collection[int]:
        """The calls at which a slot is in use; `kind` (one of `BRANCHES`, or "stack"), `index` and `lane` name it.

        Attention's is written by every call that computes it, so always. An MLP's from the call that writes it to the
        last that reads it.
        """
        if kind not in MLP_KINDS:
            return range(len(self))
        alive: set[int] = set()
        written = 0
        for call, step in enumerate(self._steps):
            if step.lane(kind, index) != lane:
                continue
            if step.writes(kind, index):
                written = call
                alive.add(call)
            elif step.reads(kind, index):
                alive.update(range(written, call + 1))
        return frozenset(alive)

    def lanes(self, kind: str, index: int) -> int:
        """How many slots a branch has."""
        return 1 + max(step.lane(kind, index) for step in self._steps)

    def broadcast_count(self, kind: str) -> int:
        """Number of calls on which attention of `kind` is broadcast."""
        return sum(getattr(step, kind) for step in self._steps)

    def saved_share(self, kinds: Sequence[str] = KINDS) -> float:
        """Share of the attention calls of `kinds` that are broadcast, 0 to 1."""
        return sum(map(self.broadcast_count, kinds)) / (len(kinds) * len(self))


def _plan(config: PABConfig, timesteps: Sequence[int]) -> tuple[tuple[StepVariant, ...], tuple[Ahead, ...]]:
    """The variant of every call, and how far its forecasts reach."""
    plans: dict[str, Sequence[Any]] = {kind: _flags(config, kind, timesteps) for kind in (*KINDS, "stack", "guidance")}
    plans |= {kind: _mlp_variants(config, kind, timesteps) for kind in MLP_KINDS}
    steps = [StepVariant(**{kind: plan[i] for kind, plan in plans.items()}) for i in range(len(timesteps))]
    if config.stack_block is None:
        whole = (WHOLE, replace(WHOLE, guidance=True))
        steps = [whole[step.guidance] if step.stack else step for step in steps]
    aheads: list[Ahead] = []
    computed: dict[tuple[str, bool, int], list[int]] = {}
    parts = _parts(config)
    for call, step in enumerate(steps):
        ahead: Ahead = {}
        unknown = set()  # kinds of which there is no change yet
        for key in parts:
            kind, inside, half = key
            if (step.stack and inside) or (step.guidance and half == 1):
                continue  # does not run
            calls = computed.setdefault(key, [])
            if not step.broadcasts(kind):
                calls.append(call)
            elif len(calls) < 2:
                unknown.add(kind)
            else:
                ahead[key] = (call - calls[-1]) / (calls[-1] - calls[-2])
        ahead = {key: n for key, n in ahead.items() if key[0] not in unknown}
        if ahead:
            steps[call] = replace(step, forecast=frozenset(kind for kind, _, _ in ahead))
        aheads.append(ahead)
    return tuple(steps), tuple(aheads)


def _parts(config: PABConfig) -> list[tuple[str, bool, int]]:
    """All that is forecast and computed at calls of its own: kind, whether the stack's blocks, half of guidance."""
    halves = (0, 1) if config.guidance_broadcast else (0,)
    insides: tuple[bool, ...] = (False,)
    if config.stack_broadcast:
        insides = (True,) if config.stack_block is None else (False, True)
    parts: list[tuple[str, bool, int]] = []
    for kind in SWITCHES:
        if not (getattr(config, f"{kind}_broadcast") and config.order(kind)):
            continue
        if kind == "guidance":
            parts.append((kind, False, 0))
        else:
            parts += [(kind, inside, half) for inside in ((False,) if kind == "stack" else insides) for half in halves]
    return parts


def _broadcasts(threshold: tuple[float, float], every: int, call: int, timestep: int) -> bool:
    return threshold[0] < timestep < threshold[1] and call % every != 0


def _flags(config: PABConfig, kind: str, timesteps: Sequence[int]) -> list[bool]:
    if not getattr(config, f"{kind}_broadcast"):
        return [False] * len(timesteps)
    threshold, every = getattr(config, f"{kind}_threshold"), getattr(config, f"{kind}_range")
    return [_broadcasts(threshold, every, i, t) for i, t in enumerate(timesteps)]


def _mlp_variants(config: PABConfig, kind: str, timesteps: Sequence[int]) -> list[MlpVariant]:
    if not config.mlp_broadcast:
        return [MlpVariant()] * len(timesteps)
    if config.mlp_threshold is not None and config.mlp_range is not None:
        blocks = config.blocks(kind)
        return [
            MlpVariant(broadcast=blocks)
            if _broadcasts(config.mlp_threshold, config.mlp_range, i, t)
            else MlpVariant(keep=blocks)
            for i, t in enumerate(timesteps)
        ]
    windows = config.mlp_windows(kind)
    return _keyed_mlp_variants(windows, timesteps)


def _keyed_mlp_variants(windows: Sequence[MlpWindow], timesteps: Sequence[int]) -> list[MlpVariant]:
    """The original's rule: the first window, in the order given, whose steps include a timestep decides for it.

    Outputs are kept by timestep and block. A block listed under the timestep itself is computed all the same, and kept
    if a later step reads it: in a slot of its own where an earlier window still hands on what it kept of this block.
    """
    computed = [{index for window in windows if window.timestep == t for index in window.block} for t in timesteps]
    sources = [_source(windows, timesteps, t) for t in timesteps]
    broadcast = [
        frozenset() if source is None else frozenset(source.block) - now
        for source, now in zip(sources, computed, strict=True)
    ]
    last_read = {
        (source.timestep, index): call
        for call, (source, blocks) in enumerate(zip(sources, broadcast, strict=True))
        if source is not None
        for index in blocks
    }
    lane = _lanes(last_read, timesteps)
    variants = []
    for t, source, blocks, now in zip(timesteps, sources, broadcast, computed, strict=True):
        keep = frozenset(index for index in now if (t, index) in last_read)
        used = {index: lane[t, index] for index in keep}
        used |= {index: lane[source.timestep, index] for index in blocks if source is not None}
        variants.append(MlpVariant(blocks, keep, tuple(sorted((i, number) for i, number in used.items() if number))))
    return variants


def _lanes(last_read: Mapping[tuple[int, int], int], timesteps: Sequence[int]) -> dict[tuple[int, int], int]:
    """For each kept output, by timestep and block, the first slot that is free from then to its last use."""
    lanes: dict[tuple[int, int], int] = {}
    free_after: dict[int, list[int]] = {}  # of each block, the call that uses each of its slots last
    for (timestep, index), end in sorted(last_read.items(), key=lambda item: timesteps.index(item[0][0])):
        ends = free_after.setdefault(index, [])
        start = timesteps.index(timestep)
        number = next((i for i, before in enumerate(ends) if before < start), len(ends))
        ends[number : number + 1] = [end]
        lanes[timestep, index] = number
    return lanes


def _source(windows: Sequence[MlpWindow], timesteps: Sequence[int], timestep: int) -> MlpWindow | None:
    """The first window whose steps include this timestep."""
    for window in windows:
        if window.timestep in timesteps:
            start = timesteps.index(window.timestep)
            if timestep in timesteps[start : start + 1 + window.skip_count]:
                return window
    return None


def _warn_missing(kind: str, windows: Sequence[MlpWindow], timesteps: Sequence[int]) -> None:
    missing = [window.timestep for window in windows if window.timestep not in timesteps]
    if missing:
        nearest = ", ".join(f"{key} (nearest {min(timesteps, key=lambda t: abs(t - key))})" for key in missing)
        warnings.warn(
            f"{kind}_broadcast_config: these keys are not among the run's timesteps and do nothing: {nearest}. "
            "mlp_threshold and mlp_range do not depend on exact timesteps.",
            stacklevel=3,
        )
