"""The commands that measure a model and its videos: `pab profile`, `pab tune`, `pab quality`, `pab compare`."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from pab_kernels.cli import options
from pab_kernels.config import PABConfig, named_settings

if TYPE_CHECKING:
    from pab_kernels.pipelines.generate import Request
    from pab_kernels.pipelines.loading import Pipeline
    from pab_kernels.tune.trials import Trial, Yardstick

INTERRUPTED = 130
LEAST_STEPS = 10
"""So that the first and the last 15 % are steps at all."""
SEED_STRIDE = 1000
"""Between the noise of one --seed and of the next: more than the videos of a run."""
PROMPTS = (
    "a dog runs along a beach at sunset",
    "a waterfall in a green forest, seen from above",
    "a city street at night in the rain, with neon signs",
    "a woman in a red coat walks through falling snow",
    "a sailing boat on a calm lake, mountains behind it",
    "a close-up of a bee on a yellow flower",
    "a train crosses a stone bridge in autumn",
    "a chef cuts vegetables in a bright kitchen",
)
"""For models that know all words; the demo's own are drawn by the seed."""

Prompt = Annotated[list[str] | None, typer.Option(help="What to show; repeat it. By default from the model's list.")]
Videos = Annotated[int, typer.Option(min=1, help="How many videos, where no prompts are given.")]
Seed = Annotated[int, typer.Option(min=0, help="Chooses the demo's prompts, and the noise of every video.")]
Steps = Annotated[int | None, typer.Option(min=LEAST_STEPS, help="Denoising steps; by default the model's own.")]
Vae = Annotated[str | None, typer.Option(help="A video decoder for diffusers.")]
RandomWeights = Annotated[bool, typer.Option(help="No checkpoint and no text encoder.")]


