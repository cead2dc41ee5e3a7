"""`pab schedule`: which steps compute and which broadcast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pab_kernels.cli import options
from pab_kernels.config import PRESETS, PABConfig
from pab_kernels.files import check_outputs


def schedule(
    preset: Annotated[
        str | None, typer.Option(help="A family, with a variant if wanted: latte, open_sora:579.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of PAB settings.")] = None,
    family: Annotated[
        str | None, typer.Option(help="Whose sampler gives the timesteps, with --config: by default latte's.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
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
        console = options.console()
        if (preset is None) == (config is None):
            raise ValueError(f"give one of --preset ({', '.join(PRESETS)}) and --config")
        if config is not None:
            settings, name, family = PABConfig.from_yaml(config), config.name, family or "latte"
        elif family is not None:
            raise ValueError(f"family: got {family!r} beside --preset, which names one, must go with --config")
        else:
            family, _, variant = str(preset).partition(":")
            settings, name = PABConfig.preset(family, variant or None), str(preset)
        check_outputs({"plot": [plot]}, inputs=[config])
        if plot is not None:
            figures.check_picture("plot", plot)
        plan = Schedule(settings, family_timesteps(family, steps))
        console.print(figures.schedule_table(plan))
        console.print(f"{len(plan)} calls for {steps} steps of {family}; {figures.shares(plan)}")
        if plot is not None:
            figures.save_figure(figures.schedule_figure(plan, f"{name}, {steps} steps"), plot)
            console.print(f"wrote {plot}", soft_wrap=True)
