"""`pab compare`: two videos, frame by frame."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from pab_kernels.cli import options
from pab_kernels.files import check_outputs, replaced


def compare(
    video: Annotated[Path, typer.Argument(help="A video or animated image.")],
    baseline: Annotated[Path, typer.Argument(help="The one that it should look like, of the same size and length.")],
    frames: Annotated[bool, typer.Option(help="Also print every frame's values.")] = False,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also write every frame's values here.")] = None,
) -> None:
    """Compare two videos frame by frame: PSNR, SSIM, and LPIPS where its package and weights are here.

    Example:

    pab compare outputs/with.mp4 outputs/without.mp4 --csv outputs/frames.csv
    """
    from pab_kernels import quality as measures
    from pab_kernels.tune.results import HEADINGS

    console = options.console()
    with options.clean_errors():
        check_outputs({"csv": [csv_file]}, inputs=(video, baseline))
        found = measures.per_frame(measures.load_video(video), measures.load_video(baseline))
        rows = list(zip(*found.values(), strict=True))
        if csv_file is not None:
            with replaced(csv_file) as partial, partial.open("w", newline="") as file:
                csv.writer(file).writerows([("frame", *found), *((i, *row) for i, row in enumerate(rows))])
    table = Table("frame", *(HEADINGS[name] for name in found), box=box.MARKDOWN)
    if frames:
        for i, row in enumerate(rows):
            table.add_row(str(i), *(f"{value:.4g}" for value in row))
    means = [f"{sum(values) / len(values):.4g}" for values in found.values()]
    worst = [f"{(max if name == 'lpips' else min)(values):.4g}" for name, values in found.items()]
    table.add_row(f"mean of {len(rows)}", *means)
    table.add_row("worst", *worst)
    console.print(table)
    if reason := measures.why_no_lpips():
        console.print(reason, soft_wrap=True)
