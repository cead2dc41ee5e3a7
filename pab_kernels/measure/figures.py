"""Pictures of a benchmark's results: bars, and the steps of each run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pab_kernels.figures import COMPUTED, plain
from pab_kernels.schedule import Schedule, StepVariant

OTHERS = "#9aa5ab"
"""Colour of what this runtime is compared with."""
OURS = "runtime"
"""How the names of this runtime's contenders begin."""
GIB = 2**30


def ran(contenders: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that did not fail."""
    return [row for row in contenders if row["seconds"] is not None]


def speed_bars(contenders: Sequence[Mapping[str, Any]]) -> Figure:
    """How many times faster than the first contender that ran."""
    rows = ran(contenders)
    values = [rows[0]["seconds"] / row["seconds"] for row in rows]
    return _bars(rows, values, f"times faster than: {plain(rows[0]['label'])}", "{:.2f}x".format)


def floor_bars(contenders: Sequence[Mapping[str, Any]]) -> Figure:
    """The floor's seconds over the run's, with 1 marked."""
    rows = ran(contenders)
    figure = _bars(rows, [row["floor_share"] for row in rows], "share of the floor", "{:.3f}".format)
    figure.axes[0].axvline(1, color="black", linewidth=1, linestyle="--", zorder=0)
    return figure


def memory_bars(contenders: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Peak GPU memory with the slots' part of it; None where it was not measured."""
    rows = [row for row in ran(contenders) if row["peak_bytes"] is not None]
    if not rows:
        return None
    values = [row["peak_bytes"] / GIB for row in rows]
    figure = _bars(rows, values, "peak GPU memory, GiB (hatched: slots)", "{:.2f}".format)
    slots = [(row["cache_bytes"] or 0) / GIB for row in rows]
    figure.axes[0].barh(range(len(rows)), slots, color="none", edgecolor="white", hatch="////", linewidth=0, height=0.7)
    return figure


def timeline(contenders: Sequence[Mapping[str, Any]], plans: Mapping[bool, Schedule]) -> Figure:
    """One run of each contender, its steps one after the other; below, every step of this runtime with PAB.

    `plans` are the schedules without PAB (False) and with it (True).
    """
    rows = ran(contenders)
    ours = [row for row in rows if row["pab"] and row["name"].startswith(OURS)]
    variants = sorted({variant for plan in plans.values() for variant in plan}, key=_saving)
    shades = matplotlib.colormaps["viridis"](np.linspace(0.2, 0.95, len(variants)))
    colours = dict(zip(variants, shades, strict=True))
    heights = [0.5 * len(rows) + 0.4, *([1.7] * len(ours))]
    figure = Figure(figsize=(7.5, sum(heights) + 0.3 + 0.2 * len(variants)), layout="constrained")
    above, *below = figure.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0]
    for y, row in enumerate(rows):
        starts = np.cumsum(row["step_seconds"]) - row["step_seconds"]
        shown = [colours[variant] for variant in plans[row["pab"]]]
        above.barh(y, row["step_seconds"], left=starts, color=shown, edgecolor="white", linewidth=0.4, height=0.7)
        above.vlines(row["floor_share"] * row["seconds"], y - 0.45, y + 0.45, color="black", linewidth=1.5)
    _name_rows(above, rows, "seconds; black: the floor")
    for axes, row in zip(below, ours, strict=True):
        milliseconds = np.array(row["step_seconds"]) * 1e3
        axes.bar(range(len(milliseconds)), milliseconds, color=[colours[variant] for variant in plans[True]])
        axes.set_title(f"{plain(row['label'])}: ms of every step", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=colours[variant], label=str(variant)) for variant in variants]
    figure.legend(handles=handles, loc="outside lower left", frameon=False, fontsize=9)
    return figure


def _saving(variant: StepVariant) -> tuple[int, str]:
    """Sorts variants from the most computed to the most broadcast."""
    name = str(variant)
    return (0 if name == "compute" else 1 + name.count("+"), name)


def _bars(
    rows: Sequence[Mapping[str, Any]], values: Sequence[float], title: str, form: Callable[[float], str]
) -> Figure:
    figure = Figure(figsize=(5.5, 0.36 * len(rows) + 0.8), layout="constrained")
    axes = figure.subplots()
    colours = [COMPUTED if row["name"].startswith(OURS) else OTHERS for row in rows]
    bars = axes.barh(range(len(rows)), values, color=colours, height=0.7)
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.bar_label(bars, labels=[form(value) for value in values], padding=3, bbox=white)
    axes.set_xlim(0, max(values) * 1.15)
    _name_rows(axes, rows, title)
    return figure


def _name_rows(axes: Any, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    axes.set_yticks(range(len(rows)), [plain(row["label"]) for row in rows])
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
