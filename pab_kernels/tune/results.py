"""What is shown and written of trials: a table, a CSV file, and the settings that were tuned."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from pab_kernels import figures
from pab_kernels.config import KINDS, SWITCHES, PABConfig
from pab_kernels.files import replaced
from pab_kernels.tune import figures as tune_figures
from pab_kernels.tune.choose import CONFIDENCE, Estimate, Target, best, reaches
from pab_kernels.tune.trials import Trial

HEADINGS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS"}
FORMATS = {"psnr": ".2f", "ssim": ".3f", "lpips": ".3f"}


def measures(trial: Trial) -> dict[str, tuple[float, ...]]:
    """The measures that there are, each with its value for every video."""
    return {name: trial.values(name) for name in HEADINGS if None not in trial.values(name)}


def ranges(config: PABConfig) -> str:
    """Range and threshold of each kind, such as "2/3/6 in 100 to 800, stack 2 in 50 to 950"; "~" marks a forecast."""
    attention = [kind for kind in KINDS if getattr(config, f"{kind}_broadcast")]
    windows = {getattr(config, f"{kind}_threshold") for kind in attention}
    said = {kind: f"{getattr(config, f'{kind}_range')}{'~' if config.order(kind) else ''}" for kind in SWITCHES}
    parts = []
    if len(windows) == 1:
        digits = "/".join(said[kind] if kind in attention else "-" for kind in KINDS)
        parts.append(f"{digits} in {{:g}} to {{:g}}".format(*windows.pop()))
        attention = []
    more = [kind for kind in SWITCHES if kind not in KINDS and getattr(config, f"{kind}_range") is not None]
    for kind in (*attention, *(kind for kind in more if getattr(config, f"{kind}_broadcast"))):
        parts.append(f"{kind} {said[kind]} in {{:g}} to {{:g}}".format(*getattr(config, f"{kind}_threshold")))
    for kind in SWITCHES:
        block = getattr(config, f"{kind}_block", None)
        if block is not None and getattr(config, f"{kind}_broadcast"):
            parts.append(f"{kind} in blocks {block[0]} to {block[1] - 1}")
    return ", ".join(parts)


def table(trials: Sequence[Trial]) -> Group:
    """A row a trial, as Markdown: quality against no PAB, mean over videos, and the time saved; below, their ranges.

    Those may be as long as a line: in a cell they leave a terminal of 80 columns no room for the figures.
    """
    found = Table(box=box.MARKDOWN)
    found.add_column("settings", no_wrap=True)
    names = measures(trials[0])
    columns = [HEADINGS[name] for name in names] + ["worst video, dB", "worst frame, dB", "time saved", "predicted"]
    for column in columns:
        found.add_column(column, justify="right", overflow="fold")
    for trial in trials:
        found.add_row(
            trial.name,
            *(format(statistics.fmean(values), FORMATS[name]) for name, values in measures(trial).items()),
            format(min(trial.values("psnr")), ".2f"),
            format(min(trial.values("worst_frame")), ".2f"),
            f"{trial.measured:.1%}",
            f"{trial.predicted:.1%}",
        )
    said = [(trial.name, ranges(trial.config)) for trial in trials]
    return Group(found, *(Text(f"{name}: {text}") for name, text in said if text))


def write_csv(trials: Sequence[Trial], path: Path) -> None:
    """Write a row a trial and video; a file there is replaced once this is complete."""
    with replaced(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        names = (*measures(trials[0]), "worst_frame")
        writer.writerow(("settings", "ranges", "video", *names, "measured_saving", "predicted_saving"))
        for trial in trials:
            for video, row in enumerate(zip(*map(trial.values, names), strict=True)):
                values = (f"{value:.6g}" for value in (*row, trial.measured, trial.predicted))
                writer.writerow((trial.name, ranges(trial.config), video, *values))


def account(trial: Trial, target: Target) -> str:
    """A trial in words."""
    found = measures(trial)
    others = Estimate.of(trial.values(target.quality))
    low = f"of other videos at least {others.low:{FORMATS[target.quality]}} at {CONFIDENCE:.0%} confidence"
    parts = [
        f"{HEADINGS[name]} {statistics.fmean(values):{FORMATS[name]}}" + (f" ({low})" if name == target.quality else "")
        for name, values in found.items()
    ]
    return (
        f"{trial.name}: {'; '.join(parts)}; denoising time saved {trial.predicted:.1%} as predicted, "
        f"{trial.measured:.1%} as measured"
    )


class Tuned:
    """The trials of a search and the files of the best of them: always complete, also where the search is cut short.

    Parameters
    ----------
    output : Path
        Of the settings; the trials go beside it, as .csv and .png.
    target : Target
    origin : str
        What was run.
    """

    def __init__(self, output: Path, target: Target, origin: str) -> None:
        self.output, self.target, self.origin = output, target, origin
        self.trials: list[Trial] = []

    @staticmethod
    def files(output: Path) -> list[Path]:
        """The files that come of `output`; ValueError unless it is one of YAML, as the others lie beside it."""
        if output.suffix not in (".yaml", ".yml"):
            raise ValueError(f"output: got {output.name!r}, must end in .yaml: a .csv and a .png go beside it")
        return [output, output.with_suffix(".csv"), output.with_suffix(".png"), Tuned.journal(output)]

    @staticmethod
    def journal(output: Path) -> Path:
        """Where trials are kept until the search is over."""
        return output.with_suffix(".trials.json")

    def add(self, trial: Trial) -> None:
        """Take a trial in, and write the settings that are now the best."""
        # A trial on all videos stands for the one on a few that it follows.
        self.trials = [each for each in self.trials if (each.name, each.config) != (trial.name, trial.config)] + [trial]
        found = best(self.trials, self.target)
        verdict = f"pab tune --target {self.target}: {self._verdict()}, after {len(self.trials)} trials"
        found.config.to_yaml(self.output, "\n".join((verdict, self.origin, account(found, self.target))))
        write_csv(self.trials, self.output.with_suffix(".csv"))

    def finish(self, console: Console) -> bool:
        """Draw and print what was found, if anything; whether the target is reached."""
        if not self.trials:
            return False
        found = best(self.trials, self.target)
        picture = tune_figures.frontier_plot(self.trials, found, self.target, self.origin)
        figures.save_figure(picture, self.output.with_suffix(".png"))
        console.print(table(self.trials))
        console.print(f"{self._verdict()}: {account(found, self.target)}", soft_wrap=True)
        console.print(f"wrote {self.output}, and a .csv and a .png beside it", soft_wrap=True)
        return reaches(found, self.target)

    def _verdict(self) -> str:
        return "reached" if reaches(best(self.trials, self.target), self.target) else "NOT reached"
