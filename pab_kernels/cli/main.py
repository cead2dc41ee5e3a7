"""The `pab` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from pab_kernels.cli import options
from pab_kernels.cli.bench import bench, report
from pab_kernels.cli.generate import generate
from pab_kernels.cli.tune import compare, profile, quality, tune
from pab_kernels.config import PRESETS, PABConfig

if TYPE_CHECKING:
    from pab_kernels.pipelines.memory import PlannedRun

app = typer.Typer(
    help="Pyramid Attention Broadcast: faster video diffusion transformers, without training.",
    epilog=options.EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (generate, profile, tune, quality, compare, bench, report):
    app.command()(command)
console = Console()


@app.command()
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
) -> None:
    """Print versions, GPU and backends; or the memory that a run needs.

    Examples:

    pab info

    pab info --model open_sora --resolution 480p --duration 8s
    """
    from pab_kernels.measure import info as about

    if model is not None:
        with options.clean_errors():
            small = {"cache_dtype": cache_dtype, "linear_precision": linear_precision}
            _print_memory(model, resolution, duration, aspect, size, pab, prompts, dtype, cache_device, small)
        return
    for name, version in about.versions().items():
        console.print(f"{name:14} {version}", highlight=False)
    console.print(f"{'gpu':14} {about.gpu()}", highlight=False)
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
) -> None:
    from pab_kernels.pipelines import generate as generation
    from pab_kernels.pipelines import memory
    from pab_kernels.pipelines.loading import resolve_model
    from pab_kernels.pipelines.sizes import family_size

    family = resolve_model(model, size)
    video = family_size(family, resolution=resolution, duration=duration, aspect=aspect, size=size)
    if video is None:
        raise ValueError(f"model: got {model!r}, must be latte, open_sora, open_sora_plan_v110 or open_sora_plan_v120")
    config = generation.pab_settings(pab or family, **small) or PABConfig()
    on_host = options.on_host(cache_device)
    run = memory.PlannedRun(family, video, config, 2 * prompts, options.dtype_named(dtype), on_host)
    need = memory.estimate(run)
    console.print(
        f"{family} {video}, latents {video.latent}, batch of {2 * prompts} (guidance), {dtype}", highlight=False
    )
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
    console.print("Without text encoder and VAE.")
    if config.linear_precision is not None:
        _print_fp8(run)


def _print_fp8(run: PlannedRun) -> None:
    from pab_kernels.pipelines import memory

    trials = memory.fp8_trials(run)
    if isinstance(trials, str):
        console.print(f"No linears in fp8: {trials}", soft_wrap=True)
        return
    table = Table("layer", "rows", "channels", "features", str(run.dtype), "fp8", "runs in fp8")
    for shape, trial in trials.items():
        sizes = map(str, (shape.rows, shape.channels, shape.features))
        times = f"{trial.plain_ms:.3f} ms", f"{trial.fp8_ms:.3f} ms"
        table.add_row(shape.layer, *sizes, *times, "yes" if trial.pays else "no")
    console.print(table)


@app.command()
def schedule(
    preset: Annotated[
        str | None, typer.Option(help="A family, with a variant if wanted: latte, open_sora:579.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of PAB settings.")] = None,
    family: Annotated[str, typer.Option(help="Whose sampler gives the timesteps, with --config.")] = "latte",
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    plot: Annotated[Path | None, typer.Option(help="Also draw it as a picture.")] = None,
) -> None:
    """Draw which steps compute and which broadcast.

    Examples:

    pab schedule --preset latte --steps 50

    pab schedule --config examples/pab.yaml --family open_sora --steps 30 --plot schedule.png
    """
    from pab_kernels import figures
    from pab_kernels.pipelines.samplers import family_timesteps
    from pab_kernels.schedule import Schedule

    with options.clean_errors():
        if (preset is None) == (config is None):
            raise ValueError(f"give one of --preset ({', '.join(PRESETS)}) and --config")
        if config is not None:
            settings, name = PABConfig.from_yaml(config), config.name
        else:
            family, _, variant = str(preset).partition(":")
            settings, name = PABConfig.preset(family, variant or None), str(preset)
        plan = Schedule(settings, family_timesteps(family, steps))
        console.print(figures.schedule_table(plan))
        kinds = figures.kinds_shown(plan)
        console.print(
            f"{len(plan)} calls for {steps} steps of {family}; "
            f"{plan.saved_share(kinds):.1%} of the attention calls are broadcast"
        )
        if plot is not None:
            figures.save_figure(figures.schedule_figure(plan, f"{name}, {steps} steps"), plot)
            console.print(f"wrote {plot}", soft_wrap=True)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="A recorded run, .safetensors.")],
    tolerance: Annotated[float | None, typer.Option(help="Largest error; by default fit to the dtype.")] = None,
    device: options.Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Replay a recorded run of the original; exit code 1 if a step strays beyond the tolerance.

    Example:

    pab verify tests/data/goldens/latte.safetensors
    """
    from pab_kernels.measure import verify as recorded

    with options.clean_errors():
        number, place = options.dtype_named(dtype), options.device_named(device)
        if tolerance is not None and not tolerance > 0:
            raise ValueError(f"tolerance: got {tolerance}, must be above 0")
        recording = recorded.Recording.load(file)
        if tolerance is None:
            tolerance = recorded.default_tolerance(recording.family, number)
        within = True
        for name, config, steps in (
            ("without PAB", PABConfig(), recording.base),
            ("with PAB", recording.pab_config, recording.pab),
        ):
            error = recorded.worst_error(recorded.replay(recording, config, place, number), steps)
            within &= error <= tolerance
            console.print(f"{recording.family} {name}: worst step {error:.2e} (tolerance {tolerance:.0e})")
    raise typer.Exit(0 if within else 1)


if __name__ == "__main__":
    sys.exit(app())
