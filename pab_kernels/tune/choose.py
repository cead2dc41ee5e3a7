"""Chooses settings for a wanted quality or speed: the profile predicts errors, trials tell what they do to videos."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.stats import t as student

from pab_kernels.config import PABConfig
from pab_kernels.tune.frontier import Frontier
from pab_kernels.tune.trials import Trial

CONFIDENCE = 0.8
"""Of the lower bound of the mean quality: the videos tried are a sample of those that there could be."""
LARGEST_PSNR = 100.0
"""Of equal videos it is infinite, which no mean survives."""
NEAR = 6.0
"""Decibels from the target at which a trial counts a third as much."""
STIFFNESS = 0.2
"""Of the factors of different kinds against each other, as a share of the weight of a trial at the target."""
CLOSE = 1.0
"""Decibels above the target at which no more is asked for."""
SPEED_QUALITY = 30.0
"""Decibels about which settings of a wanted speed are searched."""


@dataclass(frozen=True)
class Target:
    """At least `value` of `measure`: mean "psnr" in dB, mean "ssim", or "speedup" of the denoising."""

    measure: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read "psnr=30", "ssim=0.9" or "speedup=1.2".

        Raises
        ------
        ValueError
            Another text, or a value that no settings could have.
        """
        match = re.fullmatch(r"(psnr|ssim|speedup)=(\d+(?:\.\d+)?)", text)
        if match is None:
            raise ValueError(f"target: got {text!r}, must be psnr=DB, ssim=VALUE or speedup=FACTOR, such as psnr=30")
        measure, value = match[1], float(match[2])
        lo, hi = {"psnr": (0.0, LARGEST_PSNR), "ssim": (0.0, 1.0), "speedup": (1.0, math.inf)}[measure]
        if not lo < value < hi:
            raise ValueError(f"target: got {text!r}, {measure} must be above {lo:g} and below {hi:g}")
        return cls(measure, value)

    @property
    def quality(self) -> str:
        """The measure of quality that counts: of a speed-up's settings the PSNR."""
        return "psnr" if self.measure == "speedup" else self.measure

    @property
    def saving(self) -> float:
        """The share of the time that a speed-up saves."""
        return 1 - 1 / self.value

    def __str__(self) -> str:
        return f"{self.measure}={self.value:g}"


@dataclass(frozen=True)
class Estimate:
    """A mean, and the `margin` by which the true one may be lower."""

    mean: float
    margin: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Of all videos that there could be, by those tried.

        By Student's t, one-sided, at `CONFIDENCE`. One video tells nothing of others: its margin is infinite.
        """
        values = _bounded(values)
        if len(values) < 2:
            return cls(values[0], math.inf)
        error = statistics.stdev(values) / math.sqrt(len(values))
        return cls(statistics.fmean(values), float(student.ppf(CONFIDENCE, len(values) - 1)) * error)

    @classmethod
    def paired(cls, values: Sequence[float], anchor: Sequence[float]) -> Estimate:
        """Of the videos of `anchor`, by the differences on the first of them.

        Videos differ far more from each other than settings do on one video, so a few pairs tell what many videos
        would: the anchor's mean and the mean difference, with the standard error of the differences.
        """
        differences = [a - b for a, b in zip(_bounded(values), _bounded(anchor), strict=False)]
        found = cls.of(differences)
        return cls(statistics.fmean(_bounded(anchor)) + found.mean, found.margin)

    @property
    def low(self) -> float:
        """What the mean over all videos should exceed."""
        return self.mean - self.margin


def _bounded(values: Sequence[float]) -> list[float]:
    return [min(value, LARGEST_PSNR) for value in values]


def estimate(trial: Trial, target: Target) -> Estimate:
    """The mean over the search's videos of the measure of quality that counts: known, or by paired differences."""
    values = trial.values(target.quality)
    if trial.anchor is None:
        return Estimate(statistics.fmean(_bounded(values)), 0.0)
    return Estimate.paired(values, trial.anchor.values(target.quality))


def reaches(trial: Trial, target: Target) -> bool:
    """Whether a trial has what the target asks for: quality by its lower bound, speed as predicted."""
    if target.measure == "speedup":
        return trial.predicted >= target.saving
    return estimate(trial, target).low >= target.value


def best(trials: Sequence[Trial], target: Target) -> Trial:
    """Of the trials that reach the target the one that saves most; for a speed the one of best quality.

    Those on all videos go before those on a few. If none reaches it, the one that comes nearest.
    """
    trials = [trial for trial in trials if trial.anchor is None] or trials
    good = [trial for trial in trials if reaches(trial, target)]
    if (target.measure == "speedup") == bool(good):
        return max(good or trials, key=lambda trial: estimate(trial, target).low)
    return max(good or trials, key=lambda trial: trial.predicted)


