"""Pictures and terminal drawings: the schedule, contact sheets; videos as files."""

from __future__ import annotations

import importlib.util
import queue
import signal
import subprocess
import tempfile
import textwrap
import threading
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Patch
from PIL import GifImagePlugin, Image
from rich.table import Table
from rich.text import Text

from pab_kernels.config import KINDS, SWITCHES
from pab_kernels.files import replaced
from pab_kernels.quality import Frames
from pab_kernels.schedule import Schedule, StepVariant

COMPUTED, BROADCAST = "#1f6f8b", "#f2b134"
CELLS = (("computed", COMPUTED, "\u2588"), ("broadcast", BROADCAST, "\u00b7"), ("forecast", "#d1495b", "\u25cb"))
"""What a step may do with a kind: name, colour, and how it is drawn in a terminal."""
LEFT_OUT = ("left out", "#d9d9d9", " ")
"""No block runs: the stack is broadcast."""
VIDEO_SUFFIXES = (".mp4", ".gif")
HD = 720
"""Lines from which on players take a video without tags to be BT.709, and below BT.601."""
OWN_FONT = "DejaVu Sans"
"""Comes with matplotlib."""
LINES = 6
"""Of a title; what is longer is cut off."""


def kinds_shown(schedule: Schedule) -> tuple[str, ...]:
    """The kinds worth a row: those that broadcast is switched on for, or all of attention where none is."""
    return tuple(kind for kind in SWITCHES if getattr(schedule.config, f"{kind}_broadcast")) or KINDS


def _cell(step: StepVariant, kind: str) -> int:
    """What a step does with a kind: its place in `CELLS`. Of a part of the stack, branches outside of it tell."""
    if kind not in ("stack", "guidance") and "stack" in step.broadcasting and step.broadcasting[0] == "stack":
        return 3
    return 0 if not step.broadcasts(kind) else 2 if step.forecasts(kind) else 1


def _cells(schedule: Schedule) -> list[tuple[str, str, str]]:
    """Those that the drawing of a schedule needs."""
    every = (*CELLS, LEFT_OUT)
    found = {_cell(step, kind) for step in schedule for kind in kinds_shown(schedule)}
    return [cell for number, cell in enumerate(every) if number < 2 or number in found]


def schedule_table(schedule: Schedule) -> Table:
    """A row a kind, a column a step: filled where computed, hollow where broadcast or forecast, with the counts."""
    table = Table(box=None, padding=(0, 1))
    table.add_column("kind", no_wrap=True)
    legend = ", ".join(f"{mark} {name}" for name, _, mark in _cells(schedule) if mark.strip())
    table.add_column(f"steps: {legend}", overflow="fold")
    table.add_column("computed", no_wrap=True, justify="right")
    table.add_column("broadcast", no_wrap=True, justify="right")
    for kind in kinds_shown(schedule):
        row = Text()
        for step in schedule:
            _, colour, mark = (*CELLS, LEFT_OUT)[_cell(step, kind)]
            row.append(mark, style=colour)
        count = sum(step.broadcasts(kind) for step in schedule)
        table.add_row(kind, row, str(len(schedule) - count), str(count))
    return table


