"""How much attention outputs change from one denoising step to the next: what PAB rests on."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pab_kernels.config import KINDS
from pab_kernels.files import replaced
from pab_kernels.pipelines.generate import OnStep, Request, generate
from pab_kernels.pipelines.loading import Pipeline
from pab_kernels.tapped import TappedBlocks

EDGE = 0.15
"""The PAB document's split: 15 % of the steps at either end, and 70 % between them."""
FLAT = 2.0
"""The flat middle is where the difference is at most this many times its smallest."""
MEASURES = ("relative_l2", "mse", "impact")
COLUMNS = ("kind", "block", "step", "timestep", *MEASURES)


MOST = 10_000
"""Blocks and steps."""


@dataclass(frozen=True)
class Profile:
    """Differences between the attention outputs of each step and of the step before.

    Each measure is, for each kind, an array [blocks, calls], with a row for each block that has this kind, in the
    order of the model. The first call has no step before it: NaN.

    Attributes
    ----------
    timesteps : tuple of float
        Of every call of the transformer.
    relative_l2 : dict of str to array
        ``||new - old|| / ||new||``.
    mse : dict of str to array
        Mean of ``(new - old) ** 2``, which is what the PAB document shows.
    impact : dict of str to array
        ``||new - old|| / ||stream||``, where the stream is the residual stream with the output added: what the next
        block sees of the difference. `tune` predicts quality from it.
    """

    timesteps: tuple[float, ...]
    relative_l2: dict[str, NDArray[np.float64]]
    mse: dict[str, NDArray[np.float64]]
    impact: dict[str, NDArray[np.float64]]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of attention that the model has."""
        return tuple(kind for kind in KINDS if kind in self.relative_l2)

    @property
    def edges(self) -> tuple[int, int]:
        """First step of the middle 70 %, and the first after it."""
        edge = round(EDGE * len(self.timesteps))
        return edge, len(self.timesteps) - edge

    def to_csv(self, path: Path) -> None:
        """Write a row for every kind, block and step but the first; a file there is replaced once this is complete."""
        with replaced(path) as partial, partial.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for kind in self.kinds:
                measures = [getattr(self, measure)[kind] for measure in MEASURES]
                for block, step in np.ndindex(measures[0].shape):
                    if step > 0:
                        row = [f"{values[block, step]:.6g}" for values in measures]
                        writer.writerow((kind, block, step, f"{self.timesteps[step]:g}", *row))

    @classmethod
    def from_csv(cls, path: Path, timesteps: Sequence[float]) -> Profile:
        """Read what `to_csv` wrote for a run over `timesteps`.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            It is no such file, or one of a run over other timesteps.
        """
        rows = read_rows(path)
        found = {row.step: row.timestep for row in rows}
        if found != {step: f"{t:g}" for step, t in enumerate(timesteps) if step > 0}:
            raise ValueError(f"profile: {path} is of other timesteps than the {len(timesteps)} of this run")
        measures: dict[str, dict[str, NDArray[np.float64]]] = {measure: {} for measure in MEASURES}
        for kind in KINDS:
            own = [row for row in rows if row.kind == kind]
            if own:
                shape = (1 + max(row.block for row in own), len(timesteps))
                for measure, values in measures.items():
                    values[kind] = np.full(shape, np.nan)
                    for row in own:
                        values[kind][row.block, row.step] = row.measures[measure]
        return cls(tuple(timesteps), **measures)


@dataclass(frozen=True)
class Row:
    """A line of the file: the change of one kind of attention in one block at one step."""

    kind: str
    block: int
    step: int
    timestep: str
    measures: Mapping[str, float]


def read_rows(path: Path) -> list[Row]:
    """The lines of what `Profile.to_csv` wrote, which can be known before there is a run to compare them with.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is no such file; the message names the line.
    """
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"the columns are {reader.fieldnames!r:.200}, must be {', '.join(COLUMNS)}")
            for line in reader:
                block, step = int(line["block"]), int(line["step"])
                if line["kind"] not in KINDS or not 0 <= block < MOST or not 0 < step < MOST:
                    raise ValueError(f"got {line['kind']!r:.80}, block {block}, step {step}")
                measures = {measure: float(line[measure]) for measure in MEASURES}
                rows.append(Row(line["kind"], block, step, line["timestep"], measures))
        except (ValueError, TypeError, csv.Error) as error:
            raise ValueError(f"profile: {path} is no profile, line {reader.line_num}: {error}") from error
    return rows


class Profiler(TappedBlocks):
    """Measures one run of a host, which computes everything; its outputs are what they are without it.

    In memory is what each branch gave at the call before: one slot a branch.

    Parameters
    ----------
    host : nn.Module
        As for `TappedBlocks`.
    forwards_per_step : int
        How often a step calls the host: 2 in Wan's pipelines. Each of these calls is compared with its like at the step
        before, and the measures are the mean of all.
    """

    def __init__(self, host: nn.Module, forwards_per_step: int = 1) -> None:
        self._forwards = forwards_per_step
        self._before: dict[tuple[str, int, str, int], Tensor] = {}
        self._norms: dict[tuple[str, int, str], list[Tensor]] = {}
        self._numel = 0
        super().__init__(host)

    def close(self) -> None:
        super().close()
        self._before.clear()

    def branch(
        self,
        kind: str,
        index: int,
        name: str,
        stream: Tensor,
        compute: Callable[[], Tensor],
        gate: Tensor | None = None,
    ) -> Tensor:
        """The branch's output; attention is compared with what the call before gave."""
        value = compute() if gate is None else gate * compute()
        if name != "mlp":
            # Open-Sora's temporal blocks have cross-attention too.
            key = ("cross" if name == "cross" else kind, index, kind)
            own = (*key, self.call % self._forwards)
            before = self._before.get(own)
            if before is not None:
                norms = [
                    torch.linalg.vector_norm(x, dtype=torch.float32) for x in (value - before, value, stream + value)
                ]
                self._norms.setdefault(key, []).append(torch.stack(norms))
                self._numel = value.numel()
            self._before[own] = value
        return value

    def profile(self, timesteps: Sequence[float]) -> Profile:
        """What the run over `timesteps` showed.

        Raises
        ------
        ValueError
            The host was called another number of times.
        """
        if self.call + 1 != self._forwards * len(timesteps):
            raise ValueError(
                f"timesteps: got {len(timesteps)}, must be {(self.call + 1) / self._forwards:g}, one a step: the "
                f"transformer was called {self.call + 1} times"
            )
        relative, mse, impact = {}, {}, {}
        for kind in KINDS:
            blocks = sorted(key for key in self._norms if key[0] == kind)
            if blocks:
                norms = np.stack([torch.stack(self._norms[key]).double().cpu().numpy() for key in blocks])
                norms = norms.reshape(len(blocks), -1, self._forwards, 3).mean(axis=2)
                first = np.full((len(blocks), 1, 3), np.nan)
                difference, output, stream = np.moveaxis(np.concatenate([first, norms], axis=1), -1, 0)
                relative[kind] = difference / output
                mse[kind] = difference**2 / self._numel
                impact[kind] = difference / stream
        return Profile(tuple(timesteps), relative, mse, impact)


