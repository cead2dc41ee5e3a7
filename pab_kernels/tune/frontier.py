"""The settings with the least predicted error for what they save.

An output that is broadcast is wrong by what it would have changed since it was computed. What counts is that
difference as a share of the residual stream that it is added to (`Profile.impact`); squares add up over blocks and
steps. A forecast is wrong by what the line misses: with a second difference of s a step (`Profile.remainder`), n steps
after the last call that computed and d after the one before it, by ``s * n * (n + d) / 2``. So a profile predicts a
setting's error, up to a factor that trials tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pab_kernels.config import MLP_KINDS, PABConfig
from pab_kernels.schedule import Schedule, StepVariant
from pab_kernels.tune.profile import Profile

STACK_RANGES = (2, 3, 4, 5)
MULTIPLES = (2, 3, 4, 6)
"""Ranges of the other kinds, in ranges of the stack: calls at which no block runs renew nothing."""
STARTS = (1, 2, 3, 5, 0.15, 0.3, 0.5)
ENDS = (0, 1, 2, 0.1, 0.25)
"""Calls at either end of a run that are computed, or shares of it below 1."""
PRICES = tuple(np.geomspace(1e-4, 1e2, 13))
"""Of the error, against the share of time that is saved: each gives a place on the frontier."""


@dataclass(frozen=True)
class Candidate:
    """Settings, the error that the profile predicts, and the share of the denoising time that they should save."""

    config: PABConfig
    error: float
    saving: float


def predicted_error(profile: Profile, config: PABConfig) -> float:
    """The error that `config` should cause in all blocks, up to a factor; blocks that do not broadcast are left out."""
    return _error(profile, Schedule(config, profile.timesteps), {})


Rows = tuple[int, ...]
Known = dict[tuple[str, Rows, tuple[str, ...]], float]
"""Errors of a kind in some rows of the profile, by what each call does: most settings share them with others."""


def _error(profile: Profile, schedule: Schedule, known: Known) -> float:
    total = 0.0
    for kind in profile.parts:
        for rows, in_stack in _rows(profile, schedule.config, kind):
            calls = tuple(_call(step, kind, in_stack) for step in schedule)
            if (kind, rows, calls) not in known:
                at = list(rows)
                known[kind, rows, calls] = _rows_error(profile.impact[kind][at], profile.remainder[kind][at], calls)
            total += known[kind, rows, calls]
    return total


def _call(step: StepVariant, kind: str, in_stack: bool) -> str:
    if in_stack and step.stack:
        return "does not run"
    if not step.broadcasts(kind):
        return "computes"
    return "forecasts" if step.forecasts(kind) else "repeats"


def _rows_error(impact: NDArray[np.float64], remainder: NDArray[np.float64], calls: Sequence[str]) -> float:
    computed: list[int] = []
    total = 0.0
    for call, does in enumerate(calls):
        if does == "computes":
            computed.append(call)
        elif does == "forecasts":
            age, reach = call - computed[-1], call - computed[-2]
            # The remainder of a call looks one and two calls back: the first two have none.
            late = np.nanmean(remainder[:, max(computed[-1], 2) : call + 1], axis=1) * age * reach / 2
            total += float(late @ late)
        elif does == "repeats":
            late = impact[:, computed[-1] + 1 : call + 1].sum(axis=1)
            total += float(late @ late)
    return total


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


Settings = dict[str, Any]


def frontier(profile: Profile, saving: Callable[[Schedule], float]) -> list[Candidate]:
    """The settings with the least predicted error for what they save, from the least to the most.

    A coordinate search, at several prices of the error: kind after kind takes the window, range, order and
    blocks at which saving less price times error is most, until none changes. All settings that it weighs compete.

    Parameters
    ----------
    profile : Profile
    saving : callable
        The share of the denoising time that a schedule should save.
    """
    weighed: dict[PABConfig, Candidate] = {}
    known: Known = {}

    def weigh(chosen: dict[str, Settings]) -> Candidate:
        config = PABConfig(**{key: value for settings in chosen.values() for key, value in settings.items()})
        if config not in weighed:
            schedule = Schedule(config, profile.timesteps)
            weighed[config] = Candidate(config, _error(profile, schedule, known), saving(schedule))
        return weighed[config]

    scale = predicted_error(profile, PABConfig(**_settings("spatial", _window(profile, 1, 1), 2, 0)))
    scale = scale or _typical(profile)
    kinds = sorted(profile.parts, key=lambda kind: (kind != "stack", kind != "guidance"))
    for price in PRICES:
        chosen: dict[str, Settings] = {}
        for _ in range(2):
            before = dict(chosen)
            for kind in kinds:
                every = chosen.get("stack", {}).get("stack_range", 1)
                options = [{}, *_options(profile, kind, every)]
                found = [weigh({**chosen, kind: option}) for option in options]
                values = [candidate.saving - price * candidate.error / scale for candidate in found]
                chosen[kind] = options[int(np.argmax(values))]
            if chosen == before:
                break
    return _best(list(weighed.values()))


def _typical(profile: Profile) -> float:
    """An error to measure others by, where there is no spatial attention."""
    return float(np.nanmean([np.nanmean(profile.impact[kind] ** 2) for kind in profile.parts])) or 1.0


def _best(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats, from the least saving to the most."""
    found: list[Candidate] = []
    least = math.inf
    for candidate in sorted(candidates, key=lambda each: (-each.saving, each.error)):
        if candidate.error < least and candidate.saving > 0:
            least = candidate.error
            found.append(candidate)
    return found[::-1]


def _options(profile: Profile, kind: str, every: int) -> Iterator[Settings]:
    """Windows, ranges, orders and blocks of a kind; `every` is the stack's range."""
    ranges = STACK_RANGES if kind == "stack" else tuple(multiple * every for multiple in MULTIPLES)
    coarse = kind in ("stack", "guidance")
    windows = [
        _window(profile, start, end)
        for start in (STARTS if coarse else (1, 0.15, 0.3))
        for end in (ENDS if coarse else (1, 0.1))
    ]
    for window in dict.fromkeys(window for window in windows if window is not None):
        for step in ranges:
            for order in (0, 1):
                settings = _settings(kind, window, step, order)
                yield settings
                yield from (settings | {f"{kind}_block": part} for part in _blocks(profile, kind))


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


def _settings(kind: str, window: tuple[int, int] | None, every: int, order: int) -> Settings:
    if window is None:
        return {}
    found = {f"{kind}_broadcast": True, f"{kind}_threshold": window, f"{kind}_range": every}
    return found | ({f"{kind}_order": order} if order else {})


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
