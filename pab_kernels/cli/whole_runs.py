"""`pab bench --end-to-end`: whole runs in a table of their parts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from pab_kernels.cli import options
from pab_kernels.config import PABConfig
from pab_kernels.files import replaced

if TYPE_CHECKING:
    import torch

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
) -> None:
    """Whole runs of those contenders that are this runtime's, in a table of their parts."""
    from pab_kernels.measure import end_to_end as whole
    from pab_kernels.measure.contenders import CONTENDERS
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
    results = {}
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
        if json_file is not None:
            found = {"workload": chosen.name, "steps": request.steps, "end_to_end": results}
            with replaced(json_file) as partial:
                partial.write_text(json.dumps(found, indent=1))
    options.console(least_width=190).print(table)
