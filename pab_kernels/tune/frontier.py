"""Weighs settings: the error that the profile predicts, and the time they should save; and lists those a step away.

An output that is broadcast is wrong by what it would have changed since it was computed. What counts is that
difference as a share of the residual stream that it is added to (`Profile.impact`), times the root of how far the
sampler moves by the call (`Profile.moves`): an early call moves little, but all later ones take up what it spoils.
Repeated outputs all lag behind, so over the calls of a run their errors add up. A forecast is wrong by what the line
misses: with a second difference of s a step (`Profile.remainder`), n steps after the last call that computed and d
after the one before it, by ``s * n * (n + d) / 2``, now this way and now that, so squares add up, as they do over
blocks. What an error of a kind does to the video is a factor that trials tell.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pab_kernels.config import MLP_KINDS, SWITCHES, PABConfig
from pab_kernels.schedule import Schedule, StepVariant
from pab_kernels.tune.profile import Profile

SHIFTS = (-4, -2, -1, 1, 2, 4)
"""Calls by which an end of a window moves in a step."""
ROUNDS = (-2, -1, 1, 2)
"""By which a range changes."""
RANGES, STARTS, ENDS = (2, 4), (0.1, 0.3), (1, 0.25)
"""Of a kind that is switched on: its range; calls at either end of a run that are computed, or shares of it below 1."""
Settings = dict[str, Any]
Rows = tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """Settings, the errors of `Profile.parts` that are predicted, and the share of the denoising time they should save.

    Errors of different kinds compare once they are multiplied by factors that trials tell. `steps` has a number for
    what each call does: equal numbers, equal runs.
    """

    config: PABConfig
    errors: tuple[float, ...]
    saving: float
    steps: tuple[int, ...]


class Frontier:
    """Weighs settings, and those a step away.

    Parameters
    ----------
    profile : Profile
    saving : callable
        The share of the denoising time that a schedule should save.
    """

    def __init__(self, profile: Profile, saving: Callable[[Schedule], float]) -> None:
        self._profile, self._saving = profile, saving
        self._weighed: dict[PABConfig, Candidate] = {}
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._known: dict[tuple[str, Rows, tuple[str, ...]], float] = {}  # most settings share it with others

    def weigh(self, config: PABConfig) -> Candidate:
        """What `config` should cost and save; errors of blocks that run are left out."""
        if config not in self._weighed:
            schedule = Schedule(config, self._profile.timesteps)
            numbers = {step: self._number(config, step) for step in dict.fromkeys(schedule)}
            steps = tuple(numbers[step] for step in schedule)
            self._weighed[config] = Candidate(config, self._errors(schedule), self._saving(schedule), steps)
        return self._weighed[config]

    def near(self, config: PABConfig) -> list[Candidate]:
        """What differs from `config` in one kind, by one step: an end of its window, range, order, blocks, or whether.

        Where no block runs nothing is renewed, so ranges are multiples of the stack's, and go along when that changes.
        """
        parts = _parts(config)
        every = parts.get("stack", {}).get("stack_range", 1)
        found: dict[PABConfig, None] = {}  # in order, each once
        for kind in self._profile.parts:
            others = {other: part for other, part in parts.items() if other != kind}
            for settings in _steps(self._profile, kind, parts.get(kind, {}), 1 if kind == "stack" else every):
                now = settings["stack_range"] if kind == "stack" and settings else every
                rest = {key: value for other, part in others.items() for key, value in _along(part, other, every, now)}
                found[PABConfig(**rest, **settings)] = None
        found.pop(config, None)
        return [self.weigh(each) for each in found]

    def _number(self, config: PABConfig, step: StepVariant) -> int:
        blocks = tuple(config.blocks(kind) for kind in step.broadcasting if kind != "guidance")
        return self._numbers.setdefault((step, blocks), len(self._numbers))

    def _errors(self, schedule: Schedule) -> tuple[float, ...]:
        return tuple(self._kind_error(schedule, kind) for kind in self._profile.parts)

    def _kind_error(self, schedule: Schedule, kind: str) -> float:
        profile, total = self._profile, 0.0
        for rows, in_stack in _rows(profile, schedule.config, kind):
            calls = tuple(_call(step, kind, in_stack) for step in schedule)
            if (kind, rows, calls) not in self._known:
                at = list(rows)
                measures = profile.impact[kind][at], profile.remainder[kind][at], np.sqrt(profile.moves)
                self._known[kind, rows, calls] = _rows_error(*measures, calls)
            total += self._known[kind, rows, calls]
        return total


def _call(step: StepVariant, kind: str, in_stack: bool) -> str:
    if in_stack and step.stack:
        return "does not run"
    if not step.broadcasts(kind):
        return "computes"
    return "forecasts" if step.forecasts(kind) else "repeats"


def _rows_error(
    impact: NDArray[np.float64], remainder: NDArray[np.float64], weights: NDArray[np.float64], calls: Sequence[str]
) -> float:
    computed: list[int] = []
    forecast, lag = 0.0, np.zeros(len(impact))
    for call, does in enumerate(calls):
        if does == "computes":
            computed.append(call)
        elif does == "forecasts":
            age, reach = call - computed[-1], call - computed[-2]
            # The remainder of a call looks one and two calls back: the first two have none.
            missed = np.nanmean(remainder[:, max(computed[-1], 2) : call + 1], axis=1) * age * reach / 2 * weights[call]
            forecast += float(missed @ missed)
        elif does == "repeats":
            lag += impact[:, computed[-1] + 1 : call + 1].sum(axis=1) * weights[call]
    return forecast + float(lag @ lag)


def _rows(profile: Profile, config: PABConfig, kind: str) -> list[tuple[Rows, bool]]:
    """Rows of the profile that broadcast, and whether they are of blocks that the stack leaves out, in up to two parts.

    A kind that several lists of blocks have is measured block by block, in turn.
    """
    if kind == "guidance":
        return [((0,), False)]
    if kind == "stack":  # the row of its margin
        margin = 0 if config.stack_block is None else config.stack_block[0]
        return [((min(margin, len(profile.impact[kind]) - 1),), False)]
    each = len(profile.impact[kind]) // profile.depth
    found, stack = config.blocks(MLP_KINDS[0] if kind == "mlp" else kind), config.blocks("stack")
    rows = [row for row in range(each * profile.depth) if row // each in found]
    parts = [(tuple(row for row in rows if (row // each in stack) == inside), inside) for inside in (True, False)]
    return [part for part in parts if part[0]]


def _parts(config: PABConfig) -> dict[str, Settings]:
    """The settings of each kind that is broadcast by a window; under "" what belongs to no kind."""
    found: dict[str, Settings] = {}
    for key, value in config.to_dict().items():
        kind = next((kind for kind in SWITCHES if key.startswith(f"{kind}_")), "")
        if not kind or (getattr(config, f"{kind}_broadcast") and getattr(config, f"{kind}_range") is not None):
            found.setdefault(kind, {})[key] = value
    return found


def _along(part: Settings, kind: str, before: int, now: int) -> list[tuple[str, Any]]:
    """The settings of a kind when the stack's range changes: its own stays as many times that."""
    every = part.get(f"{kind}_range", 1)
    return list((part | ({f"{kind}_range": max(every * now // before, 2)} if now != before and kind else {})).items())


def _steps(profile: Profile, kind: str, now: Settings, every: int) -> Iterator[Settings]:
    """Settings of a kind that are a step away from those that it has, ranges in steps of `every`.

    None where it is not broadcast.
    """
    lo, hi = now.get(f"{kind}_threshold", (0, 0))
    inside = [call for call, t in enumerate(profile.timesteps) if lo < int(t) < hi]
    if not inside:
        for start, end, times, order in itertools.product(STARTS, ENDS, RANGES, (0, 1)):
            window = _window(profile, start, end)
            if window is not None:
                yield _settings(kind, window, times * every, order)
        return
    yield {}
    start, end = inside[0], len(profile.timesteps) - 1 - inside[-1]
    moved = [_window(profile, max(start + shift, 1), end) for shift in SHIFTS]
    moved += [_window(profile, start, max(end + shift, 0)) for shift in SHIFTS]
    for window in moved:
        if window is not None:
            yield now | {f"{kind}_threshold": window}
    for change in ROUNDS:
        longer = (now[f"{kind}_range"] // every + change) * every
        if longer > 1:
            yield now | {f"{kind}_range": longer}
    yield now | {f"{kind}_order": 1 - now.get(f"{kind}_order", 0)}
    for part in (None, *_blocks(profile, kind)):
        yield now | ({} if kind == "guidance" else {f"{kind}_block": part})


def _blocks(profile: Profile, kind: str) -> list[tuple[int, int]]:
    """Parts of the model that may broadcast a kind alone, [first, end); of the stack those that the profile knows."""
    depth = profile.depth
    if kind == "guidance":
        return []
    if kind == "stack":
        most = min(len(profile.impact["stack"]), (depth + 1) // 2) - 1
        return [(margin, depth - margin) for margin in sorted({1, most // 2, most}) if 0 < margin <= most]
    parts = ((0, depth // 2), (depth // 2, depth), (depth // 4, depth - depth // 4))
    return [(first, end) for first, end in dict.fromkeys(parts) if 0 < end - first < depth]


def _settings(kind: str, window: tuple[int, int], every: int, order: int) -> Settings:
    settings = {"broadcast": True, "threshold": window, "range": every, "order": order}
    return {f"{kind}_{key}": value for key, value in settings.items()}


def _window(profile: Profile, start: float, end: float) -> tuple[int, int] | None:
    """Thresholds that leave out so many calls at either end, halfway between timesteps, so that they fit other runs."""
    calls = [int(t) for t in profile.timesteps]
    first, last = (round(each * len(calls)) if each < 1 else int(each) for each in (start, end))
    first, stop = max(first, 1), len(calls) - last
    while first < stop and calls[first] == calls[first - 1]:
        first += 1  # no threshold lies between equal timesteps
    while first < stop < len(calls) and calls[stop] == calls[stop - 1]:
        stop -= 1
    if first >= stop:
        return None
    after = calls[stop] if stop < len(calls) else calls[stop - 1] - 1
    hi = (calls[first - 1] + calls[first] + 1) // 2
    lo = (calls[stop - 1] + after) // 2
    return (lo, hi) if lo < hi else None
