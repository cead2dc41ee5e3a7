"""`pab bench`: the command, its table and its files."""

from __future__ import annotations

import csv
import datetime
import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import torch

    from pab_kernels.benchmark import Floor, Timing
    from pab_kernels.contenders import Problem

CSV_COLUMNS = ("date", "gpu", "commit", "op", "shape", "dtype", "backend", "ms", "figure", "unit")
"""Those of the microbenchmarks' results.csv."""
RATIOS = ("eager", "compile", "plain", "hook", "runtime+pab")
"""Contenders that the others are compared with."""
TOLERANCE = {"bfloat16": 3e-2, "float16": 1e-2, "float32": 1e-4}
"""Largest relative error of the latents after one step of this runtime, against the eager host.

The bare prediction may differ twice as much: in bfloat16 the eager host's own error is 2e-2 to 4e-2 (computed, against
float32, at full depth and a quarter of the width), while leaving out a kind of attention changes it by 1e-1 or more.
"""


def bench(
    workload: Annotated[str, typer.Option(help="What to run, such as open_sora-480p-2s, latte-16x512.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything here, as JSON.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also append a row for each contender here.")] = None,
    runs: Annotated[
        str | None,
        typer.Option(
            help="Contenders, separated by commas: eager,compile,plain,hook,runtime,runtime+pab,runtime+pab8 (slots in "
            "fp8), and with linears in fp8, where the GPU can, runtime-fp8,runtime-fp8+pab,runtime-fp8+pab8."
        ),
    ] = None,
    compile_host: Annotated[bool, typer.Option("--compile", help="Also run the host under torch.compile.")] = False,
    compile_scope: Annotated[
        str, typer.Option(help="Compile the whole model, or its blocks: much quicker to compile.")
    ] = "model",
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each contender; their median counts.")] = 3,
    budget: Annotated[
        float, typer.Option(min=0, help="Seconds a contender's timed runs may take together; one is made in any case.")
    ] = 30.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps, by default the workload's.")] = None,
    pab: Annotated[str | None, typer.Option(help="Other settings of PAB: a preset (latte:347) or a YAML file.")] = None,
    scale: Annotated[str, typer.Option(help="full, or tiny: two narrow layers, to try it out.")] = "full",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="By default bfloat16 on cuda, float32 on cpu.")] = None,
    cache_device: Annotated[
        str | None, typer.Option(help="cpu keeps this runtime's slots in pinned host memory.")
    ] = None,
) -> None:
    """Time a denoising run: host, plain PAB, this runtime. Example: pab bench --workload latte-16x512 --compile"""
    import torch

    from pab_kernels import benchmark, contenders, generate
    from pab_kernels import workloads as named
    from pab_kernels.config import PABConfig

    console = Console(width=max(Console().width, 190))  # a log file gives 80, too narrow for the table
    try:
        chosen = named.workload(workload)
        settings = PABConfig.preset(chosen.family) if pab is None else generate.pab_settings(pab)
        if settings is None:
            raise ValueError("pab: got 'off', must be a preset or a file: runs without PAB are timed anyway")
        for option, value, allowed in (
            ("scale", scale, ("full", "tiny")),
            ("compile-scope", compile_scope, contenders.COMPILE_SCOPES),
            ("dtype", dtype, (None, *TOLERANCE)),
            ("cache-device", cache_device, (None, "cpu", "cuda")),
        ):
            if value not in allowed:
                raise ValueError(f"{option}: got {value!r}, must be one of {', '.join(filter(None, allowed))}")
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        number = dtype or ("bfloat16" if place.type == "cuda" else "float32")
        names = contender_names(chosen.family, runs, compile_host, _no_fp8(place, number))
    except (ValueError, TypeError, FileNotFoundError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    if scale == "tiny":
        chosen = chosen.tiny()

    problem = contenders.Problem.make(
        chosen, settings, place, getattr(torch, number), steps, compile_scope, cache_device
    )
    fp8 = any(contenders.CONTENDERS[name].fp8 for name in names)
    floor = benchmark.measure_floor(problem, fp8=fp8)
    console.print(heading(problem, floor), highlight=False)
    timings: dict[str, Timing] = {}
    result: dict[str, Any] = summary(problem, floor)
    within = True
    if {"runtime", "runtime+pab"} & set(names):
        prediction, latents = benchmark.check(problem)
        tolerance = TOLERANCE[number]
        within = latents <= tolerance and prediction <= 2 * tolerance
        result["check"] = {"latents": latents, "prediction": prediction, "tolerance": tolerance, "within": within}
        console.print(
            f"first step against the eager host: latents {latents:.1e} (at most {tolerance:.0e}), "
            f"prediction {prediction:.1e} (at most {2 * tolerance:.0e}){'' if within else ': TOO LARGE'}",
            highlight=False,
        )
    for name in names:
        timing = timings[name] = benchmark.measure(name, problem, repeats, budget)
        times = timing.error or " ".join(f"{seconds:.3f}" for seconds in timing.runs)
        console.print(f"{name}: warm-up {timing.warm_up:.1f} s; {times}", highlight=False, markup=False)
        result["contenders"] = rows(timings, problem, floor)
        if json_file is not None:
            write_json(result, json_file)  # after each, so that a run cut short leaves what it has
    console.print(results_table(result["contenders"], chosen.name))
    if variants := variants_table(timings):
        console.print(variants)
    if csv_file is not None:
        append_csv(result, csv_file)
    if not within or any(timing.error for timing in timings.values()):
        raise typer.Exit(1)


def _no_fp8(place: torch.device, dtype: str) -> str | None:
    from pab_kernels.backends import no_fp8

    return no_fp8(place) if dtype == "bfloat16" else f"fp8 linears need bfloat16 weights, got {dtype}"


def contender_names(family: str, runs: str | None, compile_host: bool, no_fp8: str | None = None) -> list[str]:
    """The contenders to run, in order; `no_fp8` says why the device has no fp8 linears, None if it has.

    Raises
    ------
    ValueError
        An unknown name, diffusers' hook for another family than Latte, or fp8 linears where there are none.
    """
    from pab_kernels.contenders import CONTENDERS

    if runs is None:
        fp8 = {name for name, contender in CONTENDERS.items() if contender.fp8}
        wanted = set(CONTENDERS) - {"compile"} - (set() if family == "latte" else {"hook"}) - (fp8 if no_fp8 else set())
    else:
        wanted = {name.strip() for name in runs.split(",")}
    if compile_host:
        wanted.add("compile")
    if unknown := wanted - set(CONTENDERS):
        raise ValueError(f"runs: got {', '.join(sorted(unknown))}, must be among {', '.join(CONTENDERS)}")
    if "hook" in wanted and family != "latte":
        raise ValueError(f"runs: got hook for {family}, but diffusers' hook only fits latte")
    if no_fp8 and any(CONTENDERS[name].fp8 for name in wanted):
        raise ValueError(f"runs: got {runs}, must be without fp8: {no_fp8}")
    return [name for name in CONTENDERS if name in wanted]


def heading(problem: Problem, floor: Floor) -> str:
    """What runs, and the ceilings."""
    from pab_kernels import info

    batch, frames, tokens, channels = floor.shape
    filled = "" if floor.gemm_filled is None else f", {floor.gemm_filled / 1e12:.0f} on enough tokens to fill the GPU"
    fp8_rate = fp8_floor = ""
    if floor.ceilings.fp8_flops is not None:
        fp8_rate = f"; fp8 GEMMs {floor.ceilings.fp8_flops / 1e12:.0f} TFLOP/s"
        fp8_floor = f"; in fp8 {floor.seconds(False, fp8=True):.3f} s and {floor.seconds(True, fp8=True):.3f} s"
    return (
        f"{problem.workload.name}: {len(problem.timesteps)} calls of [{batch}, {frames}, {tokens}, {channels}], "
        f"{str(problem.dtype).removeprefix('torch.')}, on {_device_name(problem)}\n"
        f"{', '.join(f'{name} {version}' for name, version in info.versions().items())}\n"
        f"ceilings: GEMMs {floor.gemm_own / 1e12:.3g} TFLOP/s on the run's tokens{filled}; "
        f"copy {floor.ceilings.bandwidth / 1e12:.3g} TB/s{fp8_rate}\n"
        f"floor: {floor.seconds(False):.3f} s without PAB, {floor.seconds(True):.3f} s with PAB{fp8_floor}"
    )


def _device_name(problem: Problem) -> str:
    import torch

    return torch.cuda.get_device_name(problem.device) if problem.device.type == "cuda" else "CPU"


def summary(problem: Problem, floor: Floor) -> dict[str, Any]:
    """Everything about the run but the contenders, as plain values."""
    from pab_kernels import info

    workload = problem.workload
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "workload": workload.name,
        "family": workload.family,
        "video": list(workload.pixels),
        "shape": list(floor.shape),
        "text": [workload.text, workload.text_used],
        "timesteps": problem.timesteps,
        "pab": problem.config.to_dict(),
        "dtype": str(problem.dtype).removeprefix("torch."),
        "device": _device_name(problem),
        "compile_scope": problem.compile_scope,
        "cache_device": problem.cache_device,
        "versions": info.versions(),
        "ceilings": {
            "gemm_flops": floor.ceilings.flops,
            "gemm_flops_own_tokens": floor.gemm_own,
            "gemm_flops_filled": floor.gemm_filled,
            "copy_bytes": floor.ceilings.bandwidth,
            "fp8_gemm_flops": floor.ceilings.fp8_flops,
        },
        "floor": {
            name: {"seconds": floor.seconds(pab), "flops": work.flops, "bytes": work.nbytes}
            for name, pab, work in (("without PAB", False, floor.without), ("with PAB", True, floor.with_pab))
        },
    }