def measure(pipe: Pipeline, request: Request, on_step: OnStep | None = None) -> Profile:
    """Profile a run without PAB, on the model's own code.

    Parameters
    ----------
    pipe : Pipeline
    request : Request
        All of its videos go into one profile.
    on_step : callable, optional
        As for `generate.generate`.
    """
    with Profiler(pipe.transformer) as profiler:
        generate(pipe, request, None, on_step)
        return profiler.profile([float(t) for t in pipe.scheduler.timesteps])


def flat_middle(curve: NDArray[np.float64]) -> tuple[int, int]:
    """The longest run of steps, [first, end), where `curve` [calls] is at most `FLAT` times its smallest value."""
    low = curve <= FLAT * np.nanmin(curve)
    best, first = (0, 0), None
    for step, inside in enumerate([*low, False]):
        if inside and first is None:
            first = step
        elif not inside and first is not None:
            best = max(best, (first, step), key=lambda run: run[1] - run[0])
            first = None
    return best


def findings(profile: Profile) -> list[str]:
    """What the profile says, in sentences, and whether it is what the PAB document says."""
    lo, hi = profile.edges
    lines = []
    means = {}
    for kind in profile.kinds:
        curve = profile.relative_l2[kind].mean(axis=0)
        first, end = flat_middle(curve)
        start, middle, last = np.nanmean(curve[1:lo]), curve[lo:hi].mean(), curve[hi:].mean()
        means[kind] = middle
        is_u = start > middle < last
        lines.append(
            f"{kind}: differs by {middle:.3f} a step in the middle 70 %, {start / middle:.2f} times that in the first "
            f"15 % and {last / middle:.2f} times in the last 15 %: {'a U' if is_u else 'no U'}. Flat (within "
            f"{FLAT:g} times the smallest) at steps {first} to {end - 1}, timesteps {profile.timesteps[first]:g} to "
            f"{profile.timesteps[end - 1]:g}: {_share(first, end, lo, hi):.0%} of the middle 70 %."
        )
    lines.append(_order("relative difference", means, profile))
    lines.append(_order("mean squared error", {k: profile.mse[k][:, lo:hi].mean() for k in profile.kinds}, profile))
    return lines


def _share(first: int, end: int, lo: int, hi: int) -> float:
    """How much of [lo, hi) lies in [first, end)."""
    return max(0, min(end, hi) - max(first, lo)) / (hi - lo)


def _order(measure: str, means: dict[str, float], profile: Profile) -> str:
    """The order of the kinds by `means`, against the document's: spatial differs most, then temporal, then cross."""
    found = sorted(means, key=lambda kind: -means[kind])
    as_said = found == list(profile.kinds)
    values = " > ".join(f"{kind} {means[kind]:.3g}" for kind in found)
    verdict = "as the PAB document says" if as_said else f"the PAB document says {' > '.join(profile.kinds)}"
    return f"By {measure} in the middle 70 %: {values}; {verdict}."
