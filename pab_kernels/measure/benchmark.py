"""Times one denoising run in several forms, in one process, on the same weights and inputs."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pab_kernels import clock
from pab_kernels.blocks.sharded import near_even
from pab_kernels.config import PABConfig
from pab_kernels.distributed.mesh import Mesh
from pab_kernels.measure.contenders import CONTENDERS, Problem, Session
from pab_kernels.measure.floor import CHIP_FILLING_TOKENS, Ceilings, Work, measure_copy, measure_gemms, run_work
from pab_kernels.models import adapter_for
from pab_kernels.runtime.handle import handle_of
from pab_kernels.runtime.rectified_flow import euler_step, step_sizes
from pab_kernels.runtime.report import Report
from pab_kernels.schedule import Schedule, StepVariant


@dataclass
class Timing:
    """One contender's result; on a mesh that of rank 0, and `runs` are those of the rank that took longest.

    `warm_up` are the seconds of everything before the timed runs: compiling, capturing. `steps` are the seconds of each
    step of the last run, on the device: from the end of the step before to its own, sampler included.
    """

    name: str
    runs: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    warm_up: float = 0.0
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    latents: Tensor | None = None
    report: Report | None = None
    error: str | None = None
    mesh: Mesh = field(default_factory=Mesh)
    share: int | None = None
    """Of so many latent frames alone: as many as the rank of a mesh that has most. None: of all."""
    runs_differ: float = 0.0
    """The largest difference of a final latent between two timed runs."""
    rank_steps: list[list[float]] = field(default_factory=list)
    """`steps` of every rank."""
    exchange_seconds: dict[str, float] = field(default_factory=dict)
    """On a mesh that splits frames, of each variant: what a step's exchanges take where nothing else runs."""

    @property
    def key(self) -> str:
        """The contender, and the mesh if it has more than one rank, or its share."""
        if self.share is not None:
            return f"{self.name} of {self.share} frames"
        return self.name if self.mesh.size == 1 else f"{self.name} {self.mesh}"

    @property
    def jitter(self) -> float | None:
        """Mean over the steps of how much longer the slowest rank took than the fastest, in seconds."""
        if not self.rank_steps:
            return None
        return statistics.mean(max(step) - min(step) for step in zip(*self.rank_steps, strict=True))

    @property
    def seconds(self) -> float | None:
        """The median of the timed runs."""
        return statistics.median(self.runs) if self.runs else None


def predict(model: nn.Module, problem: Problem, latents: Tensor, call: int) -> Tensor:
    """What the model predicts at a step, for both halves of guidance, float32 [2, ...] as the latents."""
    inputs = problem.inputs
    step = {"timestep": inputs.timesteps[call]}
    if not inputs.forwards:
        outputs = [model(torch.cat([latents, latents]).to(problem.dtype), **step, **inputs.given)]
    else:
        outputs = []
        for name, given in inputs.forwards:
            with model.cache_context(name):  # type: ignore[operator]
                outputs.append(model(latents.to(problem.dtype), **step, **given))
    halves = [out if isinstance(out, Tensor) else out[0] for out in outputs]
    return torch.cat([half[:, : latents.shape[1]] for half in halves]).float()


def advance(problem: Problem, latents: Tensor, prediction: Tensor, call: int) -> Tensor:
    """Guidance and one Euler step."""
    return euler_step(latents, prediction, problem.workload.guidance, step_sizes(problem.timesteps)[call])


