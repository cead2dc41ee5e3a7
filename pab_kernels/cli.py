"""The `pab` command."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from pab_kernels.bench_cli import bench
from pab_kernels.config import PRESETS, PABConfig

if TYPE_CHECKING:
    from pab_kernels.generate import Generated
    from pab_kernels.memory import PlannedRun

DEMO_PROMPT = "a red circle moves right over a striped background"

app = typer.Typer(
    help="Pyramid Attention Broadcast: faster video diffusion transformers, without training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(bench)
console = Console()


@contextmanager
def _clean_errors() -> Iterator[None]:
    """A wrong input ends with its message and exit code 2; anything else is a bug and keeps its traceback."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError, MemoryError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


# Options that several commands share.
Resolution = Annotated[str | None, typer.Option(help="Open-Sora: 144p, 240p, 360p, 480p or 720p.")]
Duration = Annotated[str | None, typer.Option(help="Open-Sora: 2s, 4s, 8s or 16s, or frames, a multiple of 17.")]
Aspect = Annotated[str | None, typer.Option(help="Open-Sora, height to width: 9:16 (wide), 16:9 (tall), 1:1, ...")]
CacheDevice = Annotated[str | None, typer.Option(help="cpu keeps PAB's slots in pinned host memory.")]
CacheDtype = Annotated[str | None, typer.Option(help="fp8 or int8: PAB's slots in half the memory.")]
LinearPrecision = Annotated[
    str | None,
    typer.Option(help="fp8: the blocks' linears in fp8 where that is faster; fp8-all: all of them, measured or not."),
]
Size = Annotated[str | None, typer.Option(help="Open-Sora-Plan: 65x512x512, 221x512x512; 29x480p, 93x480p, ...")]