def rows(timings: dict[str, Timing], problem: Problem, floor: Floor) -> list[dict[str, Any]]:
    """One row a contender; ratios are how many times faster it is than another."""
    from pab_kernels.benchmark import relative_error
    from pab_kernels.contenders import CONTENDERS

    def ratio(of: Timing, to: str) -> float | None:
        other = timings[to].seconds if to in timings else None
        return None if other is None or of.seconds is None else other / of.seconds

    found = []
    for name, timing in timings.items():
        contender, seconds, report = CONTENDERS[name], timing.seconds, timing.report
        like = timings.get(contender.like)
        difference = None
        if like is not None and like is not timing and like.latents is not None and timing.latents is not None:
            difference = relative_error(timing.latents, like.latents)
        found.append(
            {
                "name": name,
                "label": contender.label,
                "seconds": seconds,
                "runs": timing.runs,
                "ms_per_step": None if seconds is None else seconds * 1e3 / len(problem.timesteps),
                **{f"against_{to}": ratio(timing, to) for to in RATIOS},
                "floor_share": None if seconds is None else floor.seconds(contender.pab, fp8=contender.fp8) / seconds,
                "frames_per_second": None if seconds is None else problem.workload.pixels[0] / seconds,
                "peak_bytes": timing.peak_bytes,
                "reserved_bytes": timing.reserved_bytes,
                "cache_bytes": None if report is None else report.cache_bytes,
                "host_bytes": None if report is None else report.host_bytes,
                "graphs": None if report is None else report.graphs,
                "eager_because": None if report is None else report.eager,
                "variants": {} if report is None else {key: list(value) for key, value in report.seconds.items()},
                "difference": difference,
                "difference_from": contender.like,
                "warm_up_seconds": timing.warm_up,
                "error": timing.error,
            }
        )
    return found


