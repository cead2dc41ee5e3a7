"""The `pab` command."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pab_kernels.config import PRESETS, PABConfig

app = typer.Typer(
    help="Pyramid Attention Broadcast: faster video diffusion transformers, without training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()


@contextmanager
def _clean_errors() -> Iterator[None]:
    """A wrong input ends with its message and exit code 2; anything else is a bug and keeps its traceback."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(2) from error


@app.command()
def info() -> None:
    """Print versions, the GPU, and which backend serves each op and why."""
    from pab_kernels import info as about

    for name, version in about.versions().items():
        console.print(f"{name:14} {version}", highlight=False)
    console.print(f"{'gpu':14} {about.gpu()}", highlight=False)
    table = Table("op", "backend", "why")
    for op, choice in about.backends().items():
        table.add_row(op, choice.backend, choice.reason)
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
            console.print(f"wrote {plot}")


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
        if tolerance is None:
            tolerance = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}[dtype]
        if not tolerance > 0:
            raise ValueError(f"tolerance: got {tolerance}, must be above 0")
        recording = recorded.Recording.load(file)
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
    prompt: Annotated[str, typer.Option(help="What to show.")] = "a red circle moves right over a striped background",
    negative_prompt: Annotated[str, typer.Option(help="What to avoid.")] = "",
    model: Annotated[str, typer.Option(help="demo, latte, or a folder or hub id of a Latte pipeline.")] = "demo",
    pab: Annotated[str, typer.Option(help="A preset (latte, latte:347), a YAML file, or off.")] = "latte",
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 30,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale.")] = 4.0,
    seed: Annotated[int, typer.Option(help="Of the initial noise.")] = 0,
    output: Annotated[Path, typer.Option(help="Where the video goes, .mp4 or .gif.")] = Path("outputs/video.mp4"),
    compare: Annotated[bool, typer.Option(help="Generate with and without PAB, and compare.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="By default bfloat16 on cuda, float32 on cpu.")] = None,
) -> None:
    """Generate a video. Example: pab generate --prompt "a blue star moves up" --compare"""
    import torch

    from pab_kernels import figures, quality
    from pab_kernels import generate as generation

    with _clean_errors():
        if output.suffix not in (".mp4", ".gif"):
            raise ValueError(f"output: got {output.name!r}, must end in .mp4 or .gif")
        config = generation.pab_settings(pab)
        if compare and config is None:
            raise ValueError("pab: got 'off' with --compare, must be a preset or a file: there is nothing to compare")
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        number = _dtype(dtype or ("bfloat16" if place.type == "cuda" else "float32"))
        pipe = generation.load_pipeline(model, place, number)
        runs = {"without PAB": None, "with PAB": config} if compare else {"denoising": config}
        results = {}
        for name, settings in runs.items():
            with _progress() as progress:
                task = progress.add_task(name, total=steps)
                results[name] = generation.generate(
                    pipe,
                    prompt,
                    negative_prompt=negative_prompt,
                    steps=steps,
                    guidance=guidance,
                    seed=seed,
                    config=settings,
                    on_step=partial(progress.update, task, advance=1),
                )
        result = results[name]
        figures.save_video(result.frames, output)
        console.print(f"wrote {output}")
        if result.report is not None:
            console.print(str(result.report), highlight=False)
        if compare:
            with_pab, without = results["with PAB"], results["without PAB"]
            score = quality.compare(with_pab.frames, without.frames)
            sheet = output.with_suffix(".png")
            figures.contact_sheet({name: result.frames for name, result in results.items()}, sheet, prompt)
            table = Table("", "without PAB", "with PAB")
            table.add_row("seconds", f"{without.seconds:.2f}", f"{with_pab.seconds:.2f}")
            table.add_row("speed-up", "", f"{without.seconds / with_pab.seconds:.2f}x")
            table.add_row("PSNR against no PAB", "", f"{score.psnr:.2f} dB")
            table.add_row("SSIM against no PAB", "", f"{score.ssim:.4f}")
            console.print(table)
            console.print(f"wrote {sheet}")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _dtype(name: str):
    import torch

    allowed = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in allowed:
        raise ValueError(f"dtype: got {name!r}, must be one of {', '.join(allowed)}")
    return allowed[name]


if __name__ == "__main__":
    sys.exit(app())