class Search:
    """Proposes candidates, one after the other, until no better one is left.

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
        """Try the settings `named` on all videos, then up to `count` candidates; each trial as it is done.

        Candidates are tried on the first `few` videos, paired with the first of the named trials. The one that is then
        the best is tried on all; where it does not reach the target there, the next best.

        Raises
        ------
        ValueError
            No candidate is as fast as the target.
        """
        trials = []
        for name, settings in named.items():
            trials.append(try_out(name, settings, None))
            yield trials[-1]
        anchor = trials[0]
        tuned: dict[PABConfig, Trial] = {}
        config: PABConfig | None
        while len(tuned) < count:
            factors = self.factors(trials)
            if len(tuned) in (0, count // 2):
                about = SPEED_QUALITY if self._target.measure == "speedup" else self._target.value
                self._frontier.search(factors, _error_of(about, self._target))
                self._check_speed()
            config = self.propose(factors, trials, _misses(list(tuned.values()), self._target))
            if config is None:
                break
            found = try_out(f"tuned {len(tuned) + 1}", config, few)
            tuned[config] = found if len(found.videos) == len(anchor.videos) else replace(found, anchor=anchor)
            trials.append(tuned[config])
            yield tuned[config]
        confirmed: list[Trial] = [trial for trial in tuned.values() if trial.anchor is None]
        while not any(reaches(trial, self._target) for trial in confirmed):
            open_ = [trial for trial in trials if trial.anchor is not None]
            good = [trial for trial in open_ if reaches(trial, self._target)]
            if not open_ or (not good and confirmed):
                return
            chosen = best(good or open_, self._target)
            trials.remove(chosen)
            confirmed.append(try_out(chosen.name, chosen.config, None))
            yield confirmed[-1]

    def propose(self, factors: NDArray[np.float64], trials: Sequence[Trial], misses: int) -> PABConfig | None:
        """The candidate that should reach the target and save most; None where one that was tried is as good.

        Of a speed, the one of the best quality. Where none should reach the target, and none that was tried is close to
        it, the one that comes nearest. After so many `misses` in a row the target is a decibel higher for each.
        """
        tried = {trial.config for trial in trials}
        candidates = [each for each in self._frontier.candidates if each.config not in tried]
        if not candidates:
            return None
        errors = np.array([each.errors for each in candidates]) @ factors
        savings = np.array([each.saving for each in candidates])
        reached = [trial for trial in trials if reaches(trial, self._target)]
        if self._target.measure == "speedup":
            fast = savings >= self._target.saving
            least = min((self._error(trial) for trial in reached), default=math.inf)
            index = int(np.argmin(np.where(fast, errors, np.inf)))
            return candidates[index].config if fast[index] and errors[index] < least else None
        most = max((trial.predicted for trial in reached), default=0.0)
        allowed = _error_of(self._target.value, self._target)
        good = (errors <= allowed / 10 ** (misses / 10)) & (savings > most)
        if good.any():
            return candidates[int(np.argmax(np.where(good, savings, -np.inf)))].config
        if any(self._error(trial) > allowed / 10 ** (CLOSE / 10) for trial in reached):
            return None
        nearest = np.where(savings > most, errors, np.inf)
        return candidates[int(np.argmin(nearest))].config if np.isfinite(nearest).any() else None

    def factors(self, trials: Sequence[Trial]) -> NDArray[np.float64]:
        """What the errors of each kind of `Profile.parts` do to a video, as the trials so far tell.

        The error of a video is the sum of the kinds' errors times their factors: a fit in the logarithm, in which
        trials near the target count more and factors stay near each other unless the trials pull them apart.
        """
        errors = np.array([self._frontier.errors(trial.config) for trial in trials])
        seen = np.log([self._error(trial) for trial in trials])
        wanted = self._target.value if self._target.measure != "speedup" else estimate(trials[0], self._target).low
        distances = np.abs(seen - math.log(_error_of(wanted, self._target))) / math.log(10) * 10  # in dB
        weights, floor = np.exp(-distances / NEAR), 1e-9

        def misses(logs: NDArray[np.float64]) -> NDArray[np.float64]:
            found = np.log(errors @ np.exp(logs[0] + logs[1:]) + floor)
            return np.concatenate([weights * (found - seen), STIFFNESS * logs[1:]])

        start = np.zeros(1 + errors.shape[1])
        start[0] = np.average(seen - np.log(errors.sum(axis=1) + floor), weights=weights)
        logs = least_squares(misses, start).x
        return np.exp(logs[0] + logs[1:])

    def _check_speed(self) -> None:
        most = max((each.saving for each in self._frontier.candidates), default=0.0)
        if self._target.measure == "speedup" and self._target.saving > most:
            raise ValueError(
                f"target: got {self._target}, must be at most speedup={1 / (1 - most):.2f}: no more can be saved"
            )

    def _error(self, trial: Trial) -> float:
        """What a trial's quality is as an error, by the lower bound."""
        return _error_of(estimate(trial, self._target).low, self._target)


def _misses(trials: Sequence[Trial], target: Target) -> int:
    """How many of the last trials in a row do not reach the target."""
    return next((i for i, trial in enumerate(reversed(trials)) if reaches(trial, target)), len(trials))


def _error_of(quality: float, target: Target) -> float:
    """A quality as an error: the mean square of a PSNR, of SSIM the distance to 1."""
    return 10 ** (-quality / 10) if target.quality == "psnr" else max(1 - quality, 1e-9)