@app.command()
def info(
    model: Annotated[str | None, typer.Option(help="A family: print the memory that a run of it needs.")] = None,
    resolution: Resolution = None,
    duration: Duration = None,
    aspect: Aspect = None,
    size: Size = None,
    pab: Annotated[str | None, typer.Option(help="A preset, a YAML file, or off; by default the family's own.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Videos in a batch; guidance doubles them.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    cache_device: CacheDevice = None,
    cache_dtype: CacheDtype = None,
    linear_precision: LinearPrecision = None,
) -> None:
    """Print versions, GPU and backends; or memory: pab info --model open_sora --resolution 480p --duration 8s"""
    from pab_kernels import info as about

    if model is not None:
        with _clean_errors():
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
    from pab_kernels import generate as generation
    from pab_kernels import memory
    from pab_kernels.pipelines.loading import resolve_model
    from pab_kernels.pipelines.sizes import family_size

    family = resolve_model(model, size)
    video = family_size(family, resolution=resolution, duration=duration, aspect=aspect, size=size)
    if video is None:
        raise ValueError(f"model: got {model!r}, must be latte, open_sora, open_sora_plan_v110 or open_sora_plan_v120")
    config = generation.pab_settings(pab or family, **small) or PABConfig()
    on_host = _on_host(cache_device)
    run = memory.PlannedRun(family, video, config, 2 * prompts, _dtype(dtype), on_host)
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
    from pab_kernels import memory

    trials = memory.fp8_trials(run)
    if isinstance(trials, str):
        console.print(f"No linears in fp8: {trials}")
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
    """Draw which steps compute and which broadcast. Example: pab schedule --preset latte --steps 50"""
    from pab_kernels import figures
    from pab_kernels.pipelines.samplers import family_timesteps
    from pab_kernels.schedule import Schedule

    with _clean_errors():
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
            figures.plot_schedule(plan, plot, f"{name}, {steps} steps")
            console.print(f"wrote {plot}", soft_wrap=True)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="A recorded run, .safetensors.")],
    tolerance: Annotated[float | None, typer.Option(help="Largest error; by default fit to the dtype.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Replay a recorded run of the original; exit 0 if every step stays within the tolerance."""
    from pab_kernels import verify as recorded

    with _clean_errors():
        number = _dtype(dtype)
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
            error = recorded.worst_error(recorded.replay(recording, config, device, number), steps)
            within &= error <= tolerance
            console.print(f"{recording.family} {name}: worst step {error:.2e} (tolerance {tolerance:.0e})")
    raise typer.Exit(0 if within else 1)


@app.command()
def generate(
    prompt: Annotated[list[str] | None, typer.Option(help="What to show; repeat it for several videos.")] = None,
    negative_prompt: Annotated[str, typer.Option(help="What to avoid.")] = "",
    model: Annotated[
        str,
        typer.Option(
            help="demo, latte, open_sora, open_sora_plan_v110, open_sora_plan_v120, or a folder or hub id of a Latte "
            "pipeline."
        ),
    ] = "demo",
    weights: Annotated[str | None, typer.Option(help="The model's checkpoint: a file, folder or hub id.")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="T5 or mT5: a folder or hub id.")] = None,
    vae: Annotated[
        str | None, typer.Option(help="A video decoder for diffusers; without one latents are saved.")
    ] = None,
    random_weights: Annotated[bool, typer.Option(help="No checkpoint and no text encoder: for timing.")] = False,
    resolution: Resolution = None,
    duration: Duration = None,
    aspect: Aspect = None,
    size: Size = None,
    pab: Annotated[str | None, typer.Option(help="A preset (latte, latte:347), a YAML file, or off.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; by default the model's own.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", "--cfg", help="Guidance scale.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Of the noise; once, or once for each prompt.")] = None,
    output: Annotated[Path, typer.Option(help="Where the video goes, .mp4 or .gif.")] = Path("outputs/video.mp4"),
    compare: Annotated[bool, typer.Option(help="Generate with and without PAB, and compare.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="By default bfloat16 on cuda, float32 on cpu.")] = None,
    cache_device: CacheDevice = None,
    cache_dtype: CacheDtype = None,
    linear_precision: LinearPrecision = None,
) -> None:
    """Generate videos. Example: pab generate --prompt "a blue star moves up" --compare"""
    import torch

    from pab_kernels import generate as generation
    from pab_kernels.pipelines.loading import Source, load_pipeline, resolve_model
    from pab_kernels.pipelines.sizes import family_size

    with _clean_errors():
        source = Source(resolve_model(model, size), weights, text_encoder, vae, random_weights)
        generation.check_output(output, source)
        family = source.family
        defaults = generation.DEFAULTS[family]
        video = family_size(family, resolution=resolution, duration=duration, aspect=aspect, size=size)
        request = generation.Request(
            prompt or [DEMO_PROMPT],
            negative_prompt,
            defaults.steps if steps is None else steps,
            defaults.guidance if guidance is None else guidance,
            seed or [0],
            video,
        )
        pab = defaults.preset if pab is None else pab
        config = generation.pab_settings(pab, cache_dtype=cache_dtype, linear_precision=linear_precision)
        if compare and config is None:
            raise ValueError("pab: got 'off' with --compare, must be a preset or a file: there is nothing to compare")
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        number = _dtype(dtype or ("bfloat16" if place.type == "cuda" else "float32"))
        if place.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: got cuda, must be cpu: torch sees no CUDA GPU")
        _on_host(cache_device)
        generation.check_memory(source, request, config, place, number, cache_device)
        pipe = load_pipeline(source, video, dtype=number, device=place)
        runs = {"without PAB": None, "with PAB": config} if compare else {"denoising": config}
        results = {}
        for name, settings in runs.items():
            with _progress() as progress:
                task = progress.add_task(name, total=request.steps)
                show = partial(_show_progress, progress, task)
                results[name] = generation.generate(pipe, request, settings, show, cache_device)
        for path in generation.save(results, request, pipe, config, output):
            console.print(f"wrote {path}", soft_wrap=True)
        _print_results(results)


def _print_results(results: dict[str, Generated]) -> None:
    from pab_kernels import generate as generation
    from pab_kernels import memory, quality

    last = list(results.values())[-1]
    if last.report is not None:
        console.print(str(last.report), highlight=False)
    table = Table("", *results)
    table.add_row("seconds", *(f"{result.seconds:.2f}" for result in results.values()))
    if last.report is not None:
        blank = [""] * (len(results) - 1)
        for kind, computed in last.report.computed.items():
            table.add_row(f"{kind}: computed + broadcast", *blank, f"{computed} + {last.report.broadcast[kind]}")
        table.add_row("cache, MiB", *blank, f"{last.report.cache_bytes / 2**20:.1f}")
        if last.report.host_bytes:
            table.add_row("cache in host memory, MiB", *blank, f"{last.report.host_bytes / 2**20:.1f}")
    if last.peak_bytes is not None:
        table.add_row("peak GPU memory, GiB", *(f"{memory.gib(r.peak_bytes or 0):.2f}" for r in results.values()))
    if last.latents is not None:
        table.add_row("finite latents", *("yes" if r.finite else "NO" for r in results.values()))
    if len(results) > 1:
        without = results["without PAB"]
        table.add_row("speed-up", "", f"{without.seconds / last.seconds:.2f}x")
        if last.frames is not None and without.frames is not None:
            for i, (video, baseline) in enumerate(zip(last.frames, without.frames, strict=True)):
                score = quality.compare(video, baseline)
                which = f", video {i}" if len(last.frames) > 1 else ""
                table.add_row(f"PSNR against no PAB{which}", "", f"{score.psnr:.2f} dB")
                table.add_row(f"SSIM against no PAB{which}", "", f"{score.ssim:.4f}")
        else:
            table.add_row("latents' difference to no PAB", "", f"{generation.difference(last, without):.2e}")
    console.print(table)


def _show_progress(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _on_host(cache_device: str | None) -> bool:
    if cache_device not in (None, "cpu", "cuda"):
        raise ValueError(f"cache_device: got {cache_device!r}, must be cpu or cuda")
    return cache_device == "cpu"


def _dtype(name: str):
    import torch

    allowed = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in allowed:
        raise ValueError(f"dtype: got {name!r}, must be one of {', '.join(allowed)}")
    return allowed[name]


if __name__ == "__main__":
    sys.exit(app())