@torch.no_grad()
def denoise(
    model: nn.Module, problem: Problem, calls: int | None = None, after_step: Callable[[], object] = lambda: None
) -> Tensor:
    """The denoising loop, or its first `calls` calls: the latents in the end. This runtime takes whole steps."""
    latents, handle, take_step = problem.inputs.latents, handle_of(model), None
    if handle is not None and problem.workload.whole_steps:
        take_step = handle.rectified_flow(latents, problem.workload.guidance, **problem.inputs.given)
    for call in range(len(problem.timesteps))[:calls]:
        if take_step is not None:
            latents = take_step(latents)
        else:
            latents = advance(problem, latents, predict(model, problem, latents, call), call)
        after_step()
    return latents


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(name: str, problem: Problem, repeats: int, budget: float) -> Timing:
    """Warm a contender up and time its runs.

    Parameters
    ----------
    name : str
        One of `CONTENDERS`.
    problem : Problem
    repeats : int
        Timed runs.
    budget : float
        Seconds that the timed runs may take together; one is made in any case.

    Returns
    -------
    Timing
        With `error` set if the contender failed: one that fails must not cost the others their turn. On a mesh, where
        the other ranks would wait for it, it raises.
    """
    contender, device, result = CONTENDERS[name], problem.device, Timing(name, mesh=problem.mesh)
    config = problem.settings(contender.pab)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with contender.open(problem, config) as session:
            start = time.perf_counter()
            _warm_up(session, problem, config)
            wait(device)
            result.warm_up = time.perf_counter() - start
            while len(result.runs) < repeats and sum(result.runs) + max(result.runs, default=-budget) <= budget:
                over_ranks(problem, 0.0)  # all begin together
                seconds, latents, result.steps = _timed_run(session, problem)
                result.runs.append(max(over_ranks(problem, seconds)))
                first = latents if result.latents is None else result.latents
                result.runs_differ = max(result.runs_differ, float((latents - first).abs().max()))
                result.latents = first
            if not latents.isfinite().all():
                raise ArithmeticError("its latents are not finite, so its times mean nothing")
            if len(set(over_ranks(problem, latents.double().sum().item()))) > 1:
                raise ArithmeticError("its latents differ between ranks")
            result.latents = latents.cpu()
            result.report = None if session.report is None else session.report()
            if problem.mesh.size > 1:
                result.rank_steps = over_ranks(problem, result.steps)
    except Exception as error:
        if problem.mesh.size > 1:
            raise
        result.error, result.runs, result.steps = f"{type(error).__name__}: {error}", [], []
    if device.type == "cuda":
        result.peak_bytes = torch.cuda.max_memory_allocated(device)
        result.reserved_bytes = torch.cuda.max_memory_reserved(device)
    return result


def share_of(problem: Problem, ranks: int) -> Problem:
    """The run of as many latent frames as the rank with most has, where so many ranks split them; alone on one GPU."""
    workload = problem.workload
    frames = near_even(workload.latent[0], ranks)[0]
    part = dataclasses.replace(workload, latent=(frames, *workload.latent[1:]))
    inputs = part.inputs(problem.device, problem.dtype, len(problem.timesteps))
    return dataclasses.replace(problem, workload=part, inputs=inputs, mesh=Mesh())


def over_ranks(problem: Problem, value: Any) -> list[Any]:
    """`value` of every rank of the problem's mesh, on all of them."""
    every = [value] * problem.mesh.size
    if problem.mesh.size > 1:
        dist.all_gather_object(every, value)
    return every


def _timed_run(session: Session, problem: Problem) -> tuple[float, Tensor, list[float]]:
    """Seconds of one run, its latents, and the seconds of each step."""
    device = problem.device
    wait(device)
    start = time.perf_counter()
    session.begin(problem.timesteps)
    marks: list[Any] = [clock.mark(device)]
    latents = denoise(session.model, problem, after_step=lambda: marks.append(clock.mark(device)))
    wait(device)
    return time.perf_counter() - start, latents, [clock.seconds(*pair) for pair in itertools.pairwise(marks)]


