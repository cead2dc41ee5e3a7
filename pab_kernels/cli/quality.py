"""`pab quality`: what settings do to videos, and the time they save."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pab_kernels.cli import measured, options

if TYPE_CHECKING:
    from pab_kernels.tune.trials import Trial


def quality(
    context: typer.Context,
    pab: Annotated[
        list[str] | None,
        typer.Option(help="A preset (latte, latte:347) or a YAML file; repeat it. By default all named settings."),
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also write the table here.")] = None,
    model: options.Model = "demo",
    prompt: measured.Prompt = None,
    videos: measured.Videos = 8,
    seed: measured.Seed = 1,
    steps: measured.Steps = None,
    guidance: options.Guidance = None,
    weights: options.Weights = None,
    text_encoder: options.TextEncoder = None,
    vae: measured.Vae = None,
    resolution: options.Resolution = None,
    duration: options.Duration = None,
    aspect: options.Aspect = None,
    size: options.Size = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Measure what settings of PAB do to a model's videos, and the time they save. The seed is not that of pab tune.

    Examples:

    pab quality

    pab quality --pab latte --pab outputs/tuned.yaml --videos 16 --seed 7
    """
    from pab_kernels.pipelines import generate
    from pab_kernels.tune import results, trials

    done: list[Trial] = []
    with options.clean_errors():
        settings = {Path(name).name: generate.pab_settings(name) for name in pab or ()}
        if None in settings.values():
            raise ValueError("pab: got 'off', must be a preset or a file: all are compared with it anyway")
        pipe, request = measured.load(context.params)
        chosen = {name: config for name, config in settings.items() if config is not None} or measured.named(pipe)
        with measured.progress() as bar:
            meter = measured.Meter(bar, request, len(request.prompts) * (1 + len(chosen)))
            meter.say("without PAB")
            try:
                try_out = meter.watch(trials.Yardstick(pipe, request, meter.advance), chosen, 0)
                for name, config in chosen.items():
                    done.append(try_out(name, config))
                    if csv_file is not None:
                        results.write_csv(done, csv_file)
            except KeyboardInterrupt:
                options.print_error(f"interrupted after {len(done)} settings")
                raise typer.Exit(options.INTERRUPTED) from None
            finally:
                if done:
                    bar.stop()
                    Console().print(measured.origin(pipe, request, context.params), highlight=False, soft_wrap=True)
                    Console().print(results.table(done))
