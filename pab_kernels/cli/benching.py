"""What `pab bench` does once its options are checked: in one process, or on rank 0 alone and then on each rank."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from pab_kernels.cli import options
from pab_kernels.cli.csv_rows import append_rows
from pab_kernels.files import replaced

if TYPE_CHECKING:
    import torch

    from pab_kernels.config import PABConfig
    from pab_kernels.distributed.mesh import Mesh
    from pab_kernels.measure.benchmark import Timing
    from pab_kernels.measure.contenders import Problem
    from pab_kernels.measure.report import Grid
    from pab_kernels.workloads import Workload


WAIT = datetime.timedelta(hours=4)
"""For rank 0, while it times what runs on one GPU."""


@dataclass(frozen=True)
class Job:
    """A benchmark, as `pab bench` was asked for it."""

    workload: Workload
    settings: PABConfig
    names: tuple[str, ...]
    """Of the contenders, on one GPU and on each of `meshes`."""
    repeats: int
    budget: float
    steps: int | None
    compile_scope: str
    device: torch.device
    dtype: torch.dtype
    cache_device: str | None
    command: str
    json_file: Path | None
    csv_file: Path | None
    columns: tuple[str, ...]
    report_folder: Path | None
    meshes: tuple[Mesh, ...] = ()
    shares: bool = False
    """Whether the share of the rank that has most frames is timed too, on one GPU alone."""

    @property
    def gpus(self) -> int:
        """How many ranks there are; all meshes have as many."""
        return self.meshes[0].size if self.meshes else 1


def run(jobs: Sequence[Job]) -> int:
    """Time the contenders of each workload; the exit code."""
    from pab_kernels.measure import report as pages

    code, results = 0, []
    for job in jobs:
        begun = _run(job)
        if begun is not None:
            code = max(code, begun.finish())
            results.append(begun.result)
    folder = jobs[0].report_folder
    if results and folder is not None:
        options.console().print(f"wrote {pages.write(results, folder)[0]}", soft_wrap=True)
    return code


def _run(job: Job) -> _Benchmark | None:
    """Of several ranks the first one is alone at first, then all of them run; the others return nothing."""
    if job.gpus == 1:
        return _Benchmark(job, _problem(job, job.device)).alone()
    import torch.distributed as dist

    rank = dist.get_rank()
    place = options.rank_device(job.device, rank)
    waiting = dist.new_group(backend="gloo", timeout=WAIT)  # on the host: a GPU that waits would be busy
    begun = _Benchmark(job, _problem(job, place)).alone() if rank == 0 else None
    dist.barrier(waiting)
    problem = _problem(job, place) if begun is None else begun.problem
    for mesh in job.meshes:
        for name in job.names:
            timing = _on_mesh(name, dataclasses.replace(problem, mesh=mesh), job)
            if begun is not None:
                begun.add(timing)
    return begun


def _problem(job: Job, place: torch.device) -> Problem:
    from pab_kernels.measure.contenders import Problem

    return Problem.make(job.workload, job.settings, place, job.dtype, job.steps, job.compile_scope, job.cache_device)


def _on_mesh(name: str, problem: Problem, job: Job) -> Timing:
    from pab_kernels.measure import benchmark, exchange_times

    timing = benchmark.measure(name, problem, job.repeats, job.budget)
    timing.exchange_seconds = exchange_times.measure(problem, timing)
    return timing


class _Benchmark:
    """What rank 0 makes of it: prints, the table of all contenders, and files."""

    def __init__(self, job: Job, problem: Problem) -> None:
        self.job, self.problem = job, problem
        self.console = options.console(least_width=190)  # a log file gives 80, too narrow for the table
        self.timings: list[Timing] = []

    def alone(self) -> _Benchmark:
        """Time every contender on one GPU."""
        from pab_kernels.measure import benchmark, results
        from pab_kernels.measure import report as pages
        from pab_kernels.measure.contenders import CONTENDERS

        job, problem = self.job, self.problem
        self.floor = benchmark.measure_floor(problem, fp8=any(CONTENDERS[name].fp8 for name in job.names))
        self.console.print(results.heading(problem, self.floor))
        self.result: dict[str, Any] = results.summary(problem, self.floor, job.command) | {"gpus": job.gpus}
        if {"runtime", "runtime+pab"} & set(job.names):
            prediction, latents = benchmark.check(problem)
            tolerance = results.TOLERANCE[str(problem.dtype).removeprefix("torch.")]
            within = latents <= tolerance and prediction <= 2 * tolerance
            self.result["check"] = {
                "latents": latents,
                "prediction": prediction,
                "tolerance": tolerance,
                "within": within,
            }
            self.console.print(pages.check_line(self.result["check"]))
        for name in job.names:
            self.add(benchmark.measure(name, problem, job.repeats, job.budget))
        for ranks in sorted({mesh.frames for mesh in job.meshes if job.shares and mesh.frames > 1}):
            part = benchmark.share_of(problem, ranks)
            for name in job.names:
                timing = benchmark.measure(name, part, job.repeats, job.budget)
                timing.share = part.workload.grid[0]
                self.add(timing)
        return self

    def add(self, timing: Timing) -> None:
        """A contender is done; what there is so far is written, so that a run cut short leaves it."""
        from pab_kernels.measure import results

        self.timings.append(timing)
        times = timing.error or " ".join(f"{seconds:.3f}" for seconds in timing.runs)
        self.console.print(f"{timing.key}: warm-up {timing.warm_up:.1f} s; {times}")
        self.result["contenders"] = results.rows(self.timings, self.problem, self.floor)
        if self.job.json_file is not None:
            with replaced(self.job.json_file) as partial:
                partial.write_text(json.dumps(self.result, indent=1), encoding="utf-8")

    def finish(self) -> int:
        """Print the tables and append the rows; the exit code."""
        from pab_kernels.measure import report as pages

        rows = self.result["contenders"]
        self.console.print(_table(pages.runs_grid(rows), self.problem.workload.name))
        if any(row["variants"] for row in rows):
            self.console.print(_table(pages.variants_grid(rows), "this runtime, by step variant"))
        if self.job.csv_file is not None:
            append_rows(self.job.csv_file, self.job.columns, _csv_rows(self.result))
        within = self.result.get("check", {"within": True})["within"]
        return 1 if not within or any(timing.error for timing in self.timings) else 0


def _csv_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A row for each contender that ran."""
    return [
        {
            "date": result["date"][:10],
            "gpu": result["device"],
            "commit": result["commit"],
            "op": "denoising run",
            "shape": result["workload"],
            "dtype": result["dtype"],
            "backend": row["name"],
            "ms": f"{row['seconds'] * 1e3:.2f}",
            "figure": f"{row['frames_per_second']:.2f}",
            "unit": "frames/s",
        }
        for row in result["contenders"]
        if row["seconds"] is not None
    ]


def _table(grid: Grid, title: str) -> Table:
    """A grid for the terminal, to be pasted into Markdown."""
    header, rows = grid
    table = Table(title=title, box=box.MARKDOWN)
    for name in header:
        table.add_column(name, justify="left" if name in ("", "variant") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
