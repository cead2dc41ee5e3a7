"""The settings with the least predicted error for what they save.

An output that is broadcast is wrong by what it would have changed since it was computed. What counts is that
difference as a share of the residual stream that it is added to (`Profile.impact`), times how far the sampler moves by
the call (`Profile.moves`). Repeated outputs all lag behind, so over the calls of a run their errors add up. A forecast
is wrong by what the line misses: with a second difference of s a step (`Profile.remainder`), n steps after the last
call that computed and d after the one before it, by ``s * n * (n + d) / 2``, now this way and now that, so squares add
up, as they do over blocks. What an error of a kind does to the video is a factor that trials tell.
"""

from __future__ import annotations

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
PRICES = tuple(np.geomspace(0.02, 5.0, 7))
"""Of the error, as a share of the one that is allowed, against the share of time that is saved."""
Settings = dict[str, Any]
Rows = tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """Settings, the errors of `Profile.parts` that are predicted, and the share of the denoising time they should save.

    Errors of different kinds compare once they are multiplied by factors that trials tell.
    """

    config: PABConfig
    errors: tuple[float, ...]
    saving: float


class Frontier:
    """Weighs settings, and finds those that save most for their error.

    Parameters
    ----------
    profile : Profile
    saving : callable
        The share of the denoising time that a schedule should save.

    Attributes
    ----------
    candidates : list of Candidate
        All that have been weighed and save anything, in the order of weighing.
    """

    def __init__(self, profile: Profile, saving: Callable[[Schedule], float]) -> None:
        self.candidates: list[Candidate] = []
        self._profile, self._saving = profile, saving
        self._weighed: dict[frozenset[tuple[str, Any]], Candidate] = {}
        self._known: dict[tuple[str, Rows, tuple[str, ...]], float] = {}  # most settings share it with others

    def errors(self, config: PABConfig) -> tuple[float, ...]:
        """The error of each kind of `Profile.parts` that `config` should cause; other blocks are left out."""
        return self._errors(Schedule(config, self._profile.timesteps))

    def search(self, factors: NDArray[np.float64], allowed: float) -> None:
        """Weigh settings about those that cause the error `allowed`, by `factors` of the errors of each kind.

        A coordinate search, at several prices of the error: kind after kind takes the window, range, order and blocks
        at which saving less price times error is most, until none changes.
        """
        profile, scaled = self._profile, factors / allowed
        kinds = sorted(profile.parts, key=lambda kind: (kind != "stack", kind != "guidance"))
        for price in PRICES:
            chosen: dict[str, Settings] = {}
            for _ in range(2):
                before = dict(chosen)
                for kind in kinds:
                    every = chosen.get("stack", {}).get("stack_range", 1)
                    options = [{}, *_options(profile, kind, every)]
                    found = [self._weigh({**chosen, kind: option}) for option in options]
                    errors = np.array([each.errors for each in found]) @ scaled
                    chosen[kind] = options[int(np.argmax([each.saving for each in found] - price * errors))]
                if chosen == before:
                    break

    def _weigh(self, chosen: dict[str, Settings]) -> Candidate:
        settings = {key: value for each in chosen.values() for key, value in each.items()}
        key = frozenset(settings.items())
        if key not in self._weighed:
            schedule = Schedule(PABConfig(**settings), self._profile.timesteps)
            found = Candidate(schedule.config, self._errors(schedule), self._saving(schedule))
            self._weighed[key] = found
            if found.saving > 0:
                self.candidates.append(found)
        return self._weighed[key]

    def _errors(self, schedule: Schedule) -> tuple[float, ...]:
        return tuple(self._kind_error(schedule, kind) for kind in self._profile.parts)

    def _kind_error(self, schedule: Schedule, kind: str) -> float:
        profile, total = self._profile, 0.0
        for rows, in_stack in _rows(profile, schedule.config, kind):
            calls = tuple(_call(step, kind, in_stack) for step in schedule)
            if (kind, rows, calls) not in self._known:
                at = list(rows)
                measures = profile.impact[kind][at], profile.remainder[kind][at], profile.moves
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
    impact: NDArray[np.float64], remainder: NDArray[np.float64], moves: NDArray[np.float64], calls: Sequence[str]
) -> float:
    computed: list[int] = []
    forecast, lag = 0.0, np.zeros(len(impact))
    for call, does in enumerate(calls):
        if does == "computes":
            computed.append(call)
        elif does == "forecasts":
            age, reach = call - computed[-1], call - computed[-2]
            # The remainder of a call looks one and two calls back: the first two have none.
            missed = np.nanmean(remainder[:, max(computed[-1], 2) : call + 1], axis=1) * age * reach / 2 * moves[call]
            forecast += float(missed @ missed)
        elif does == "repeats":
            lag += impact[:, computed[-1] + 1 : call + 1].sum(axis=1) * moves[call]
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


def _options(profile: Profile, kind: str, every: int) -> Iterator[Settings]:
    """Windows, ranges, orders and blocks of a kind; `every` is the stack's range."""
    ranges = STACK_RANGES if kind == "stack" else tuple(multiple * every for multiple in MULTIPLES)
    if kind == "guidance" and every > 1:
        ranges = (every, *ranges)
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
