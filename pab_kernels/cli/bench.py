"""`pab bench`: the command, its tables and files."""

from __future__ import annotations

import datetime
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from pab_kernels.cli import options
from pab_kernels.cli.csv_rows import append_rows, columns_of, commit, device_name
from pab_kernels.cli.whole_runs import whole_runs
from pab_kernels.files import check_outputs, replaced

if TYPE_CHECKING:
    import torch

    from pab_kernels.measure.benchmark import Floor, Timing
    from pab_kernels.measure.contenders import Problem
    from pab_kernels.measure.report import Grid

TOLERANCE = {"bfloat16": 3e-2, "float16": 1e-2, "float32": 1e-4}
"""Largest relative error of the latents after one step of this runtime, against the eager host.

The bare prediction may differ twice as much: in bfloat16 the eager host's own error is 2e-2 to 4e-2 (computed, against
float32, at full depth and a quarter of the width), while leaving out a kind of attention changes it by 1e-1 or more.
"""


def bench(
    context: typer.Context,
    workload: Annotated[str, typer.Option(help="What to run, such as open_sora-480p-2s, latte-16x512.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything here, as JSON.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also append a row for each contender here.")] = None,
    report_folder: Annotated[
        Path | None, typer.Option("--report", help="Also write report.html and report.md into this folder.")
    ] = None,
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
    pab: options.Pab = None,
    scale: Annotated[str, typer.Option(help="full, or tiny: two narrow layers, to try it out.")] = "full",
    end_to_end: Annotated[
        bool, typer.Option("--end-to-end", help="Time text, denoising, decoding and writing of this runtime instead.")
    ] = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    cache_device: options.CacheDevice = None,
) -> None:
    """Time a denoising run: host, plain PAB, this runtime.

    Exit code 1 if a contender failed or this runtime strays from the eager host, 2 for a wrong option.

    Examples:

    pab bench --workload latte-16x512 --compile --json latte.json

    pab bench --workload open_sora-480p-2s --report reports/480p

    pab bench --workload latte-16x512 --scale tiny --device cpu

    pab bench --workload open_sora-360p-2s --end-to-end
    """
    from pab_kernels import workloads as named
    from pab_kernels.config import PABConfig
    from pab_kernels.measure import benchmark, contenders
    from pab_kernels.measure import report as pages
    from pab_kernels.pipelines import generate

    console = options.console(least_width=190)  # a log file gives 80, too narrow for the table
    with options.clean_errors():
        chosen = named.workload(workload)
        settings = PABConfig.preset(chosen.family) if pab is None else generate.pab_settings(pab)
        if settings is None:
            raise ValueError("pab: got 'off', must be a preset or a file: runs without PAB are timed anyway")
        for option, value, allowed in (
            ("scale", scale, ("full", "tiny")),
            ("compile-scope", compile_scope, contenders.COMPILE_SCOPES),
        ):
            if value not in allowed:
                raise ValueError(f"{option}: got {value!r}, must be one of {', '.join(allowed)}")
        options.on_host(cache_device)
        pictures = [] if report_folder is None else [report_folder / name for name in pages.FILES]
        check_outputs({"json": [json_file], "csv": [csv_file], "report": pictures}, inputs=[pab])
        columns = columns_of(csv_file)
        place = options.device_named(device)
        number = options.dtype_named(dtype or options.default_dtype(place))
        names = contender_names(chosen.family, runs, compile_host, _no_fp8(place, number))
        if scale == "tiny":
            chosen = chosen.tiny()
        if end_to_end:
            if report_folder is not None:
                raise ValueError("end-to-end: got it with --report, must be with --json or --csv alone")
            found = whole_runs(chosen, settings, names, repeats, steps, place, number, json_file, scale == "tiny", pab)
            if csv_file is not None:
                append_rows(csv_file, columns, found)
            return

        problem = contenders.Problem.make(chosen, settings, place, number, steps, compile_scope, cache_device)
        fp8 = any(contenders.CONTENDERS[name].fp8 for name in names)
        floor = benchmark.measure_floor(problem, fp8=fp8)
        console.print(heading(problem, floor))
        timings: dict[str, Timing] = {}
        result: dict[str, Any] = summary(problem, floor, command_line(context))
        if {"runtime", "runtime+pab"} & set(names):
            prediction, latents = benchmark.check(problem)
            tolerance = TOLERANCE[str(number).removeprefix("torch.")]
            within = latents <= tolerance and prediction <= 2 * tolerance
            result["check"] = {"latents": latents, "prediction": prediction, "tolerance": tolerance, "within": within}
            console.print(pages.check_line(result["check"]))
        for name in names:
            timing = timings[name] = benchmark.measure(name, problem, repeats, budget)
            times = timing.error or " ".join(f"{seconds:.3f}" for seconds in timing.runs)
            console.print(f"{name}: warm-up {timing.warm_up:.1f} s; {times}")
            result["contenders"] = rows(timings, problem, floor)
            if json_file is not None:
                write_json(result, json_file)  # after each, so that a run cut short leaves what it has
        console.print(markdown_table(pages.runs_grid(result["contenders"]), chosen.name))
        if any(row["variants"] for row in result["contenders"]):
            console.print(markdown_table(pages.variants_grid(result["contenders"]), "this runtime, by step variant"))
        if csv_file is not None:
            append_rows(csv_file, columns, csv_rows(result))
        if report_folder is not None:
            console.print(f"wrote {pages.write([result], report_folder)[0]}", soft_wrap=True)
        if not result.get("check", {"within": True})["within"] or any(timing.error for timing in timings.values()):
            raise typer.Exit(1)


