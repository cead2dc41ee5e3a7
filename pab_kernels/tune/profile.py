"""How much attention outputs change from one denoising step to the next: what PAB rests on."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pab_kernels.config import KINDS, SWITCHES
from pab_kernels.files import replaced
from pab_kernels.pipelines.generate import OnStep, Request, generate
from pab_kernels.pipelines.loading import Pipeline
from pab_kernels.tapped import TappedBlocks

EDGE = 0.15
"""The PAB document's split: 15 % of the steps at either end, and 70 % between them."""
FLAT = 2.0
"""The flat middle is where the difference is at most this many times its smallest."""
LATENTS = "latents"
"""Beside the kinds: what the sampler gives the model."""
MEASURES = ("relative_l2", "mse", "impact", "remainder")
COLUMNS = ("kind", "block", "step", "timestep", *MEASURES)


MOST = 10_000
"""Blocks and steps."""


@dataclass(frozen=True)
class Profile:
    """Differences between the outputs of each step and of the step before, of all that can be broadcast.

    Each measure is, for each kind, an array [blocks, calls], with a row for each block that has this kind, in the
    order of the model; of the block stack row m is for all blocks but m at either end, up to a quarter of them; one
    row for guidance, and for the latents. The first call has no step before it: NaN.

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
        block sees of the difference. `tune` predicts quality from it. Of guidance the guided prediction is the stream:
        its difference counts as often as the scale multiplies it.
    remainder : dict of str to array
        What a forecast leaves of it: ``||new - (old + (old - older))|| / ||stream||``. The second call has none: NaN.
    """

    timesteps: tuple[float, ...]
    relative_l2: dict[str, NDArray[np.float64]]
    mse: dict[str, NDArray[np.float64]]
    impact: dict[str, NDArray[np.float64]]
    remainder: dict[str, NDArray[np.float64]]

    @property
    def parts(self) -> tuple[str, ...]:
        """All that was measured, of `SWITCHES`."""
        return tuple(kind for kind in SWITCHES if kind in self.impact)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of attention that the model has."""
        return tuple(kind for kind in KINDS if kind in self.relative_l2)

    @property
    def depth(self) -> int:
        """How many blocks the model has, those of an index counted once; a kind may have several an index."""
        return min(len(self.impact[kind]) for kind in self.kinds)

    @property
    def moves(self) -> NDArray[np.float64]:
        """How far the sampler moves the latents by each call's prediction, as a share of them, [calls], of mean 1.

        The last move is not seen, and taken for as long as the one before; where none was measured all are 1.
        """
        if LATENTS not in self.relative_l2:
            return np.ones(len(self.timesteps))
        seen = self.relative_l2[LATENTS][0, 1:]
        moves = np.append(seen, seen[-1])
        return moves / moves.mean()

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
            for kind in (kind for kind in (*SWITCHES, LATENTS) if kind in self.impact):
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
        for kind in (*SWITCHES, LATENTS):
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
    """A line of the file: the change of what can be broadcast, of one kind in one block at one step."""

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
                if line["kind"] not in (*SWITCHES, LATENTS) or not 0 <= block < MOST or not 0 < step < MOST:
                    raise ValueError(f"got {line['kind']!r:.80}, block {block}, step {step}")
                measures = {measure: float(line[measure]) for measure in MEASURES}
                rows.append(Row(line["kind"], block, step, line["timestep"], measures))
        except (ValueError, TypeError, csv.Error) as error:
            raise ValueError(f"profile: {path} is no profile, line {reader.line_num}: {error}") from error
    return rows


class Profiler(TappedBlocks):
    """Measures one run of a host, which computes everything; its outputs are what they are without it.

    In memory is what each branch gave at the two calls before: two slots a branch.

    Parameters
    ----------
    host : nn.Module
        As for `TappedBlocks`.
    forwards_per_step : int
        How often a step calls the host: 2 in Wan's pipelines. Each of these calls is compared with its like at the step
        before, and the measures are the mean of all.
    guidance : float
        Its scale, where a call, or the two of a step, are both halves of guidance; 1 or less measures none.
    """

    def __init__(self, host: nn.Module, forwards_per_step: int = 1, guidance: float = 1.0) -> None:
        self._forwards = forwards_per_step
        self._first: Tensor | None = None
        """The first prediction of a step that has two."""
        self._before: dict[tuple[str, int, str, int], list[Tensor]] = {}
        self._norms: dict[tuple[str, int, str], list[Tensor]] = {}
        self._numel: dict[str, int] = {}
        self._guidance = guidance
        self._entered: dict[int, Tensor] = {}
        """The stream as it came to the outer blocks in this call, by their index."""
        super().__init__(host)
        self._margin = self.depth // 4
        self._hooks = [host.register_forward_hook(self._after)]
        final = getattr(host, "norm_out", None) or getattr(host, "final_layer", None)
        if isinstance(final, nn.Module):
            self._hooks.append(final.register_forward_pre_hook(self._before_final, with_kwargs=True))

    def close(self) -> None:
        super().close()
        for hook in self._hooks:
            hook.remove()
        self._before.clear()

    def block(self, kind: str, index: int, run: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The stream after a block; what comes to the first of an index is remembered, at either end of the model."""
        outer = index <= self._margin or index >= self.depth - self._margin
        if outer and index not in self._entered:
            self._entered[index] = (args[0] if args else kwargs["hidden_states"]).clone()
        return super().block(kind, index, run, *args, **kwargs)

    def branch(
        self,
        kind: str,
        index: int,
        name: str,
        stream: Tensor,
        compute: Callable[[], Tensor],
        gate: Tensor | None = None,
    ) -> Tensor:
        """The branch's output; it is compared with what the calls before gave."""
        value = compute() if gate is None else gate * compute()
        # Open-Sora's temporal blocks have cross-attention too, and all blocks an MLP.
        self._compare({"attention": kind}.get(name, name), index, kind, value, stream + value)
        return value

    def _next(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._next(module, args, kwargs)
        latents = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        if isinstance(latents, Tensor):
            latents = latents.clone()
            self._compare(LATENTS, 0, "", latents, latents)

    def _before_final(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if stream is None or 0 not in self._entered or stream.shape != self._entered[0].shape:
            return
        for margin in range(self._margin + 1):
            end = stream if margin == 0 else self._entered[self.depth - margin]
            self._compare("stack", margin, "", end - self._entered[margin], end)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._entered.clear()
        if self._guidance > 1:
            sample = output if isinstance(output, Tensor) else output[0]
            if self._forwards == 1:
                halves = sample.chunk(2)
            elif self.call % self._forwards == 0:
                self._first = sample
                return
            else:
                assert self._first is not None
                halves = (self._first, sample)
            # Guidance adds `scale - 1` differences to the conditional prediction; both are about as long.
            self._compare("guidance", 0, "", (self._guidance - 1) * (halves[0] - halves[1]), halves[1])

    def _compare(self, kind: str, index: int, block: str, value: Tensor, stream: Tensor) -> None:
        key = (kind, index, block)
        own = (*key, 0 if kind == "guidance" else self.call % self._forwards)
        before = self._before.setdefault(own, [])
        if before:
            left = value - 2 * before[0] + before[1] if len(before) > 1 else torch.full_like(value, float("nan"))
            parts = (value - before[0], value, stream, left)
            norms = [torch.linalg.vector_norm(x, dtype=torch.float32) for x in parts]
            self._norms.setdefault(key, []).append(torch.stack(norms))
            self._numel[kind] = value.numel()
        self._before[own] = [value, *before[:1]]

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
        measures: dict[str, dict[str, NDArray[np.float64]]] = {measure: {} for measure in MEASURES}
        for kind in (*SWITCHES, LATENTS):
            blocks = sorted(key for key in self._norms if key[0] == kind)
            if blocks:
                norms = np.stack([torch.stack(self._norms[key]).double().cpu().numpy() for key in blocks])
                each = 1 if kind == "guidance" else self._forwards
                norms = norms.reshape(len(blocks), -1, each, 4).mean(axis=2)
                first = np.full((len(blocks), 1, 4), np.nan)
                difference, output, stream, left = np.moveaxis(np.concatenate([first, norms], axis=1), -1, 0)
                measures["relative_l2"][kind] = difference / output
                measures["mse"][kind] = difference**2 / self._numel[kind]
                measures["impact"][kind] = difference / stream
                measures["remainder"][kind] = left / stream
        return Profile(tuple(timesteps), **measures)


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
    with Profiler(pipe.transformer, guidance=request.guidance) as profiler:
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