def _warm_up(session: Session, problem: Problem, config: PABConfig) -> None:
    """Two forwards load kernels and fill the allocator. A runtime repeats its first steps until it has all its graphs.

    It captures a variant's when that comes up the second time, for each forward of a step.
    """
    forwards = problem.workload.forwards_per_step
    session.begin(problem.timesteps)
    if session.report is None:
        denoise(session.model, problem, 2 // forwards)
        return
    brief, calls = _soonest(problem, config)
    variants = len(set(Schedule(config, problem.timesteps)))
    graphs = -1
    for _ in range(3):
        session.begin(brief.timesteps)
        denoise(session.model, brief, calls)
        captured = min(over_ranks(problem, session.report().graphs))
        if captured in (graphs, forwards * variants):
            return
        graphs = captured


def _soonest(problem: Problem, config: PABConfig) -> tuple[Problem, int]:
    """A run of fewer steps in which all variants of the problem's come up soonest, and after how many calls."""
    workload, wanted = problem.workload, set(Schedule(config, problem.timesteps))
    found = []
    for steps in range(2, len(problem.timesteps) + 1):
        seen: set[StepVariant] = set()
        for call, variant in enumerate(Schedule(config, workload.timesteps(steps))):
            seen.add(variant)
            if wanted <= seen:
                found.append((call + 1, steps))
                break
    calls, steps = min(found, default=(1, 1))
    inputs = workload.inputs(problem.device, problem.dtype, steps)
    return dataclasses.replace(problem, timesteps=workload.timesteps(steps), inputs=inputs), calls


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``||actual - expected|| / ||expected||``; infinite where anything is not finite."""
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    return error if error < float("inf") else float("inf")


@torch.no_grad()
def check(problem: Problem) -> tuple[float, float]:
    """Relative errors of this runtime without PAB against the eager host at the first call.

    Of the prediction, and of the latents after one step of guidance and sampler. The step is as long as with the
    workload's own number of steps: a longer one would magnify rounding.
    """
    workload = problem.workload
    inputs = workload.inputs(problem.device, problem.dtype)
    problem = dataclasses.replace(problem, timesteps=workload.timesteps(), inputs=inputs)
    results = []
    for name in ("eager", "runtime"):
        with CONTENDERS[name].open(problem, PABConfig()) as session:
            session.begin(problem.timesteps)
            latents = problem.inputs.latents
            prediction = predict(session.model, problem, latents, 0)
            if name == "runtime" and workload.whole_steps:
                session.begin(problem.timesteps)
                latents = denoise(session.model, problem, 1)  # guidance and sampler are its own
            else:
                latents = advance(problem, latents, prediction, 0)
            results.append((prediction, latents))
    (expected, expected_latents), (actual, actual_latents) = results
    return relative_error(actual, expected), relative_error(actual_latents, expected_latents)


@dataclass(frozen=True)
class Floor:
    """The device's ceilings, and what a run must do without PAB and with it.

    `gemm_own` and `gemm_filled` are the GEMM rates in FLOP/s at the run's own number of tokens, and at
    `CHIP_FILLING_TOKENS` (None where that was not measured). The ceiling is the larger.
    """

    gemm_own: float
    gemm_filled: float | None
    ceilings: Ceilings
    without: Work
    with_pab: Work
    shape: tuple[int, int, int, int]

    def seconds(self, pab: bool, *, fp8: bool = False) -> float:
        """The least time of a run with PAB or without, with the blocks' GEMMs in fp8 or not."""
        return (self.with_pab if pab else self.without).seconds(self.ceilings, fp8=fp8)


def measure_floor(problem: Problem, *, fp8: bool = False) -> Floor:
    """Measure the ceilings, with `fp8` that of fp8 GEMMs too, and count what the run must do."""
    adapter = adapter_for(problem.host)
    try:
        stack = adapter.stack
        shape = (2, *problem.workload.grid, stack.channels)
        without, with_pab = (
            run_work(stack, Schedule(config, problem.timesteps), shape, problem.workload.text_used)
            for config in (problem.settings(False), problem.settings(True))
        )
        on_gpu = problem.device.type == "cuda"
        seconds = 0.1 if on_gpu else 0.01
        rows = shape[0] * shape[1] * shape[2]
        own = measure_gemms(stack, rows, seconds)
        filled = measure_gemms(stack, CHIP_FILLING_TOKENS, seconds) if on_gpu else None
        fp8_flops = None
        if fp8:
            fp8_flops = max(measure_gemms(stack, count, seconds, fp8=True) for count in (rows, CHIP_FILLING_TOKENS))
        copy = measure_copy(problem.device, 2**30 if on_gpu else 2**24, seconds)
    finally:
        adapter.restore()
    ceilings = Ceilings(max(own, filled or 0.0), copy, fp8_flops)
    return Floor(own, filled, ceilings, without, with_pab, shape)