def command_line(context: typer.Context) -> str:
    """The command with the options that were given, but for those that say where files go."""
    words = ["pab", "bench"]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        source = context.get_parameter_source(parameter.name or "")
        given = source is not None and source.name == "COMMANDLINE"
        if given and parameter.name not in ("json_file", "csv_file", "report_folder"):
            words += [parameter.opts[0]] if value is True else [parameter.opts[0], str(value)]
    return shlex.join(words)


def _no_fp8(place: torch.device, dtype: torch.dtype) -> str | None:
    import torch

    from pab_kernels.ops.backends import no_fp8

    return no_fp8(place) if dtype == torch.bfloat16 else f"fp8 linears need bfloat16 weights, got {dtype}"


def contender_names(family: str, runs: str | None, compile_host: bool, no_fp8: str | None = None) -> list[str]:
    """The contenders to run, in order; `no_fp8` says why the device has no fp8 linears, None if it has.

    Raises
    ------
    ValueError
        An unknown name, diffusers' hook for another family than Latte, or fp8 linears where there are none.
    """
    from pab_kernels.measure.contenders import CONTENDERS

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
    from pab_kernels.measure import info

    batch, frames, tokens, channels = floor.shape
    filled = "" if floor.gemm_filled is None else f", {floor.gemm_filled / 1e12:.0f} on enough tokens to fill the GPU"
    fp8_rate = fp8_floor = ""
    if floor.ceilings.fp8_flops is not None:
        fp8_rate = f"; fp8 GEMMs {floor.ceilings.fp8_flops / 1e12:.0f} TFLOP/s"
        fp8_floor = f"; in fp8 {floor.seconds(False, fp8=True):.3f} s and {floor.seconds(True, fp8=True):.3f} s"
    return (
        f"{problem.workload.name}: {len(problem.timesteps)} calls of [{batch}, {frames}, {tokens}, {channels}], "
        f"{str(problem.dtype).removeprefix('torch.')}, on {device_name(problem.device)}\n"
        f"{', '.join(f'{name} {version}' for name, version in info.versions().items())}\n"
        f"ceilings: GEMMs {floor.gemm_own / 1e12:.3g} TFLOP/s on the run's tokens{filled}; "
        f"copy {floor.ceilings.bandwidth / 1e12:.3g} TB/s{fp8_rate}\n"
        f"floor: {floor.seconds(False):.3f} s without PAB, {floor.seconds(True):.3f} s with PAB{fp8_floor}"
    )


def summary(problem: Problem, floor: Floor, command: str) -> dict[str, Any]:
    """Everything about the run but the contenders, as plain values; `command` repeats it."""
    from pab_kernels.measure import info

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
        "device": device_name(problem.device),
        "compile_scope": problem.compile_scope,
        "cache_device": problem.cache_device,
        "command": command,
        "commit": commit(),
        "machine": {"gpu": info.gpu(), "cpu": info.cpu()},
        "versions": info.versions(),
        "ceilings": {
            "gemm_flops": floor.ceilings.flops,
            "gemm_flops_own_tokens": floor.gemm_own,
            "gemm_flops_filled": floor.gemm_filled,
            "copy_bytes": floor.ceilings.bandwidth,
            "fp8_gemm_flops": floor.ceilings.fp8_flops,
        },
        "floor": {
            name: {
                "seconds": floor.seconds(pab),
                "seconds_fp8": None if floor.ceilings.fp8_flops is None else floor.seconds(pab, fp8=True),
                "flops": work.flops,
                "bytes": work.nbytes,
            }
            for name, pab, work in (("without PAB", False, floor.without), ("with PAB", True, floor.with_pab))
        },
    }


def rows(timings: dict[str, Timing], problem: Problem, floor: Floor) -> list[dict[str, Any]]:
    """One row a contender; ratios are how many times faster it is than another."""
    from pab_kernels.measure.benchmark import relative_error
    from pab_kernels.measure.contenders import CONTENDERS
    from pab_kernels.measure.report import RATIOS

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
                "pab": contender.pab,
                "seconds": seconds,
                "runs": timing.runs,
                "step_seconds": timing.steps,
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


def markdown_table(grid: Grid, title: str) -> Table:
    """A grid for the terminal, to be pasted into Markdown."""
    header, rows = grid
    table = Table(title=title, box=box.MARKDOWN)
    for name in header:
        table.add_column(name, justify="left" if name in ("", "variant") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write `result`; an existing file is replaced only once the new one is complete."""
    with replaced(path) as partial:
        partial.write_text(json.dumps(result, indent=1), encoding="utf-8")


def csv_rows(result: dict[str, Any]) -> list[dict[str, str]]:
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
