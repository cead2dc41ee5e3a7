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

    pab profile --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a dog on a beach"

    pab profile --model open_sora --resolution 144p --random-weights
    """
    from pab_kernels import figures
    from pab_kernels.tune import figures as tune_figures
    from pab_kernels.tune import profile as profiles

    console = options.console()
    names = ("profile.csv", "profile.png", "heatmap.png")
    files = [output / name for name in names]
    with options.clean_errors():
        check_outputs({"output": files}, inputs=measured.inputs(context.params))
        from_diffusers = measured.diffusers_profiles(context.params)
        if from_diffusers is None:
            pipe, request = measured.load(context.params, compared=False)
            with measured.progress() as bar:
                task = bar.add_task("profile", total=request.steps)
                found = [
                    profiles.measure(
                        pipe, request, lambda step: bar.update(task, completed=step.done, total=step.total)
                    )
                ]
            count = len(request.prompts)
        else:
            found, count = from_diffusers
        for number, each in enumerate(found, 1):
            if number > 1:  # a second transformer
                files += [output / f"{name.partition('.')[0]}-{number}.{name.partition('.')[2]}" for name in names]
            title = f"{model}, {len(each.timesteps)} calls, {count} video{'' if count == 1 else 's'}"
            each.to_csv(files[-3])
            figures.save_figure(tune_figures.profile_curves(each, title), files[-2])
            figures.save_figure(tune_figures.profile_heat_map(each, title), files[-1])
    for each in found:
        for line in profiles.findings(each):
            console.print(line)
    for path in files:
        console.print(f"wrote {path}", soft_wrap=True)