def profile(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder of profile.csv, profile.png and heatmap.png.")] = Path("outputs"),
    model: options.Model = "demo",
    prompt: Prompt = None,
    videos: Videos = 1,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: options.Guidance = None,
    weights: options.Weights = None,
    text_encoder: options.TextEncoder = None,
    vae: Vae = None,
    random_weights: RandomWeights = False,
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

    console = Console()
    with options.clean_errors():
        pipe, request = _load(context.params, compared=False)
        with _progress() as bar:
            task = bar.add_task("profile", total=request.steps)
            found = profiles.measure(
                pipe, request, lambda step: bar.update(task, completed=step.done, total=step.total)
            )
        count = len(request.prompts)
        title = f"{model}, {len(found.timesteps)} calls, {count} video{'' if count == 1 else 's'}"
        found.to_csv(output / "profile.csv")
        figures.save_figure(tune_figures.profile_curves(found, title), output / "profile.png")
        figures.save_figure(tune_figures.profile_heat_map(found, title), output / "heatmap.png")
    for line in profiles.findings(found):
        console.print(line, highlight=False)
    for name in ("profile.csv", "profile.png", "heatmap.png"):
        console.print(f"wrote {output / name}", highlight=False, soft_wrap=True)


def tune(
    context: typer.Context,
    target: Annotated[str, typer.Option(help="psnr=DB or ssim=VALUE (means over videos), or speedup=FACTOR.")],
    output: Annotated[Path, typer.Option(help="The YAML file; a .csv and a .png of all trials go beside it.")] = Path(
        "outputs/tuned.yaml"
    ),
    profile: Annotated[
        Path | None, typer.Option(help="profile.csv of a run with the same steps; by default one is made.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="At most so many settings beside the named ones.")] = 2,
    model: options.Model = "demo",
    prompt: Prompt = None,
    videos: Videos = 4,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: options.Guidance = None,
    weights: options.Weights = None,
    text_encoder: options.TextEncoder = None,
    vae: Vae = None,
    resolution: options.Resolution = None,
    duration: options.Duration = None,
    aspect: options.Aspect = None,
    size: options.Size = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Find settings of a wanted quality or speed, and write them as YAML for --pab. Ctrl-C keeps the best so far.

    Examples:

    pab tune --target psnr=30

    pab tune --target ssim=0.9 --profile outputs/profile.csv --videos 8 --output outputs/ssim.yaml

    pab tune --target speedup=1.2 --model maxin-cn/Latte-1
    """
    from pab_kernels.tune import choose as tuning
    from pab_kernels.tune import profile as profiles
    from pab_kernels.tune import trials as trying
    from pab_kernels.tune.frontier import frontier
    from pab_kernels.tune.results import Tuned

    with options.clean_errors():
        wanted = tuning.Target.parse(target)
        pipe, request = _load(context.params)
        if wanted.measure != "speedup" and len(request.prompts) < 2:
            raise ValueError("videos: got 1, must be at least 2: one tells nothing of how others differ")
        result = Tuned(output, wanted, _origin(pipe, request, context.params))
        named = _named(pipe)
        with _progress() as bar:
            meter = _Meter(bar, request, 1 + len(request.prompts) * (1 + len(named) + trials))
            try:
                if profile is None:
                    meter.say("profile")
                    found = profiles.measure(pipe, trying.split(request)[0], lambda _: meter.advance())
                meter.say("without PAB")
                yardstick = trying.Yardstick(pipe, request, meter.advance)
                if profile is not None:
                    found = profiles.Profile.from_csv(profile, yardstick.timesteps)
                search = tuning.Search(found, frontier(found, yardstick.unit_savings), wanted)
                for trial in search.run(meter.watch(yardstick, named, trials), named, trials):
                    result.add(trial)
            except KeyboardInterrupt:
                options.print_error(f"interrupted after {len(result.trials)} trials")
                result.finish(Console())
                raise typer.Exit(INTERRUPTED) from None
        if not result.finish(Console()):
            raise typer.Exit(1)


def quality(
    context: typer.Context,
    pab: Annotated[
        list[str] | None,
        typer.Option(help="A preset (latte, latte:347) or a YAML file; repeat it. By default all named settings."),
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also write the table here.")] = None,
    model: options.Model = "demo",
    prompt: Prompt = None,
    videos: Videos = 8,
    seed: Seed = 1,
    steps: Steps = None,
    guidance: options.Guidance = None,
    weights: options.Weights = None,
    text_encoder: options.TextEncoder = None,
    vae: Vae = None,
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
        pipe, request = _load(context.params)
        chosen = {name: config for name, config in settings.items() if config is not None} or _named(pipe)
        with _progress() as bar:
            meter = _Meter(bar, request, len(request.prompts) * (1 + len(chosen)))
            meter.say("without PAB")
            try:
                try_out = meter.watch(trials.Yardstick(pipe, request, meter.advance), chosen, 0)
                for name, config in chosen.items():
                    done.append(try_out(name, config))
                    if csv_file is not None:
                        results.write_csv(done, csv_file)
            except KeyboardInterrupt:
                options.print_error(f"interrupted after {len(done)} settings")
                raise typer.Exit(INTERRUPTED) from None
            finally:
                if done:
                    bar.stop()
                    Console().print(_origin(pipe, request, context.params), highlight=False, soft_wrap=True)
                    Console().print(results.table(done))


def compare(
    video: Annotated[Path, typer.Argument(help="A video or animated image.")],
    baseline: Annotated[Path, typer.Argument(help="The one that it should look like, of the same size and length.")],
    frames: Annotated[bool, typer.Option(help="Also print every frame's values.")] = False,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also write every frame's values here.")] = None,
) -> None:
    """Compare two videos frame by frame: PSNR, SSIM, and LPIPS where its package and weights are here.

    Example:

    pab compare outputs/with.mp4 outputs/without.mp4 --csv outputs/frames.csv
    """
    from pab_kernels import quality as measures
    from pab_kernels.files import replaced
    from pab_kernels.tune.results import HEADINGS

    console = Console()
    with options.clean_errors():
        found = measures.per_frame(measures.load_video(video), measures.load_video(baseline))
        rows = list(zip(*found.values(), strict=True))
        if csv_file is not None:
            with replaced(csv_file) as partial, partial.open("w", newline="") as file:
                csv.writer(file).writerows([("frame", *found), *((i, *row) for i, row in enumerate(rows))])
    table = Table("frame", *(HEADINGS[name] for name in found), box=box.MARKDOWN)
    if frames:
        for i, row in enumerate(rows):
            table.add_row(str(i), *(f"{value:.4g}" for value in row))
    means = [f"{sum(values) / len(values):.4g}" for values in found.values()]
    worst = [f"{(max if name == 'lpips' else min)(values):.4g}" for name, values in found.items()]
    table.add_row(f"mean of {len(rows)}", *means)
    table.add_row("worst", *worst)
    console.print(table)
    if reason := measures.why_no_lpips():
        console.print(reason, highlight=False, soft_wrap=True)


class _Meter:
    """A progress bar over the transformer's calls. How many there will be is an estimate, which trials correct."""

    def __init__(self, bar: Progress, request: Request, runs: int) -> None:
        self._bar, self._left = bar, runs * request.steps
        self._task = bar.add_task("", total=self._left)

    def say(self, what: str) -> None:
        """What is going on now."""
        self._bar.update(self._task, description=what)

    def advance(self) -> None:
        """A call is done."""
        self._bar.advance(self._task)

    def watch(
        self, yardstick: Yardstick, named: Mapping[str, PABConfig], others: int
    ) -> Callable[[str, PABConfig], Trial]:
        """The yardstick's trials, shown; they are shorter than a run, by what they share with the one without PAB."""
        most = max(yardstick.calls(config) for config in named.values())
        ahead = sum(yardstick.calls(config) for config in named.values()) + others * most
        task = self._bar.tasks[self._task]
        self._bar.update(self._task, total=task.completed + ahead)

        def try_out(name: str, config: PABConfig) -> Trial:
            self.say(name)
            if name not in named:
                self._bar.update(self._task, total=(task.total or 0) + yardstick.calls(config) - most)
            return yardstick.try_out(name, config)

        return try_out


def _progress() -> Progress:
    """On stderr: what, bar, share, time left (in the end: taken)."""
    return Progress(
        TextColumn("{task.description:24}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
    )


def _load(given: Mapping[str, Any], compared: bool = True) -> tuple[Pipeline, Request]:
    """The pipeline and the videos that a command's parameters ask for; if they are to be `compared`, one by one."""
    from pab_kernels.demo.captions import evaluation_prompts
    from pab_kernels.pipelines import generate as generation
    from pab_kernels.pipelines.loading import Source, load_pipeline, resolve_model
    from pab_kernels.pipelines.sizes import family_size
    from pab_kernels.tune.trials import split

    size = {key: given[key] for key in ("resolution", "duration", "aspect", "size")}
    source = Source(
        resolve_model(given["model"], given["size"]),
        given["weights"],
        given["text_encoder"],
        given["vae"],
        given.get("random_weights", False),
    )
    if compared and not source.decodes:
        raise ValueError(f"model: got {given['model']!r}, which gives latents: needs --vae, as videos are compared")
    defaults = generation.DEFAULTS[source.family]
    count, seed = given["videos"], given["seed"]
    if given["prompt"]:
        prompts = given["prompt"]
    elif source.family == "demo":
        prompts = [item.prompt for item in evaluation_prompts(count, seed)]
    elif count <= len(PROMPTS):
        prompts = PROMPTS[:count]
    else:
        raise ValueError(f"videos: got {count}, must be at most {len(PROMPTS)} unless there is a --prompt for each")
    request = generation.Request(
        prompts,
        steps=given["steps"] or defaults.steps,
        guidance=defaults.guidance if given["guidance"] is None else given["guidance"],
        seeds=[SEED_STRIDE * seed + i for i in range(len(prompts))],
        size=family_size(source.family, **size),
    )
    device = options.device_named(given["device"])
    dtype = options.dtype_named(given["dtype"] or options.default_dtype(device))
    batch = split(request)[0] if compared else request
    generation.check_memory(source, batch, PABConfig.preset(defaults.preset), device, dtype)
    return load_pipeline(source, request.size, dtype=dtype, device=device), request


def _origin(pipe: Pipeline, request: Request, given: Mapping[str, Any]) -> str:
    """What was run, in a line."""
    dtype = str(pipe.dtype).removeprefix("torch.")
    return (
        f"{given['model']}, {request.steps} steps, guidance {request.guidance:g}, "
        f"{len(request.prompts)} videos of seed {given['seed']}, {dtype} on {pipe.device}"
    )


def _named(pipe: Pipeline) -> dict[str, PABConfig]:
    """The preset and the paper's variants of the model's family; the demo is a Latte."""
    family = getattr(pipe, "family", "latte")
    return named_settings(family)
