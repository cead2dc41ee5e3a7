"""What PAB settings do to a model's videos and to the time they take, measured against the same videos without PAB."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pab_kernels import clock, quality
from pab_kernels.config import BRANCHES, SWITCHES, PABConfig
from pab_kernels.measure.floor import Ceilings, step_work
from pab_kernels.models import adapter_for
from pab_kernels.pipelines.generate import Generated, Request, generate
from pab_kernels.pipelines.loading import Pipeline
from pab_kernels.quality import Frames, Quality
from pab_kernels.runtime.accelerate import accelerate
from pab_kernels.schedule import Schedule, StepVariant

CEILINGS = {"cpu": Ceilings(1.0, float("inf")), "cuda": Ceilings(690e12, 2.94e12)}
"""For predicted time, of which only ratios count: arithmetic alone on a CPU, an H100's otherwise."""
COMPUTED = StepVariant()


@dataclass(frozen=True)
class Trial:
    """Some settings on all videos: the quality of each, and the share of the denoising time that is saved.

    `predicted` counts the operations that the schedule leaves out. `measured` takes the median time of each kind of
    step, and compares with a run all of whose steps compute everything. `anchor` is a trial on all videos, where this
    one is on the first few of them: by the differences on those its mean over all is known without making them.
    """

    name: str
    config: PABConfig
    videos: tuple[Quality, ...]
    predicted: float
    measured: float
    anchor: Trial | None = None

    def values(self, measure: str) -> tuple[float, ...]:
        """ "psnr", "ssim", "worst_frame" or "lpips" of each video."""
        return tuple(getattr(video, measure) for video in self.videos)


@dataclass(frozen=True)
class _Recording:
    """A run without PAB: its video, and what the transformer gave at each call."""

    request: Request
    frames: Frames
    outputs: tuple[Any, ...]


class Yardstick:
    """Makes a model's videos without PAB, then tries settings out against them.

    A trial computes only what can differ: up to its first broadcast it is the run without PAB, whose predictions it
    gets. They are kept on the device.

    Parameters
    ----------
    pipe : Pipeline
    request : Request
        Its videos are made one at a time.
    on_call : callable, optional
        Called after every call of the transformer that really runs.

    Attributes
    ----------
    timesteps : tuple of float
        Of every call of the transformer in a run.
    unit_savings : dict of str to float
        For each kind of attention that the model has: the predicted share of a step that its broadcast saves.

    Raises
    ------
    ValueError
        The pipeline gives no frames.
    """

    def __init__(self, pipe: Pipeline, request: Request, on_call: Callable[[], object] = lambda: None) -> None:
        self._pipe, self._host, self._on_call = pipe, pipe.transformer, on_call
        self._recordings: list[_Recording] = []
        first: tuple[Any, Any] = (), {}
        outputs: list[Any] = []
        with accelerate(pipe, PABConfig()) as handle:
            run = self._host.forward

            def record(*args: Any, **kwargs: Any) -> Any:
                nonlocal first
                first = args, kwargs
                outputs.append(run(*args, **kwargs))
                on_call()
                return outputs[-1]

            with _forward(self._host, record):
                for single in split(request):
                    outputs.clear()
                    frames = _video(generate(pipe, single, None))
                    self._recordings.append(_Recording(single, frames, tuple(outputs)))
            assert handle.schedule is not None
            self.timesteps = handle.schedule.timesteps
        self._costs = _Costs(self._host, *first)
        self.unit_savings = {kind: self._costs.unit_saving(kind) for kind in self._costs.kinds}

    def predicted_saving(self, schedule: Schedule) -> float:
        """Share of the denoising time that `schedule` should save."""
        return self._costs.saving(schedule)

    def calls(self, config: PABConfig, videos: int | None = None) -> int:
        """How many calls of the transformer a trial of `config` on the first `videos` runs; None: on all."""
        count = len(self._recordings) if videos is None else min(videos, len(self._recordings))
        return count * (len(self.timesteps) - first_call(Schedule(config, self.timesteps)))

    def try_out(self, name: str, config: PABConfig, videos: int | None = None) -> Trial:
        """Run `config` on the first `videos`, None: on all."""
        schedule = Schedule(config, self.timesteps)
        clocks: dict[StepVariant, list[tuple[Any, Any]]] = {}
        found = []
        first = getattr(self._pipe, "cond_first", False)
        with accelerate(self._host, config, conditional="first" if first else "second") as handle:
            run, start = self._host.forward, first_call(schedule)
            for recording in self._recordings[:videos]:
                calls = iter(range(len(schedule)))

                def replay(*args: Any, calls: Any = calls, recording: _Recording = recording, **kwargs: Any) -> Any:
                    call = next(calls)
                    if call < start:
                        return recording.outputs[call]
                    if call == start:
                        handle.begin(self.timesteps, first_call=start, guided=recording.request.guidance > 1)
                    before = clock.mark(self._host.device)
                    output = run(*args, **kwargs)
                    clocks.setdefault(schedule[call], []).append((before, clock.mark(self._host.device)))
                    self._on_call()
                    return output

                with _forward(self._host, replay):
                    frames = _video(generate(self._pipe, recording.request, None))
                found.append(quality.compare(frames, recording.frames))
        return Trial(name, config, tuple(found), self._costs.saving(schedule), _measured_saving(schedule, clocks))


