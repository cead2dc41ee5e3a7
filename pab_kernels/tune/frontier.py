"""The settings with the least predicted error for what they save.

An output that is broadcast is wrong by what it would have changed since it was computed. What counts is that
difference as a share of the residual stream that it is added to (`Profile.impact`); squares add up over blocks and
steps. So a profile predicts a setting's error, up to a factor that trials tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pab_kernels.config import PABConfig
from pab_kernels.schedule import Schedule
from pab_kernels.tune.profile import Profile

RANGES = range(2, 11)


@dataclass(frozen=True)
class Candidate:
    """Settings, the error that the profile predicts, and the share of the denoising time that they should save."""

    config: PABConfig
    error: float
    saving: float


def predicted_error(profile: Profile, config: PABConfig) -> float:
    """The error that the ranges and thresholds of `config` should cause in all blocks, up to a factor."""
    schedule = Schedule(config, profile.timesteps)
    total = 0.0
    for kind in profile.kinds:
        impact = profile.impact[kind]
        late = np.zeros(len(impact))
        for call, step in enumerate(schedule):
            if getattr(step, kind):
                late = late + impact[:, call]
                total += float(late @ late)
            else:
                late = np.zeros(len(impact))
    return total


def frontier(profile: Profile, unit_savings: Mapping[str, float]) -> list[Candidate]:
    """The settings with the least predicted error for what they save, from the least to the most.

    Every window and range is weighed for each kind by itself, then all combinations of the best.

    Parameters
    ----------
    profile : Profile
    unit_savings : mapping of str to float
        For each kind of attention: the share of a step that its broadcast saves.
    """
    kinds = profile.kinds
    options = [_best_windows(profile, kind) for kind in kinds]
    grids = np.meshgrid(*(np.arange(len(option)) for option in options), indexing="ij")
    picks = np.stack([grid.ravel() for grid in grids], axis=1)  # [combinations, kinds]
    error, saving = np.zeros(len(picks)), np.zeros(len(picks))
    for column, (kind, option) in enumerate(zip(kinds, options, strict=True)):
        error += np.array([window.error for window in option])[picks[:, column]]
        counts = np.array([window.broadcasts for window in option])[picks[:, column]]
        saving += counts * unit_savings[kind] / len(profile.timesteps)
    found: list[Candidate] = []
    least = math.inf
    for index in np.lexsort((error, -saving)):  # from the most saving; of equal ones the least error first
        if error[index] < least:
            least = error[index]
            windows = {kind: option[pick] for kind, option, pick in zip(kinds, options, picks[index], strict=True)}
            config = PABConfig(**_settings(windows, profile.timesteps))
            found.append(Candidate(config, float(error[index]), float(saving[index])))
    return [candidate for candidate in reversed(found) if candidate.saving > 0]


@dataclass(frozen=True)
class _Window:
    """Calls [first, end) broadcast, but for every `every`-th; `error` is predicted."""

    first: int
    end: int
    every: int
    broadcasts: int
    error: float


def _best_windows(profile: Profile, kind: str) -> list[_Window]:
    """For each number of broadcast calls the window and range with the least error, and the empty window."""
    impact = profile.impact[kind]
    calls = [int(t) for t in profile.timesteps]
    best = {0: _Window(0, 0, 1, 0, 0.0)}
    for every in RANGES:
        for first in range(1, len(calls)):
            if calls[first] == calls[first - 1]:
                continue  # no threshold lies between them
            late = np.zeros(len(impact))
            broadcasts, error = 0, 0.0
            for call in range(first, len(calls)):
                if call % every == 0:
                    late = np.zeros(len(impact))
                    continue
                late = late + impact[:, call]
                error += float(late @ late)
                broadcasts += 1
                ends = call + 1 == len(calls) or calls[call + 1] != calls[call]
                if ends and (broadcasts not in best or error < best[broadcasts].error):
                    best[broadcasts] = _Window(first, call + 1, every, broadcasts, error)
    return [best[count] for count in sorted(best)]


def _settings(windows: Mapping[str, _Window], timesteps: Sequence[float]) -> dict[str, Any]:
    """The keys of `PABConfig` for these windows. Thresholds lie halfway between timesteps, so they fit other runs."""
    calls = [int(t) for t in timesteps]
    settings: dict[str, Any] = {}
    for kind, window in windows.items():
        if window.broadcasts:
            after = calls[window.end] if window.end < len(calls) else calls[window.end - 1] - 1
            lo = (calls[window.end - 1] + after) // 2
            hi = (calls[window.first - 1] + calls[window.first] + 1) // 2
            settings |= {f"{kind}_broadcast": True, f"{kind}_threshold": (lo, hi), f"{kind}_range": window.every}
    return settings