def results_table(contenders: list[dict[str, Any]], title: str) -> Table:
    """The table of a benchmark. A column "x NAME" says how many times faster than that contender."""

    def cell(value: float | None, form: str, unit: float = 1.0) -> str:
        return "" if value is None else format(value / unit, form)

    others = [name for name in RATIOS if any(row["name"] == name for row in contenders)]
    columns = ["seconds", "runs", "ms/step", *(f"x {name}" for name in others), "of floor", "frames/s"]
    columns += ["peak GiB", "cache GiB", "on host GiB", "difference", "warm-up s"]
    table = Table(title=title, box=box.MARKDOWN)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in contenders:
        difference = cell(row["difference"], ".1e")
        table.add_row(
            row["label"],
            "failed" if row["error"] else cell(row["seconds"], ".3f"),
            str(len(row["runs"])),
            cell(row["ms_per_step"], ".2f"),
            *(cell(row[f"against_{name}"], ".2f") for name in others),
            cell(row["floor_share"], ".3f"),
            cell(row["frames_per_second"], ".2f"),
            cell(row["peak_bytes"], ".2f", 2**30),
            cell(row["cache_bytes"], ".2f", 2**30),
            cell(row["host_bytes"] or None, ".2f", 2**30),
            f"{difference} ({row['difference_from']})" if difference else "",
            cell(row["warm_up_seconds"], ".1f"),
        )
    return table


def variants_table(timings: dict[str, Timing]) -> Table | None:
    """Time of each step variant of this runtime; None where it did not run."""
    table = Table("", "variant", "steps", "ms/step", title="this runtime, by step variant", box=box.MARKDOWN)
    for name, timing in timings.items():
        if timing.report is not None:
            for variant, (count, seconds) in timing.report.seconds.items():
                table.add_row(name, variant, str(count), f"{seconds / count * 1e3:.2f}")
            graphs = f"{timing.report.graphs} CUDA graphs"
            table.add_row(name, graphs if timing.report.eager is None else f"no CUDA graphs: {timing.report.eager}")
    return table if table.row_count else None


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write `result`; an existing file is replaced only once the new one is complete."""
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
    partial.replace(path)


def append_csv(result: dict[str, Any], path: Path) -> None:
    """Append a row for each contender that ran, under the columns that the file has."""
    columns: tuple[str, ...] = CSV_COLUMNS
    if path.is_file() and path.stat().st_size:
        with path.open(newline="") as file:
            columns = tuple(next(csv.reader(file)))
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(",".join(columns) + "\n")
    commit = os.environ.get("PAB_COMMIT") or _commit(path.resolve().parent)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        for row in result["contenders"]:
            if row["seconds"] is not None:
                writer.writerow(
                    {
                        "date": result["date"][:10],
                        "gpu": result["device"],
                        "commit": commit,
                        "op": "denoising run",
                        "shape": result["workload"],
                        "dtype": result["dtype"],
                        "backend": row["name"],
                        "ms": f"{row['seconds'] * 1e3:.2f}",
                        "figure": f"{row['frames_per_second']:.2f}",
                        "unit": "frames/s",
                    }
                )


def _commit(folder: Path) -> str:
    """The commit that `folder` is at, or "unknown"."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