def split(request: Request, count: int = 1) -> list[Request]:
    """A request for each `count` of its videos; the last may have fewer."""
    prompts, seeds = request.prompts, request.all_seeds
    starts = range(0, len(prompts), count)
    return [
        dataclasses.replace(request, prompts=tuple(prompts[i : i + count]), seeds=tuple(seeds[i : i + count]))
        for i in starts
    ]


def first_call(schedule: Schedule) -> int:
    """The last call from which on every slot that is read is written before; the end where there is no broadcast.

    That is the call before the first broadcast, and where there are forecasts the one before it, for the change; or an
    earlier one that keeps an MLP by its timestep.
    """
    broadcasting = (call for call, step in enumerate(schedule) if step.broadcasting)
    first = next(broadcasting, None)
    if first is None:
        return len(schedule)
    start = max(first - 1 - max(map(schedule.config.order, SWITCHES)), 0)
    if not schedule.config.mlp_broadcast or schedule.config.mlp_range is not None:
        return start
    keeping = (call for call, step in enumerate(schedule) if step.mlp_spatial.keep or step.mlp_temporal.keep)
    return min(start, next(keeping, first))


def _measured_saving(schedule: Schedule, clocks: dict[StepVariant, list[tuple[Any, Any]]]) -> float:
    """From the median time of each variant: the first step of one also allocates, or captures a graph."""
    medians = {
        variant: statistics.median(clock.seconds(*marks) for marks in pairs) for variant, pairs in clocks.items()
    }
    if not medians:
        return 0.0
    full = statistics.fmean(seconds for variant, seconds in medians.items() if not variant.broadcasting)
    # Calls that were not run compute everything.
    return 1 - statistics.fmean(medians.get(step, full) for step in schedule) / full


def _video(generated: Generated) -> Frames:
    if generated.frames is None:
        raise ValueError("model: gives latents, must give a video to measure quality: see --vae")
    (frames,) = generated.frames
    return frames


@contextmanager
def _forward(host: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """`forward` in place of that of a runtime's handle."""
    before = host.forward
    host.forward = forward
    try:
        yield
    finally:
        host.forward = before


class _Costs:
    """Predicted time of a step, from shapes alone.

    Parameters
    ----------
    host
        Only its configuration is read.
    args, kwargs
        Of a call.
    """

    def __init__(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.device("meta"):
            twin = type(host).from_config(host.config)
        adapter = adapter_for(nn.Module.to(twin, host.dtype))  # not ModelMixin.to, which warns
        call = adapter.bind(*args, **kwargs)
        self._stack, self._shape, self._text = adapter.stack, call.layout.shape, call.text.shape[1]
        self._ceilings = CEILINGS[host.device.type]
        self._known: dict[tuple[Any, ...], float] = {}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of attention that the model has."""
        return self._stack.kinds

    def unit_saving(self, kind: str) -> float:
        """Share of a step's time that is saved where all blocks broadcast `kind`."""
        settings: dict[str, Any] = {f"{kind}_broadcast": True, f"{kind}_threshold": (0, 2), f"{kind}_range": 2}
        _, broadcasting = schedule = Schedule(PABConfig(**settings), (1.0, 1.0))
        return 1 - self._seconds(schedule, broadcasting) / self._seconds(schedule, COMPUTED)

    def saving(self, schedule: Schedule) -> float:
        """Share of a run's time that `schedule` saves."""
        known = {variant: self._seconds(schedule, variant) for variant in {*schedule, COMPUTED}}
        return 1 - statistics.fmean(known[step] for step in schedule) / known[COMPUTED]

    def _seconds(self, schedule: Schedule, variant: StepVariant) -> float:
        # Of the settings only blocks and orders count, and thousands of them are weighed.
        config = schedule.config
        key = (variant, config.blocks("stack"), *((config.blocks(kind), config.order(kind)) for kind in BRANCHES))
        if key not in self._known:
            work = step_work(self._stack, schedule, variant, self._shape, self._text)
            self._known[key] = work.seconds(self._ceilings)
        return self._known[key]
