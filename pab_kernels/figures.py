"""Pictures and terminal drawings: the schedule, and contact sheets of videos."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.table import Table
from rich.text import Text

from pab_kernels.config import KINDS
from pab_kernels.files import replaced
from pab_kernels.quality import Frames
from pab_kernels.schedule import Schedule

COMPUTED, BROADCAST = "#1f6f8b", "#f2b134"


def kinds_shown(schedule: Schedule) -> tuple[str, ...]:
    """The kinds worth a row: those that broadcast is switched on for, or all where none is."""
    return tuple(kind for kind in KINDS if getattr(schedule.config, f"{kind}_broadcast")) or KINDS


def schedule_table(schedule: Schedule) -> Table:
    """A row a kind, a column a step: filled where computed, hollow where broadcast, with the counts."""
    table = Table(box=None, padding=(0, 1))
    table.add_column("kind", no_wrap=True)
    table.add_column("steps: \u2588 computed, \u00b7 broadcast", overflow="fold")
    table.add_column("computed", no_wrap=True, justify="right")
    table.add_column("broadcast", no_wrap=True, justify="right")
    for kind in kinds_shown(schedule):
        row = Text()
        for step in schedule:
            broadcast = getattr(step, kind)
            row.append("\u00b7" if broadcast else "\u2588", style=BROADCAST if broadcast else COMPUTED)
        count = schedule.broadcast_count(kind)
        table.add_row(kind, row, str(len(schedule) - count), str(count))
    return table


def schedule_figure(schedule: Schedule, title: str) -> Figure:
    """The schedule: a row a kind, a column a step, computed or broadcast."""
    kinds = kinds_shown(schedule)
    grid = np.array([[int(getattr(step, kind)) for step in schedule] for kind in kinds])
    figure = Figure(figsize=(max(6.0, 0.2 * len(schedule) + 2), 0.55 * len(kinds) + 1.5), layout="constrained")
    axes = figure.subplots()
    axes.pcolormesh(grid, cmap=ListedColormap([COMPUTED, BROADCAST]), vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
    axes.set_yticks(np.arange(len(kinds)) + 0.5, kinds)
    axes.invert_yaxis()
    ticks = np.arange(0, len(schedule), max(1, len(schedule) // 12))
    axes.set_xticks(ticks + 0.5, [f"{i}\n{schedule.timesteps[i]:.0f}" for i in ticks])
    axes.set_xlabel("step (above) and timestep (below)")
    axes.set_title(f"{title}: {schedule.saved_share(kinds):.0%} of the attention calls are broadcast")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.legend(
        handles=[Patch(color=COMPUTED, label="computed"), Patch(color=BROADCAST, label="broadcast")],
        loc="upper left",
        bbox_to_anchor=(1, 1),
        frameon=False,
    )
    return figure


def contact_sheet(videos: Mapping[str, Frames], path: Path, title: str, columns: int = 8) -> None:
    """One row a video, evenly spaced frames as columns, as a PNG."""
    figure = Figure(figsize=(1.5 * columns + 1, 1.6 * len(videos) + 0.6), layout="constrained")
    grid = figure.subplots(len(videos), columns, squeeze=False)
    for row, (label, frames) in zip(grid, videos.items(), strict=True):
        for axes, index in zip(row, np.linspace(0, len(frames) - 1, columns).round().astype(int), strict=True):
            axes.imshow(frames[index], interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(f"frame {index}", fontsize=8)
        row[0].set_ylabel(label)
    figure.suptitle(title)
    save_figure(figure, path)


def save_video(frames: Frames, path: Path, fps: int = 8, least_size: int = 256) -> None:
    """Write frames [T, H, W, 3] as .mp4 or .gif; small videos are enlarged by whole factors so that they can be seen.

    Raises
    ------
    ValueError
        Another suffix.
    """
    frames = _enlarged(frames, least_size)
    if path.suffix not in (".mp4", ".gif"):
        raise ValueError(f"output: got {path.name!r}, must end in .mp4 or .gif")
    with replaced(path) as partial:
        if path.suffix == ".mp4":
            iio.imwrite(partial, frames, fps=fps, codec="libx264", macro_block_size=2)
        else:
            iio.imwrite(partial, frames, duration=1000 / fps, loop=0)


def save_frame(frame: Frames, path: Path, least_size: int = 256) -> None:
    """Write a frame [1, H, W, 3] as a PNG, enlarged like a video."""
    with replaced(path) as partial:
        iio.imwrite(partial, _enlarged(frame, least_size)[0])


def _enlarged(frames: Frames, least_size: int) -> Frames:
    factor = max(1, least_size // min(frames.shape[1:3]))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, or as what else the suffix says."""
    with replaced(path) as partial:
        figure.savefig(partial, dpi=130)
