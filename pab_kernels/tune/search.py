"""Proposes settings for a target: what trials so far tell of others, and which others are worth a trial."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import least_squares
from scipy.stats import norm

from pab_kernels.config import PABConfig
from pab_kernels.tune.choose import Target, error_of, estimate, preferred, reaches
from pab_kernels.tune.frontier import Candidate, Frontier
from pab_kernels.tune.trials import Trial

Array = NDArray[np.float64]

NEAR = 6.0
"""Decibels from the target at which a trial counts a third as much in the fit of factors."""
STIFFNESS = 0.2
"""Of the factors of different kinds against each other, as a share of the weight of a trial at the target."""
SPREAD = 0.5
"""Standard deviation of the logarithm of an error about what the fit gives."""
ALIKE = 0.3
"""Share of the calls that differ between two settings at which that deviation is alike by 1 / e."""
NOISE = 0.03
"""Of the logarithm of an error, where an estimate has no margin."""
DEPTH = 2
"""Steps from the trials that a walk goes at most: further away too little is known."""
BEAM = 3
"""Settings from which the walk goes on at once."""
CAUTION = math.log(10) / 20
"""By which the logarithm of the error must be lower for every trial in a row that missed a quality: half a decibel."""
LEAST = 0.0005
"""A hope that is worth no trial: of a share of the time, or of the logarithm of an error."""
TINY = 1e-12
SLOW = -1000.0
"""The hope in what is slower than the target."""


class Predictor:
    """What trials tell of other settings: the logarithm of their error, and its standard deviation.

    The error of a video is the sum of the kinds' errors (`Profile.parts`) times factors, which are fitted. What the fit
    misses is alike where runs are alike: a Gaussian process over the calls that differ.

    Parameters
    ----------
    frontier : Frontier
    target : Target
    trials : sequence of Trial
    """

    def __init__(self, frontier: Frontier, target: Target, trials: Sequence[Trial]) -> None:
        weighed = [frontier.weigh(trial.config) for trial in trials]
        found = [estimate(trial, target) for trial in trials]
        seen = np.log([error_of(each.mean, target) for each in found])
        margins = np.log([error_of(each.low, target) for each in found]) - seen
        goal = target.value if target.measure != "speedup" else found[0].mean
        self._factors = _fit(_errors(weighed), seen, math.log(error_of(goal, target)))
        self._steps = np.array([each.steps for each in weighed])
        noise = np.diag(margins**2 + NOISE**2)
        self._process = cho_factor(_alike(self._steps, self._steps) + noise)
        self._weights = cho_solve(self._process, seen - self._base(weighed))

    def __call__(self, candidates: Sequence[Candidate]) -> tuple[Array, Array]:
        """Means and standard deviations, [candidates]."""
        shared = _alike(np.array([each.steps for each in candidates]), self._steps)
        known = np.einsum("ij,ji->i", shared, cho_solve(self._process, shared.T))
        return self._base(candidates) + shared @ self._weights, np.sqrt(np.maximum(SPREAD**2 - known, NOISE**2))

    def _base(self, candidates: Sequence[Candidate]) -> Array:
        result: Array = np.log(_errors(candidates) @ self._factors + 1e-9)
        return result


def _errors(candidates: Sequence[Candidate]) -> Array:
    return np.array([each.errors for each in candidates])


def _alike(steps: NDArray[np.int64], others: NDArray[np.int64]) -> Array:
    """Covariance of what the fit misses, [steps, others], by the share of the calls that differ."""
    differ = (steps[:, None] != others[None]).mean(axis=2)
    result: Array = SPREAD**2 * np.exp(-differ / ALIKE)
    return result


def _fit(errors: Array, seen: Array, goal: float) -> Array:
    """Factors of the `errors` [trials, kinds] that give what was `seen` [trials], in logarithms.

    Trials near the `goal` count more, and factors stay near each other unless the trials pull them apart.
    """
    weights = np.exp(-np.abs(seen - goal) / math.log(10) * 10 / NEAR)

    def misses(logs: Array) -> Array:
        found = np.log(errors @ np.exp(logs[0] + logs[1:]) + 1e-9)
        return np.concatenate([weights * (found - seen), STIFFNESS * logs[1:]])

    start = np.zeros(1 + errors.shape[1])
    start[0] = np.average(seen - np.log(errors.sum(axis=1) + 1e-9), weights=weights)
    logs = least_squares(misses, start).x
    result: Array = np.exp(logs[0] + logs[1:])
    return result


class Search:
    """Tries settings, one after the other, until no better ones are likely.

    Parameters
    ----------
    frontier : Frontier
    target : Target
    """

    def __init__(self, frontier: Frontier, target: Target) -> None:
        self._frontier, self._target = frontier, target

    def run(
        self,
        try_out: Callable[[str, PABConfig, int | None], Trial],
        named: Mapping[str, PABConfig],
        count: int,
        few: int,
    ) -> Iterator[Trial]:
        """Try the settings `named` on all videos, then up to `count` others; each trial as it is done.

        Those are tried on the first `few` videos, paired with the last trial on all; whatever seems better than all
        trials before is then tried on all too.

        Raises
        ------
        ValueError
            No settings are as fast as the target.
        """
        trials = []
        for name, settings in named.items():
            trials.append(try_out(name, settings, None))
            yield trials[-1]
        anchor, misses = trials[0], 0
        for number in range(1, count + 1):
            config = self.propose(trials, misses)
            if config is None:
                return
            name = f"tuned {number}"
            found = try_out(name, config, few)
            if len(found.videos) < len(anchor.videos):
                found = replace(found, anchor=anchor)
                if preferred([*(trial for trial in trials if trial.anchor is None), found], self._target) is found:
                    yield found
                    found = anchor = try_out(name, config, None)
            trials.append(found)
            yield found
            misses = 0 if reaches(found, self._target) else misses + 1

    def propose(self, trials: Sequence[Trial], misses: int = 0) -> PABConfig | None:
        """The settings from which most may be hoped, after so many `misses` in a row; None where that is nothing.

        The search walks from the best trial, and from the one nearest to the target, to whatever near has most hope.

        Raises
        ------
        ValueError
            No settings are as fast as the target.
        """
        reached = [trial for trial in trials if reaches(trial, self._target)]
        tried = {self._frontier.weigh(trial.config).steps for trial in trials}
        hopes = self._hopes(trials, reached, misses)
        front = {preferred(trials, self._target).config: None, min(trials, key=self._distance).config: None}
        chosen, hope = None, -math.inf
        for _ in range(DEPTH):
            near = {each.steps: each for config in front for each in self._frontier.near(config)}
            new = [each for steps, each in near.items() if steps not in tried and each.saving > 0]
            found = hopes(new)
            order = [index for index in np.argsort(-found, kind="stable")[:BEAM] if found[index] > hope]
            front = {new[index].config: None for index in order}
            if order:
                chosen, hope = new[order[0]], float(found[order[0]])
        if chosen is None or (reached and hope < math.log(LEAST)):
            return None
        if self._target.measure == "speedup" and chosen.saving < self._target.saving:
            most = 1 / (1 - chosen.saving)
            raise ValueError(f"target: got {self._target}, must be at most speedup={most:.2f}: no more can be saved")
        return chosen.config

    def _hopes(
        self, trials: Sequence[Trial], reached: Sequence[Trial], misses: int
    ) -> Callable[[Sequence[Candidate]], Array]:
        """The logarithm of what each of some candidates may bring beyond the best of the trials.

        Of a quality that is the time saved, times the probability that the target is reached, with more to spare the
        more trials in a row have missed it: of many candidates the likeliest is one that is predicted too well. Of a
        speed, by how much the logarithm of the error should be lower, and of what is too slow less than of all others.
        """
        predictor = Predictor(self._frontier, self._target, trials)
        speed = self._target.measure == "speedup"
        most = max((trial.predicted for trial in reached), default=0.0)
        least = min(map(self._log_error, reached or trials))
        allowed = None if speed else math.log(error_of(self._target.value, self._target)) - CAUTION * misses

        def hopes(candidates: Sequence[Candidate]) -> Array:
            if not candidates:
                return np.zeros(0)
            means, deviations = predictor(candidates)
            savings = np.array([each.saving for each in candidates])
            if allowed is not None:
                likely = norm.logcdf((allowed - means) / deviations)
                return np.log(np.maximum(savings - most, TINY)) + likely
            z = (least - means) / deviations
            drops = deviations * (z * norm.cdf(z) + norm.pdf(z))
            return np.where(savings >= self._target.saving, np.log(drops + TINY), SLOW + savings)

        return hopes

    def _distance(self, trial: Trial) -> float:
        """From the target, in logarithms of the error; of a speed, in time."""
        if self._target.measure == "speedup":
            return abs(trial.predicted - self._target.saving)
        return abs(self._log_error(trial) - math.log(error_of(self._target.value, self._target)))

    def _log_error(self, trial: Trial) -> float:
        return math.log(error_of(estimate(trial, self._target).mean, self._target))
