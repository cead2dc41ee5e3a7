"""`pab profile`: how much attention changes from step to step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pab_kernels.cli import measured, options
from pab_kernels.files import check_outputs


def profile(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder of profile.csv, profile.png and heatmap.png.")] = Path("outputs"),
    model: options.Model = "demo",
    prompt: measured.Prompt = None,
    videos: measured.Videos = 1,
    seed: measured.Seed = 0,
    steps: measured.Steps = None,
    guidance: options.Guidance = None,
    weights: options.Weights = None,
    text_encoder: options.TextEncoder = None,
    vae: measured.Vae = None,
    random_weights: measured.RandomWeights = False,
    resolution: options.Resolution = None,
    duration: options.Duration = None,
    aspect: options.Aspect = None,
    size: options.Size = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Measure how much attention changes from step to step: what PAB rests on.

    Examples:

    pab profile

    pab profile --model maxin-cn/Latte-1 --prompt "a dog on a beach" --output outputs/latte

    pab profile --model open_sora --resolution 144p --random-weights
    """
    from pab_kernels import figures
    from pab_kernels.tune import figures as tune_figures
    from pab_kernels.tune import profile as profiles

    console = options.console()
    files = [output / name for name in ("profile.csv", "profile.png", "heatmap.png")]
    with options.clean_errors():
        check_outputs({"output": files}, inputs=measured.inputs(context.params))
        pipe, request = measured.load(context.params, compared=False)
        with measured.progress() as bar:
            task = bar.add_task("profile", total=request.steps)
            found = profiles.measure(
                pipe, request, lambda step: bar.update(task, completed=step.done, total=step.total)
            )
        count = len(request.prompts)
        title = f"{model}, {len(found.timesteps)} calls, {count} video{'' if count == 1 else 's'}"
        found.to_csv(files[0])
        figures.save_figure(tune_figures.profile_curves(found, title), files[1])
        figures.save_figure(tune_figures.profile_heat_map(found, title), files[2])
    for line in profiles.findings(found):
        console.print(line)
    for path in files:
        console.print(f"wrote {path}", soft_wrap=True)
