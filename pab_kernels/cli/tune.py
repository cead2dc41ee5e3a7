"""`pab tune`: settings of a wanted quality or speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pab_kernels.cli import measured, options
from pab_kernels.files import check_input, check_outputs


def tune(
    context: typer.Context,
    target: Annotated[str, typer.Option(help="psnr=DB or ssim=VALUE (means over videos), or speedup=FACTOR.")],
    output: Annotated[Path, typer.Option(help="The YAML file; a .csv and a .png of all trials go beside it.")] = Path(
        "outputs/tuned.yaml"
    ),
    profile: Annotated[
        Path | None, typer.Option(help="profile.csv of a run with the same steps; by default one is made.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="At most so many settings beside the named ones.")] = 16,
    model: options.Model = "demo",
    prompt: measured.Prompt = None,
    videos: measured.Videos = 8,
    seed: measured.Seed = 0,
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
    """Find settings of a wanted quality or speed, and write them as YAML for --pab.

    From the preset fast on, windows, ranges, orders and blocks of all kinds are changed step by step, where the profile
    and the trials so far promise most: on half of the videos, and on all where that is better than all before. Ctrl-C
    keeps the best so far; the same command then goes on.

    Examples:

    pab tune --target psnr=30

    pab tune --target ssim=0.9 --profile outputs/profile.csv --videos 8 --output outputs/ssim.yaml

    pab tune --target speedup=1.2 --model maxin-cn/Latte-1
    """
    from pab_kernels.tune import choose as tuning
    from pab_kernels.tune import profile as profiles
    from pab_kernels.tune import trials as trying
    from pab_kernels.tune.frontier import Frontier
    from pab_kernels.tune.journal import Journal
    from pab_kernels.tune.results import Tuned
    from pab_kernels.tune.search import Search

    with options.clean_errors():
        wanted = tuning.Target.parse(target)
        check_outputs({"output": Tuned.files(output)}, inputs=(profile, *measured.inputs(context.params)))
        if profile is not None:
            check_input("profile", profile)
            profiles.read_rows(profile)  # that it is one shall be known before the work
        pipe, request = measured.load(context.params)
        if wanted.measure != "speedup" and len(request.prompts) < 2:
            raise ValueError("videos: got 1, must be at least 2: one tells nothing of how others differ")
        result = Tuned(output, wanted, measured.origin(pipe, request, context.params))
        journal = Journal(Tuned.journal(output), measured.origin(pipe, request, context.params))
        named = {name: each for name, each in reversed(measured.named(pipe).items()) if name.endswith(":fast")}
        named |= dict(list(measured.named(pipe).items())[:1])
        with measured.progress() as bar:
            meter = measured.Meter(bar, request, 1 + len(request.prompts) * (1 + len(named) + trials))
            try:
                if profile is None:
                    meter.say("profile")
                    found = profiles.measure(pipe, trying.split(request)[0], lambda _: meter.advance())
                meter.say("without PAB")
                yardstick = trying.Yardstick(pipe, request, meter.advance)
                if profile is not None:
                    found = profiles.Profile.from_csv(profile, yardstick.timesteps)
                search = Search(Frontier(found, yardstick.predicted_saving), wanted)
                try_out = journal.around(meter.watch(yardstick, named, trials))
                for trial in search.run(try_out, named, trials, few=max(2, len(request.prompts) // 2)):
                    result.add(trial)
            except KeyboardInterrupt:
                options.print_error(f"interrupted after {len(result.trials)} trials")
                result.finish(options.console())
                raise typer.Exit(options.INTERRUPTED) from None
        journal.close()
        if not result.finish(options.console()):
            raise typer.Exit(1)
