"""What is asked for, and which of the trials has it."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student

from pab_kernels.tune.trials import Trial

CONFIDENCE = 0.8
"""Of the lower bound of the mean quality: the videos tried are a sample of those that there could be."""
LARGEST_PSNR = 100.0
"""Of equal videos it is infinite, which no mean survives."""


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
    """Whether a trial has what the target asks for: quality as far as the mean is known, speed as predicted."""
    if target.measure == "speedup":
        return trial.predicted >= target.saving
    return estimate(trial, target).mean >= target.value


def best(trials: Sequence[Trial], target: Target) -> Trial:
    """The `preferred` of the trials on all videos; where there are none, of those on a few."""
    return preferred([trial for trial in trials if trial.anchor is None] or trials, target)


def preferred(trials: Sequence[Trial], target: Target) -> Trial:
    """Of the trials that reach the target the one that saves most; for a speed the one of best quality.

    If none reaches it, the one that comes nearest.
    """
    good = [trial for trial in trials if reaches(trial, target)]
    if (target.measure == "speedup") == bool(good):
        return max(good or trials, key=lambda trial: estimate(trial, target).mean)
    return max(good or trials, key=lambda trial: trial.predicted)


def error_of(quality: float, target: Target) -> float:
    """A quality as an error: the mean square of a PSNR, of SSIM the distance to 1."""
    return 10 ** (-quality / 10) if target.quality == "psnr" else max(1 - quality, 1e-9)
