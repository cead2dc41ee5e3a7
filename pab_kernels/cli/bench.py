"""`pab bench`: the command, and what its options mean."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pab_kernels.cli import benching, options
from pab_kernels.cli.csv_rows import append_rows, columns_of
from pab_kernels.cli.whole_runs import whole_runs
from pab_kernels.files import check_outputs

if TYPE_CHECKING:
    import torch

    from pab_kernels.distributed.mesh import Mesh
    from pab_kernels.workloads import Workload


def bench(
    context: typer.Context,
    workload: Annotated[
        list[str], typer.Option(help="What to run, such as open_sora-480p-2s, latte-16x512; repeat it for several.")
    ],
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
    gpus: options.Gpus = 1,
    mesh: Annotated[
        list[str] | None,
        typer.Option(help="How they share it: guidance=2,frames=4; repeat it for several; by default all there are."),
    ] = None,
    shares: Annotated[
        bool, typer.Option("--shares", help="Also time the largest share of a mesh's frames, on one GPU alone.")
    ] = False,
) -> None:
    """Time a denoising run: host, plain PAB, this runtime; and this runtime on several GPUs against one of them.

    Exit code 1 if a contender failed or this runtime strays from the eager host, 2 for a wrong option.

    Examples:

    pab bench --workload latte-16x512 --compile --json latte.json

    pab bench --workload open_sora-480p-2s --report reports/480p

    pab bench --workload latte-16x512 --scale tiny --device cpu

    pab bench --workload open_sora-360p-2s --end-to-end

    pab bench --workload open_sora-480p-2s --workload latte-16x512 --gpus 2 --mesh frames=2 --mesh guidance=2
    """
    from pab_kernels import workloads as named
    from pab_kernels.config import PABConfig
    from pab_kernels.distributed.launch import check_ranks, launch
    from pab_kernels.measure import contenders
    from pab_kernels.measure import report as pages
    from pab_kernels.pipelines import generate

    with options.clean_errors():
        if len(workload) > 1 and (json_file is not None or end_to_end):
            raise ValueError(f"json, end-to-end: got one with {len(workload)} workloads, must be with one")
        if shares and gpus == 1:
            raise ValueError("shares: got it without --gpus, must be with several")
        given = None if pab is None else generate.pab_settings(pab)
        if pab is not None and given is None:
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
        if gpus > 1:
            check_ranks(gpus, str(place))
        if end_to_end and (report_folder is not None or gpus > 1):
            raise ValueError("end-to-end: got it with --report or --gpus, must be with --json or --csv alone")

        def prepared(name: str) -> tuple[Workload, PABConfig, list[str]]:
            chosen = named.workload(name)
            names = contender_names(chosen.family, runs, compile_host, _no_fp8(place, number), gpus)
            settings = PABConfig.preset(chosen.family) if given is None else given
            return (chosen.tiny() if scale == "tiny" else chosen), settings, names

        if end_to_end:
            tiny = scale == "tiny"
            found = whole_runs(*prepared(workload[0]), repeats, steps, place, number, json_file, tiny, pab)
            if csv_file is not None:
                append_rows(csv_file, columns, found)
            return
        jobs = []
        for chosen, settings, names in map(prepared, workload):
            if shares and chosen.family == "latte":
                raise ValueError("shares: got it for latte, whose model takes no other number of frames")
            jobs.append(
                benching.Job(
                    workload=chosen,
                    settings=settings,
                    names=tuple(names),
                    repeats=repeats,
                    budget=budget,
                    steps=steps,
                    compile_scope=compile_scope,
                    device=place,
                    dtype=number,
                    cache_device=cache_device,
                    command=command_line(context),
                    json_file=json_file,
                    csv_file=csv_file,
                    columns=columns,
                    report_folder=report_folder,
                    meshes=_meshes(chosen, gpus, mesh),
                    shares=shares,
                )
            )
        code = benching.run(jobs) if gpus == 1 else launch(benching.run, jobs, ranks=gpus, device=place.type)
        if code:
            raise typer.Exit(code)


def _meshes(chosen: Workload, gpus: int, texts: list[str] | None) -> tuple[Mesh, ...]:
    """The meshes that ``--mesh`` says, or all of so many ranks; none for one."""
    from pab_kernels.measure.mesh_costs import meshes, parse_mesh

    asked = tuple(filter(None, (parse_mesh(text, gpus) for text in texts or ())))
    if gpus == 1:
        return ()
    return asked or tuple(meshes(gpus, chosen.grid[0], guided=True))


def command_line(context: typer.Context) -> str:
    """The command with the options that were given, but for those that say where files go."""
    words = ["pab", "bench"]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        source = context.get_parameter_source(parameter.name or "")
        given = source is not None and source.name == "COMMANDLINE"
        if given and parameter.name not in ("json_file", "csv_file", "report_folder"):
            for each in value if isinstance(value, list | tuple) else [value]:
                words += [parameter.opts[0]] if each is True else [parameter.opts[0], str(each)]
    return shlex.join(words)


def _no_fp8(place: torch.device, dtype: torch.dtype) -> str | None:
    import torch

    from pab_kernels.ops.backends import no_fp8

    return no_fp8(place) if dtype == torch.bfloat16 else f"fp8 linears need bfloat16 weights, got {dtype}"


def contender_names(
    family: str, runs: str | None, compile_host: bool, no_fp8: str | None = None, gpus: int = 1
) -> list[str]:
    """The contenders to run, in order; `no_fp8` says why the device has no fp8 linears, None if it has.

    On several GPUs they are this runtime's.

    Raises
    ------
    ValueError
        An unknown name, diffusers' hook for another family than Latte, or fp8 linears where there are none.
    """
    from pab_kernels.measure.contenders import CONTENDERS

    if runs is None:
        fp8 = {name for name, contender in CONTENDERS.items() if contender.fp8}
        others = {"compile", "runtime-fp8+pab-eager"} | (set() if family == "latte" else {"hook"})
        wanted = set(CONTENDERS) - others - (fp8 if no_fp8 else set())
    else:
        wanted = {name.strip() for name in runs.split(",")}
    if gpus > 1 and runs is None:
        wanted &= {"runtime", "runtime+pab", "runtime-fp8", "runtime-fp8+pab"}
    if compile_host:
        wanted.add("compile")
    if unknown := wanted - set(CONTENDERS):
        raise ValueError(f"runs: got {', '.join(sorted(unknown))}, must be among {', '.join(CONTENDERS)}")
    if gpus > 1 and (others := {name for name in wanted if not name.startswith("runtime")}):
        raise ValueError(f"runs: got {', '.join(sorted(others))} with --gpus, must be this runtime's: runtime, ...")
    if "hook" in wanted and family != "latte":
        raise ValueError(f"runs: got hook for {family}, but diffusers' hook only fits latte")
    if no_fp8 and any(CONTENDERS[name].fp8 for name in wanted):
        raise ValueError(f"runs: got {runs}, must be without fp8: {no_fp8}")
    return [name for name in CONTENDERS if name in wanted]
