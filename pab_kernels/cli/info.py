"""`pab info`: versions, GPU and backends, or the memory of a run."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from pab_kernels.cli import options
from pab_kernels.config import PABConfig

if TYPE_CHECKING:
    from pab_kernels.measure.mesh_costs import MeshCost
    from pab_kernels.pipelines.memory import ModelShape, PlannedRun


def info(
    model: Annotated[str | None, typer.Option(help="A family: print the memory that a run of it needs.")] = None,
    resolution: options.Resolution = None,
    duration: options.Duration = None,
    aspect: options.Aspect = None,
    size: options.Size = None,
    pab: options.Pab = None,
    prompts: Annotated[int, typer.Option(min=1, help="Videos in a batch; guidance doubles them.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    cache_device: options.CacheDevice = None,
    cache_dtype: options.CacheDtype = None,
    linear_precision: options.LinearPrecision = None,
    attention_precision: options.AttentionPrecision = None,
    decode_memory: options.DecodeMemory = None,
    seamless: options.Seamless = False,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Of a run on several GPUs, whose time is predicted.")
    ] = None,
    gpus: options.Gpus = 1,
    mesh: options.MeshAxes = None,
) -> None:
    """Print versions, GPU and backends; or the memory that a run needs, on several GPUs that of each.

    Examples:

    pab info

    pab info --model open_sora --resolution 480p --duration 8s

    pab info --model open_sora --resolution 480p --duration 8s --gpus 8
    """
    from pab_kernels.pipelines.decoding import parse_bytes

    with options.clean_errors():
        if model is None:
            if gpus > 1:
                raise ValueError(f"gpus: got {gpus} without --model, must be given with a family whose run it is about")
            _print_machine()
        else:
            small = {
                "cache_dtype": cache_dtype,
                "linear_precision": linear_precision,
                "attention_precision": attention_precision,
            }
            bound = None if decode_memory is None else parse_bytes(decode_memory)
            given = (model, resolution, duration, aspect, size, pab, prompts, dtype, cache_device)
            _print_memory(*given, small, bound, seamless, steps, gpus, mesh)


def _print_machine() -> None:
    from pab_kernels.measure import info as about

    console = options.console()
    for name, version in about.versions().items():
        console.print(f"{name:14} {version}")
    console.print(f"{'gpu':14} {about.gpu()}")
    table = Table("op", "backend", "why")
    for op, choice in about.backends().items():
        table.add_row(op, choice.backend, choice.reason)
    console.print(table)


def _print_memory(
    model: str,
    resolution: str | None,
    duration: str | None,
    aspect: str | None,
    size: str | None,
    pab: str | None,
    prompts: int,
    dtype: str,
    cache_device: str | None,
    small: dict[str, str | None],
    bound: int | None,
    seamless: bool,
    steps: int | None,
    gpus: int,
    mesh: str | None,
) -> None:
    from pab_kernels.measure import mesh_costs
    from pab_kernels.pipelines import generate as generation
    from pab_kernels.pipelines import memory
    from pab_kernels.pipelines.loading import resolve_model
    from pab_kernels.pipelines.sizes import family_size, model_size

    family = resolve_model(model, size)
    if family not in memory.TEXT_LENGTHS:
        raise ValueError(f"model: got {model!r}, must be one of {', '.join(memory.TEXT_LENGTHS)}")
    video = family_size(family, resolution=resolution, duration=duration, aspect=aspect, size=size)
    assert video is not None
    config = generation.pab_settings(pab or family, **small) or PABConfig()
    on_host = options.on_host(cache_device)
    run = memory.PlannedRun.of(
        family,
        video,
        config,
        prompts,
        model_size(family, size),
        dtype=options.dtype_named(dtype),
        cache_on_host=on_host,
    )
    shape = memory.ModelShape.of(family, **run.model)
    mesh_costs.parse_mesh(mesh, gpus)
    costs = mesh_costs.costs_of(run, shape, gpus, mesh, steps) if gpus > 1 else []
    if costs:
        run = dataclasses.replace(run, mesh=costs[0].mesh)
    need = memory.estimate(run, shape)
    console = options.console()
    calls = f"batch of {run.rows}" if run.forwards == 1 else f"{run.forwards} calls a step, each a batch of {run.rows}"
    console.print(f"{family} {video}, latents {video.latent}, {calls} (guidance), {dtype}")
    if costs:
        console.print(f"{gpus} GPUs, mesh {run.mesh}; memory is that of the rank that has most")
    table = Table("", "GiB")
    table.add_row("weights", f"{memory.gib(need.weights):.1f}")
    slots = f"staging of {need.slot_count} slots" if on_host else f"{need.slot_count} slots"
    table.add_row(slots, f"{memory.gib(need.slots):.1f}")
    table.add_row("keys and values of the text", f"{memory.gib(need.text):.1f}")
    table.add_row("activations", f"{memory.gib(need.activations):.1f}")
    table.add_row("all", f"{memory.gib(need.total):.1f}", style="bold")
    if on_host:
        table.add_row("slots in host memory", f"{memory.gib(need.host):.1f}")
    console.print(table)
    decoder = memory.decoder_memory(family, video.latent, run.dtype, bound, seamless)
    if decoder is None:
        console.print("Without text encoder and VAE.")
    else:
        weights, piece = (memory.gib(part) for part in decoder)
        console.print(
            f"Without text encoder. The decoder adds {weights:.1f} of weights, and once the latents are there "
            f"{piece:.1f} for its largest piece.",
            soft_wrap=True,
        )
    others = [f"{name} {memory.gib(memory.estimate(each, shape).total):.1f}" for name, each in memory.smaller_runs(run)]
    if others:
        console.print(f"In all with less, GiB: {'; '.join(others)}", soft_wrap=True)
    if costs:
        _print_costs(costs, mesh_costs.costs_of(run, shape, 1, None, steps)[0])
    if config.linear_precision is not None:
        _print_fp8(run)
    if config.attention_precision is not None:
        _print_fp8_attention(run, shape)


def _print_costs(costs: list[MeshCost], alone: MeshCost) -> None:
    """Of each mesh what it is predicted to take, against one GPU."""
    table = Table("mesh", "seconds", "exchanges, s", "MB a step", "x one GPU")
    table.columns[0].no_wrap = True
    table.columns[0].min_width = max(len(str(cost.mesh)) for cost in costs)
    for cost in [*costs, alone]:
        sent = f"{cost.nbytes / cost.steps / 1e6:.1f}"
        times = f"{cost.seconds:.2f}", f"{cost.exchanges:.3f}"
        table.add_row(str(cost.mesh), *times, sent, f"{alone.seconds / cost.seconds:.2f}")
    console = options.console()
    console.print(table)
    console.print(
        f"Predicted for {costs[0].steps} steps, from counted operations and bytes at the rates of H200s on NVLink: not "
        "measured, and the rates are not this machine's.",
        soft_wrap=True,
    )


def _print_fp8_attention(run: PlannedRun, shape: ModelShape) -> None:
    from pab_kernels.pipelines import memory

    console = options.console()
    found = memory.fp8_attention(run, shape)
    if isinstance(found, str):
        console.print(f"No attention in fp8: {found}", soft_wrap=True)
        return
    for kind, text in found.items():
        console.print(f"{kind} attention in fp8: {text}", soft_wrap=True)


def _print_fp8(run: PlannedRun) -> None:
    from pab_kernels.pipelines import memory
    from pab_kernels.runtime.fp8_trials import kept_at

    console = options.console()
    trials = memory.fp8_trials(run)
    if isinstance(trials, str):
        said = "Which linears gain in fp8 is timed on the GPU that runs them; memory and predictions are of all in fp8"
        console.print(f"{said}. Not timed here: {trials}", soft_wrap=True)
        return
    table = Table("layer", "rows", "channels", "features", str(run.dtype), "fp8", "runs in fp8")
    for shape, trial in trials.items():
        sizes = map(str, (shape.rows, shape.channels, shape.features))
        times = f"{trial.plain_ms:.3f} ms", f"{trial.fp8_ms:.3f} ms"
        table.add_row(shape.layer, *sizes, *times, "yes" if trial.pays else "no")
    console.print(table)
    console.print(f"Measured once, and kept in {kept_at()}", soft_wrap=True)
