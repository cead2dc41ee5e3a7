"""`pab quality`: what settings do to videos, and the time they save."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pab_kernels.cli import measured, options
from pab_kernels.files import check_outputs

if TYPE_CHECKING:
    from pab_kernels.config import PABConfig
    from pab_kernels.pipelines.generate import Request
    from pab_kernels.pipelines.loading import Pipeline
    from pab_kernels.tune.trials import Trial


def quality(
    context: typer.Context,
    pab: Annotated[
        list[str] | None,
        typer.Option(help="A preset (latte, latte:347) or a YAML file; repeat it. By default all named settings."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Also run other ways to leave out work, on the model's own code: pab-hook, taylorseer, fastercache, "
            "first-block-cache, magcache (diffusers'), cache-dit (where it is installed); repeat it."
        ),
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also write the table here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="With --against: quality over time as a picture.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="With --against: so many videos at once.")] = 1,
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

    pab quality --pab latte:fast --against pab-hook --against taylorseer --plot frontier.png
    """
    from pab_kernels.pipelines import generate
    from pab_kernels.tune import results, trials

    done: list[Trial] = []
    with options.clean_errors():
        if plot is not None and not against:
            raise ValueError("plot: needs --against, which measures the times that it shows")
        if batch > 1 and not against:
            raise ValueError(f"batch: got {batch}, must be 1 without --against: trials are of one video at a time")
        if plot is not None:
            from pab_kernels import figures

            figures.check_picture("plot", plot)
        check_outputs({"csv": [csv_file], "plot": [plot]}, inputs=(*(pab or ()), *measured.inputs(context.params)))
        settings = {name: generate.pab_settings(text) for name, text in _names(pab or ()).items()}
        if None in settings.values():
            raise ValueError("pab: got 'off', must be a preset or a file: all are compared with it anyway")
        pipe, request = measured.load(context.params)
        chosen = {name: config for name, config in settings.items() if config is not None} or measured.named(pipe)
        if against:
            origin = measured.origin(pipe, request, context.params) + (f", {batch} at once" if batch > 1 else "")
            _compare(pipe, request, chosen, against, batch, origin, csv_file, plot)
            return
        with measured.progress() as bar:
            meter = measured.Meter(bar, request, len(request.prompts) * (1 + len(chosen)))
            meter.say("without PAB")
            try:
                try_out = meter.watch(trials.Yardstick(pipe, request, meter.advance), chosen, 0)
                for name, config in chosen.items():
                    done.append(try_out(name, config, None))
                    if csv_file is not None:
                        results.write_csv(done, csv_file)
            except KeyboardInterrupt:
                options.print_error(f"interrupted after {len(done)} settings")
                raise typer.Exit(options.INTERRUPTED) from None
            finally:
                if done:
                    bar.stop()
                    options.console().print(measured.origin(pipe, request, context.params), soft_wrap=True)
                    options.console().print(results.table(done))


def _compare(
    pipe: Pipeline,
    request: Request,
    settings: dict[str, PABConfig],
    against: Sequence[str],
    batch: int,
    origin: str,
    csv_file: Path | None,
    plot: Path | None,
) -> None:
    """Run settings and peers side by side, and show both."""
    from pab_kernels import figures
    from pab_kernels.tune import peers

    stderr = options.console(stderr=True)
    rows: list[peers.Row] = []
    try:
        for row in peers.measure(
            pipe, request, settings, against, lambda name: stderr.print(name, soft_wrap=True), batch
        ):
            rows.append(row)
            if csv_file is not None:
                peers.write_csv(rows, csv_file)
    except KeyboardInterrupt:
        options.print_error(f"interrupted after {len(rows)} settings")
        raise typer.Exit(options.INTERRUPTED) from None
    finally:
        if rows:
            options.console().print(origin, soft_wrap=True)
            options.console().print(peers.table(rows))
            if plot is not None:
                figures.save_figure(peers.plot(rows, list(settings), origin), plot)


def _names(texts: Sequence[str]) -> dict[str, str]:
    """A name for each settings, the file's own or its whole path where another is called so."""
    counts = Counter(Path(text).name for text in texts)
    return {text if counts[Path(text).name] > 1 else Path(text).name: text for text in texts}
