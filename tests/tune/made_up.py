"""Profiles and savings that are made up."""

from collections.abc import Callable

import numpy as np

from pab_kernels.schedule import Schedule
from pab_kernels.tune.profile import Profile

UNIT_SAVINGS = {"spatial": 0.2, "temporal": 0.15, "cross": 0.08}


def made_up(calls: int, kinds=("spatial", "temporal", "cross"), blocks: int = 2, seed: int = 0) -> Profile:
    rng = np.random.default_rng(seed)
    rows = {kind: {"stack": 1 + blocks // 4, "guidance": 1}.get(kind, blocks) for kind in kinds}
    impact = {kind: np.hstack([np.full((n, 1), np.nan), rng.random((n, calls - 1))]) for kind, n in rows.items()}
    left = {kind: np.where(np.arange(calls) < 2, np.nan, values / 2) for kind, values in impact.items()}
    return Profile(tuple(np.linspace(999, 20, calls).round()), impact, impact, impact, left)


def savings(profile: Profile) -> Callable[[Schedule], float]:
    """The share of a run that settings save, by the units of each kind."""

    def saving(schedule: Schedule) -> float:
        left = 0.0
        for step in schedule:
            if not step.stack:
                rest = 1 - sum(unit for kind, unit in UNIT_SAVINGS.items() if step.broadcasts(kind))
                left += rest / 2 if step.guidance else rest
        return 1 - left / len(profile.timesteps)

    return saving