def schedule_figure(schedule: Schedule, title: str) -> Figure:
    """The schedule: a row a kind, a column a step, computed, broadcast, forecast, or left out with the whole stack."""
    kinds = kinds_shown(schedule)
    grid = np.array([[_cell(step, kind) for step in schedule] for kind in kinds])
    colours = [colour for _, colour, _ in (*CELLS, LEFT_OUT)]
    figure = Figure(figsize=(max(6.0, 0.2 * len(schedule) + 2), 0.55 * len(kinds) + 1.5), layout="constrained")
    axes = figure.subplots()
    axes.pcolormesh(grid, cmap=ListedColormap(colours), vmin=-0.5, vmax=3.5, edgecolors="white", linewidth=1.5)
    axes.set_yticks(np.arange(len(kinds)) + 0.5, kinds)
    axes.invert_yaxis()
    ticks = np.arange(0, len(schedule), max(1, len(schedule) // 12))
    axes.set_xticks(ticks + 0.5, [f"{i}\n{schedule.timesteps[i]:.0f}" for i in ticks])
    axes.set_xlabel("step (above) and timestep (below)")
    put(axes.set_title, f"{title}: {shares(schedule)}")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.legend(
        handles=[Patch(color=colour, label=name) for name, colour, _ in _cells(schedule)],
        loc="upper left",
        bbox_to_anchor=(1, 1),
        frameon=False,
    )
    return figure


def shares(schedule: Schedule) -> str:
    """What share of the attention calls, and of the calls of all blocks, a schedule broadcasts, in words."""
    attention = [kind for kind in kinds_shown(schedule) if kind in KINDS]
    said = [f"{schedule.saved_share(attention):.0%} of the attention calls"] if attention else []
    for kind, words in (("stack", "runs of the stack"), ("guidance", "unconditional halves")):
        count = sum(step.broadcasts(kind) for step in schedule)
        said += [f"{count / len(schedule):.0%} of the {words}"] if count else []
    return f"{', '.join(said)} are broadcast"


def contact_sheet(videos: Mapping[str, Frames], path: Path, title: str, columns: int = 8) -> None:
    """One row a video, evenly spaced frames as columns, as a PNG with the title in its metadata too."""
    figure = Figure(figsize=(1.5 * columns + 1, 1.6 * len(videos) + 0.6), layout="constrained")
    grid = figure.subplots(len(videos), columns, squeeze=False)
    for row, (label, frames) in zip(grid, videos.items(), strict=True):
        for axes, index in zip(row, np.linspace(0, len(frames) - 1, columns).round().astype(int), strict=True):
            axes.imshow(frames[index], interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(f"frame {index}", fontsize=8)
        put(row[0].set_ylabel, label)
    put(figure.suptitle, title, width=12 * columns)
    with replaced(path) as partial:
        figure.savefig(partial, format="png", dpi=130, metadata={"Title": _encodable(title)})


def save_video(frames: Frames, path: Path, fps: float = 8, least_size: int = 256) -> None:
    """Write frames [T, H, W, 3] uint8 as .mp4 or .gif; small videos are enlarged by whole factors to be seen.

    Every frame is written, also one that equals the one before. An .mp4 is H.264 in YUV 4:2:0, converted by the matrix
    that its tags name: BT.709 from 720 lines on, BT.601 below. An odd size gets one more row or column.

    Raises
    ------
    ValueError
        Another suffix, or frames of another shape or dtype.
    OSError
        It could not be written, such as on a full disk; what was at `path` is as it was.
    """
    with video_writer(path, fps, least_size) as add:
        add(frames)


@contextmanager
def video_writer(path: Path, fps: float, least_size: int = 1) -> Iterator[Callable[[Frames], None]]:
    """A function that takes the next frames [n, H, W, 3] of a video; an .mp4 is encoded while others are still made.

    The file is there when the block ends, and not at all if it ends by an error. Parameters and errors are those of
    `save_video`.
    """
    if path.suffix not in VIDEO_SUFFIXES:
        raise ValueError(f"output: got {path.name!r}, must end in .mp4 or .gif")
    with replaced(path) as partial:
        video = _Mp4(partial, fps) if path.suffix == ".mp4" else _Gif(partial, fps)

        def add(frames: Frames) -> None:
            if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
                raise ValueError(f"frames: got {list(frames.shape)} {frames.dtype}, must be [T, H, W, 3] uint8")
            video.add(_enlarged(frames, least_size))

        try:
            yield add
        except BaseException:
            video.stop()
            raise
        video.close()


def why_no_mp4() -> str | None:
    """What is missing to write .mp4 here, None where it can be written."""
    return "`pip install imageio[ffmpeg]`" if importlib.util.find_spec("imageio_ffmpeg") is None else None


class _Mp4:
    """ffmpeg itself: imageio does not notice that it failed, and leaves the matrix to a guess. A thread feeds it."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps = path, fps
        self.process: subprocess.Popen[bytes] | None = None
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close` or `stop`
        self.waiting: queue.SimpleQueue[Frames | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._feed, daemon=True)

    def add(self, frames: Frames) -> None:
        height, width = frames.shape[1:3]
        if height % 2 or width % 2:  # colours are kept of every other row and column
            frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self.process is None:
            self.process = subprocess.Popen(
                self._command(*frames.shape[1:3]), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self.errors
            )
            self.thread.start()
        self.waiting.put(np.ascontiguousarray(frames))

    def _command(self, height: int, width: int) -> list[str]:
        import imageio_ffmpeg

        matrix = "bt709" if height >= HD else "smpte170m"
        tags = f"colorspace={matrix}:color_primaries={matrix}:color_trc={matrix}:range=tv"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-xerror", "-y"]
        command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(self.fps)]
        command += ["-i", "pipe:0"]
        command += ["-vf", f"scale=out_color_matrix={matrix}:out_range=tv,format=yuv420p,setparams={tags}"]
        return [*command, "-c:v", "libx264", "-crf", "18", f"file:{self.path}"]

    def _feed(self) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it ended early; why is said by `close`
            while (frames := self.waiting.get()) is not None:
                self.process.stdin.write(frames.data.cast("B"))
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def close(self) -> None:
        """Wait until all is written."""
        if self.process is None:
            raise ValueError("frames: got none, must be at least one")
        self.waiting.put(None)
        self.thread.join()
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines() or [f"it ended with {code}"]
        self.errors.close()
        if code:
            raise OSError(f"ffmpeg did not write the video: {signal.strsignal(-code) if code < 0 else lines[-1]}")

    def stop(self) -> None:
        """End without a file."""
        if self.process is not None:
            self.process.kill()
            self.waiting.put(None)
            self.thread.join()
            self.process.wait()
        self.errors.close()


class _Gif:
    """Frame by frame: Pillow's `save` makes one of neighbours that are equal."""

    def __init__(self, path: Path, fps: float) -> None:
        self.file = path.open("wb")
        self.fps, self.empty = fps, True

    def add(self, frames: Frames) -> None:
        for frame in frames:
            image = Image.fromarray(frame).convert("P", palette=Image.Palette.ADAPTIVE)
            if self.empty:
                self.file.writelines(GifImagePlugin.getheader(image, info={"loop": 0})[0])
                self.empty = False
            self.file.writelines(GifImagePlugin.getdata(image, duration=1000 / self.fps, include_color_table=True))

    def close(self) -> None:
        """Write the end."""
        with self.file:
            if self.empty:
                raise ValueError("frames: got none, must be at least one")
            self.file.write(b";")

    def stop(self) -> None:
        """End without a file."""
        with suppress(OSError):
            self.file.close()


def save_frame(frame: Frames, path: Path, least_size: int = 256) -> None:
    """Write a frame [1, H, W, 3] as a PNG, enlarged like a video."""
    with replaced(path) as partial:
        Image.fromarray(_enlarged(frame, least_size)[0]).save(partial, format="PNG")


def _enlarged(frames: Frames, least_size: int) -> Frames:
    factor = max(1, least_size // min(frames.shape[1:3]))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def check_picture(name: str, path: Path) -> None:
    """Refuse, naming the option, a file with a suffix that `save_figure` knows no format for."""
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in formats:
        raise ValueError(f"{name}: got {str(path)!r}, must end in one of .{', .'.join(sorted(formats))}")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, or as what else the suffix says."""
    with replaced(path) as partial:
        figure.savefig(partial, dpi=130)


def put(setter: Callable[..., Any], words: str, width: int = 90) -> None:
    """Give matplotlib words from outside, as they are: no mathematics, fonts that have them, at most `LINES` lines."""
    fonts = _fonts(words)
    lines = textwrap.wrap(_plain(words, list(fonts.values())), width, max_lines=LINES, placeholder=" ...")
    setter("\n".join(lines), fontfamily=list(fonts))


def plain(words: str) -> str:
    """`words` for matplotlib, in its own font, on one line: nothing starts mathematics."""
    return _plain(words, [_own_font()])


def _plain(words: str, fonts: Sequence[FT2Font]) -> str:
    return "".join(_shown(letter, fonts) for letter in words)


def _shown(letter: str, fonts: Sequence[FT2Font]) -> str:
    """What stands for a letter: itself, or its number where no font has it."""
    if letter.isspace():
        return " "
    category = unicodedata.category(letter)
    if category == "Cf" or "\ufe00" <= letter <= "\ufe0f":
        return ""  # says how its neighbours are drawn
    if category in ("Cc", "Cs") or not any(font.get_char_index(ord(letter)) for font in fonts):
        return letter.encode("unicode_escape").decode()
    return "\\$" if letter == "$" else letter


def _fonts(words: str) -> dict[str, FT2Font]:
    """Matplotlib's own font, and installed ones that have what it has not, by their names."""
    fonts = {OWN_FONT: _own_font()}
    missing = {letter for letter in words if letter.isprintable() and not _own_font().get_char_index(ord(letter))}
    for entry in fontManager.ttflist:
        if not missing:
            break
        if entry.style != "normal" or entry.name in fonts or "Last Resort" in entry.name:  # it has boxes for all
            continue
        try:
            font = FT2Font(entry.fname)
        except (OSError, RuntimeError):  # listed, but gone or broken
            continue
        if has := {letter for letter in missing if font.scalable and font.get_char_index(ord(letter))}:
            missing -= has
            fonts[entry.name] = font
    return fonts


@cache
def _own_font() -> FT2Font:
    return FT2Font(findfont(OWN_FONT))


def _encodable(words: str) -> str:
    return words.encode("utf-8", "backslashreplace").decode()
