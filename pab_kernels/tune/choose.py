"""Chooses settings for a wanted quality or speed: the profile gives a frontier, trials find the place on it."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from scipy.stats import t as student

from pab_kernels.config import PABConfig
from pab_kernels.tune.frontier import Candidate, predicted_error
from pab_kernels.tune.profile import Profile
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
    profile : Profile
    candidates : sequence of Candidate
        From `frontier.frontier`.
    target : Target

    Raises
    ------
    ValueError
        No candidate is as fast as the target.
    """

    def __init__(self, profile: Profile, candidates: Sequence[Candidate], target: Target) -> None:
        self._profile, self._candidates, self._target = profile, candidates, target
        most = candidates[-1].saving
        if target.measure == "speedup" and target.saving > most:
            raise ValueError(
                f"target: got {target}, must be at most speedup={1 / (1 - most):.2f}: no more can be saved"
            )

    def run(
        self,
        try_out: Callable[[str, PABConfig, int | None], Trial],
        named: Mapping[str, PABConfig],
        count: int,
        few: int,
    ) -> Iterator[Trial]:
        """Try the settings `named` on all videos, then up to `count` candidates; each trial as it is done.

        Candidates are tried on the first `few` videos, paired with the first of the named trials. The one that is then
        the best is tried on all; where it does not reach the target there, the search goes on below it.
        """
        trials = []
        for name, config in named.items():
            trials.append(try_out(name, config, None))
            yield trials[-1]
        anchor = trials[0]
        tuned: dict[int, Trial] = {}
        confirmed: set[int] = set()
        while True:
            index = self.propose(trials, tuned) if len(tuned) < count else None
            if index is not None:
                found = try_out(f"tuned {len(tuned) + 1}", self._candidates[index].config, few)
                tuned[index] = found if len(found.videos) == len(anchor.videos) else replace(found, anchor=anchor)
                trials.append(tuned[index])
                yield tuned[index]
                continue
            open_ = {i: trial for i, trial in tuned.items() if i not in confirmed and trial.anchor is not None}
            good = {i: trial for i, trial in open_.items() if reaches(trial, self._target)}
            if not open_ or (not good and confirmed):
                return
            index = max(
                good or open_, key=lambda i: open_[i].predicted if good else estimate(open_[i], self._target).low
            )
            known = [trial for i, trial in tuned.items() if i in confirmed and reaches(trial, self._target)]
            if known and max(trial.predicted for trial in known) >= open_[index].predicted:
                return
            confirmed.add(index)
            trials.remove(tuned[index])
            tuned[index] = try_out(tuned[index].name, self._candidates[index].config, None)
            trials.append(tuned[index])
            yield tuned[index]

    def propose(self, trials: Sequence[Trial], tuned: Mapping[int, Trial]) -> int | None:
        """Index of the next candidate, the one that should just reach the target; None where that is found.

        Parameters
        ----------
        trials : sequence of Trial
            All so far.
        tuned : mapping of int to Trial
            Those of candidates, by their index.
        """
        if self._target.measure == "speedup":
            index = next(i for i, c in enumerate(self._candidates) if c.saving >= self._target.saving)
            return None if index in tuned else index
        # Between the last that reached the target and the first that did not.
        first = max((i + 1 for i, trial in tuned.items() if reaches(trial, self._target)), default=0)
        last = min(
            (i - 1 for i, trial in tuned.items() if not reaches(trial, self._target)), default=len(self._candidates) - 1
        )
        if first > last:
            return None
        allowed = self._allowed_error(trials)
        inside = [i for i in range(first, last + 1) if self._candidates[i].error <= allowed]
        return inside[-1] if inside else first

    def _allowed_error(self, trials: Sequence[Trial]) -> float:
        """The predicted error at which the lower bound should be the target.

        In decibels quality falls as the error rises: in a line between the trials just above and just below the target,
        and one for one where there is none on one side.
        """
        wanted = self._quality(self._target.value)
        points = [
            (self._quality(estimate(trial, self._target).low), _decibels(error))
            for trial in trials
            if (error := predicted_error(self._profile, trial.config)) > 0
        ]
        above = min((point for point in points if point[0] >= wanted), default=None)
        below = max((point for point in points if point[0] < wanted), default=None)
        if above is not None and below is not None and above[1] < below[1]:
            share = (above[0] - wanted) / (above[0] - below[0])
            return 10 ** ((above[1] + share * (below[1] - above[1])) / 10)
        nearest = above or below
        if nearest is None:
            return statistics.median(candidate.error for candidate in self._candidates)
        return 10 ** ((nearest[1] + nearest[0] - wanted) / 10)

    def _quality(self, value: float) -> float:
        """A measure of quality in decibels: PSNR is, SSIM is by its distance to 1."""
        return value if self._target.quality == "psnr" else -_decibels(max(1 - value, 1e-9))


def _decibels(value: float) -> float:
    return 10 * math.log10(value)
