"""`pab bench --end-to-end`: whole runs in a table of their parts."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from pab_kernels.cli import options
from pab_kernels.config import PABConfig
from pab_kernels.files import replaced

if TYPE_CHECKING:
    import torch

    from pab_kernels.measure.end_to_end import EndToEnd
    from pab_kernels.workloads import Workload


def whole_runs(
    chosen: Workload,
    settings: PABConfig,
    names: Sequence[str],
    repeats: int,
    steps: int | None,
    place: torch.device,
    number: torch.dtype,
    json_file: Path | None,
    tiny: bool,
    pab: str | None,
) -> list[dict[str, str]]:
    """Whole runs of those contenders that are this runtime's, in a table of their parts.

    Returns
    -------
    list of dict
        Rows for a file of results: of each run the whole and its parts. `pab` names settings that are not the family's.
    """
    from pab_kernels import figures
    from pab_kernels.measure import end_to_end as whole
    from pab_kernels.measure.contenders import CONTENDERS
    from pab_kernels.measure.info import commit, device_name
    from pab_kernels.pipelines.generate import Request

    own = [name for name in names if name in ("runtime", "runtime+pab", "runtime-fp8", "runtime-fp8+pab")]
    if not own:
        raise ValueError("runs: must name one of runtime, runtime+pab, runtime-fp8, runtime-fp8+pab from end to end")
    pipe = whole.load(chosen, dtype=number, device=place, tiny=tiny)
    size = whole.video_size(chosen, tiny)
    request = Request([whole.PROMPT], "", steps or chosen.steps, chosen.guidance, (0,), size)
    table = Table(title=f"{chosen.name}, from prompt to frames", box=box.MARKDOWN)
    for column in ("", *whole.PARTS, "to frames, s", "frames/s", "first run, s", "peak GiB"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    results: dict[str, Any] = {}
    rows: list[dict[str, str]] = []
    common = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "gpu": device_name(place),
        "commit": commit(),
        "dtype": str(number).removeprefix("torch."),
    }
    for name in own:
        config = settings if CONTENDERS[name].pab else PABConfig()
        config = dataclasses.replace(config, linear_precision="fp8") if CONTENDERS[name].fp8 else config
        timed = whole.measure(pipe, request, config, repeats)
        seconds = whole.to_frames(timed.median)
        peak = "" if timed.peak_bytes is None else f"{timed.peak_bytes / 2**30:.1f}"
        parts = (f"{timed.median[part]:.3f}" for part in whole.PARTS)
        first = f"{whole.to_frames(timed.first):.1f}"
        rate = f"{timed.frames / seconds:.1f}"
        table.add_row(CONTENDERS[name].label, *parts, f"{seconds:.3f}", rate, first, peak)
        results[name] = dataclasses.asdict(timed)
        shape = f"{chosen.name} {pab}" if pab is not None and CONTENDERS[name].pab else chosen.name
        rows += [{**common, "shape": shape, "backend": name, **row} for row in _rows(timed, seconds)]
        if json_file is not None:
            found = {"workload": chosen.name, "steps": request.steps, "end_to_end": results}
            with replaced(json_file) as partial:
                partial.write_text(json.dumps(found, indent=1))
    console = options.console(least_width=190)
    console.print(table)
    if (lacks := figures.why_no_mp4()) is not None:
        console.print(f"Nothing was written: that needs {lacks}.")
    return rows


def _rows(timed: EndToEnd, seconds: float) -> list[dict[str, str]]:
    """The whole, of `seconds`, in frames a second, and its parts in percent of it."""
    found = [("prompt to frames", seconds, timed.frames / seconds, "frames/s")]
    for part, taken in timed.median.items():
        found.append((f"prompt to frames: {part}", taken, 100 * taken / seconds, "%"))
    return [
        {"op": op, "ms": f"{taken * 1e3:.2f}", "figure": f"{figure:.2f}", "unit": unit}
        for op, taken, figure, unit in found
    ]
