"""What `pab profile`, `pab tune` and `pab quality` share: the videos that they measure, their options and progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from pab_kernels.cli import options
from pab_kernels.config import PABConfig, named_settings

if TYPE_CHECKING:
    from pab_kernels.pipelines.generate import Request
    from pab_kernels.pipelines.loading import Pipeline
    from pab_kernels.tune.profile import Profile
    from pab_kernels.tune.trials import Trial, Yardstick

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
Vae = options.Vae
RandomWeights = Annotated[bool, typer.Option(help="No checkpoint and no text encoder.")]


class Meter:
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
    ) -> Callable[[str, PABConfig, int | None], Trial]:
        """The yardstick's trials, shown; they are shorter than a run, by what they share with the one without PAB."""
        most = max(yardstick.calls(config) for config in named.values())
        ahead = sum(yardstick.calls(config) for config in named.values()) + others * most
        task = self._bar.tasks[self._task]
        self._bar.update(self._task, total=task.completed + ahead)

        def try_out(name: str, config: PABConfig, videos: int | None = None) -> Trial:
            self.say(name)
            if name not in named:
                self._bar.update(self._task, total=(task.total or 0) + yardstick.calls(config, videos) - most)
            return yardstick.try_out(name, config, videos)

        return try_out


def progress() -> Progress:
    """On stderr: what, bar, share, time left (in the end: taken)."""
    return Progress(
        TextColumn("{task.description:24}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=options.console(stderr=True),
    )


def inputs(given: Mapping[str, Any]) -> list[str | None]:
    """Files and folders, maybe, that a command's parameters name to be read."""
    return [given.get(name) for name in ("model", "weights", "text_encoder", "vae")]


def load(given: Mapping[str, Any], compared: bool = True) -> tuple[Pipeline, Request]:
    """The pipeline and the videos that a command's parameters ask for; if they are to be `compared`, one by one."""
    from pab_kernels.pipelines import generate as generation
    from pab_kernels.pipelines.demo_captions import evaluation_prompts
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
    if not compared and given["vae"] is None and (source.random_weights or source.family not in ("demo", "latte")):
        source = dataclasses.replace(source, latents_only=True)  # nothing would look at the videos
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


def diffusers_profiles(given: Mapping[str, Any]) -> tuple[list[Profile], int] | None:
    """Profiles of a Wan or LTX-Video pipeline that `--model` names, one a transformer, and how many videos they are of.

    None where it names none. Sizes are those of the family, `--resolution` of Wan 2.1 or LTX-Video.
    """
    from pab_kernels.pipelines.sizes import family_size
    from pab_kernels.tune import diffusers_profile

    name = diffusers_profile.pipeline_class(given["model"])
    if name is None:
        return None
    for option in ("weights", "text_encoder", "vae", "random_weights", "size", "duration", "aspect"):
        if given[option]:
            raise ValueError(
                f"{option}: got {given[option]!r} for a pipeline of diffusers, which has its own: leave it out"
            )
    family = diffusers_profile.FAMILIES[name]
    size = family_size(family, resolution=given["resolution"])
    assert size is not None
    prompts = given["prompt"] or PROMPTS[: given["videos"]]
    device = options.device_named(given["device"])
    dtype = options.dtype_named(given["dtype"] or options.default_dtype(device))
    pipe = diffusers_profile.load(given["model"], dtype=dtype, device=device)
    guidance = (3.0 if family == "ltx" else 5.0) if given["guidance"] is None else given["guidance"]
    steps = given["steps"] or 50
    with progress() as bar:
        task = bar.add_task("profile", total=steps)
        found = diffusers_profile.measure(
            pipe,
            prompts,
            size,
            steps=steps,
            guidance=guidance,
            seed=SEED_STRIDE * given["seed"],
            on_step=lambda done: bar.update(task, completed=done),
        )
    return found, len(prompts)


def origin(pipe: Pipeline, request: Request, given: Mapping[str, Any]) -> str:
    """What was run, in a line."""
    dtype = str(pipe.dtype).removeprefix("torch.")
    return (
        f"{given['model']}, {request.steps} steps, guidance {request.guidance:g}, "
        f"{len(request.prompts)} videos of seed {given['seed']}, {dtype} on {pipe.device}"
    )


def named(pipe: Pipeline) -> dict[str, PABConfig]:
    """The preset and the paper's variants of the model's family; the demo is a Latte."""
    family = getattr(pipe, "family", "latte")
    return named_settings(family)
