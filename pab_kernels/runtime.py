"""`accelerate`: puts a Pyramid Attention Broadcast runtime behind a transformer's forward, and takes it away again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from pab_kernels.branches import TextKV
from pab_kernels.cache import BroadcastCache
from pab_kernels.config import PABConfig
from pab_kernels.executor import Executor
from pab_kernels.models import adapter_for
from pab_kernels.models.adapter import Call
from pab_kernels.schedule import Schedule, StepVariant


@dataclass
class Report:
    """What a handle's latest run did."""

    steps: int
    computed: dict[str, int]
    broadcast: dict[str, int]
    slots: int
    cache_bytes: int
    graphs: int
    seconds: dict[str, tuple[int, float]]
    """For each variant: how many steps ran, and the seconds they took together."""

    def __str__(self) -> str:
        lines = [f"{self.steps} steps"]
        lines += [
            f"  {kind}: {self.computed[kind]} computed, {self.broadcast[kind]} broadcast" for kind in self.computed
        ]
        lines.append(f"  cache: {self.slots} slots, {self.cache_bytes / 2**20:.1f} MiB; graphs: {self.graphs}")
        for name, (count, seconds) in self.seconds.items():
            lines.append(f"  {name}: {count} x {seconds / count * 1e3:.2f} ms")
        return "\n".join(lines)


@dataclass
class _Run:
    """One denoising run: it begins with timesteps and is never resumed after an error."""

    schedule: Schedule
    index: int = 0
    broken: bool = False
    latents_shape: torch.Size | None = None
    text: Tensor | None = None
    text_version: int = -1
    text_kv: list[TextKV | None] = field(default_factory=list)
    clock: list[tuple[StepVariant, Any, Any]] = field(default_factory=list)


class PABHandle:
    """The runtime behind one transformer; made by `accelerate`.

    Attributes
    ----------
    config : PABConfig
    schedule : Schedule or None
        Plan of the current run.
    cache : BroadcastCache or None
        Slots of the current shape.
    """

    def __init__(self, transformer: nn.Module, config: PABConfig, pipeline: Any = None) -> None:
        if not isinstance(config, PABConfig):
            raise TypeError(f"config: got {type(config).__name__}, must be a PABConfig")
        if "forward" in transformer.__dict__:
            raise TypeError(
                f"{type(transformer).__name__}: its forward is replaced already (another handle, or an offloading hook)"
            )
        self.config = config
        self.transformer = transformer
        self._pipeline = pipeline
        self._adapter = adapter_for(transformer)
        self._executor: Executor | None = None
        self._run: _Run | None = None
        self._pipeline_timesteps: Any = None
        transformer.forward = self._forward
        self._open = True

    @property
    def schedule(self) -> Schedule | None:
        """Plan of the current run."""
        return None if self._run is None else self._run.schedule

    @property
    def cache(self) -> BroadcastCache | None:
        """Slots of the current shape."""
        return None if self._executor is None else self._executor.cache

    def __enter__(self) -> PABHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Restore the transformer bit for bit and free the slots. Closing twice does nothing."""
        if self._open:
            self._open = False
            del self.transformer.forward
            self._adapter.restore()
            self._executor = None
            if self._run is not None:
                self._run.text, self._run.text_kv = None, []

    def begin(self, timesteps: Iterable[float] | Tensor) -> Schedule:
        """Begin a run: plan it over `timesteps`, one for each call that will happen, and forget every slot.

        For a pipeline this happens by itself. Returns the plan.

        Raises
        ------
        ValueError
            No timesteps, or the host's weights were moved since `accelerate`.
        """
        values = timesteps.tolist() if isinstance(timesteps, Tensor) else list(timesteps)
        self._adapter.check_weights()
        self._run = _Run(Schedule(self.config, values))
        if self.cache is not None:
            self.cache.invalidate()
        return self._run.schedule

    def report(self) -> Report:
        """What the latest run did so far; waits for the GPU if there is one."""
        run = self._run
        done = [] if run is None else run.clock
        seconds: dict[str, tuple[int, float]] = {}
        for variant, start, end in done:
            if isinstance(start, torch.cuda.Event):
                end.synchronize()
                took = start.elapsed_time(end) / 1e3
            else:
                took = end - start
            count, total = seconds.get(str(variant), (0, 0.0))
            seconds[str(variant)] = (count + 1, total + took)
        kinds = self._adapter.stack.kinds
        broadcast = Counter({kind: sum(getattr(variant, kind) for variant, _, _ in done) for kind in kinds})
        return Report(
            steps=len(done),
            computed={kind: len(done) - broadcast[kind] for kind in kinds},
            broadcast=dict(broadcast),
            slots=0 if self.cache is None else len(self.cache),
            cache_bytes=0 if self.cache is None else self.cache.nbytes,
            graphs=0,
            seconds=seconds,
        )

    @torch.no_grad()
    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the host's forward."""
        call = self._adapter.bind(*args, **kwargs)
        run = self._current_run(call)
        self._check_latents(call.latents, run)
        variant = run.schedule[run.index]
        run.broken = True  # until this step is complete
        start = self._now(call)
        modulation = self._adapter.modulate(call)
        executor = self._executor_for(call.shape, modulation.blocks.shape[0])
        traffic = executor.traffic(variant)
        executor.cache.require(traffic.reads)
        h = executor.step(
            self._adapter.embed(call),
            modulation.blocks,
            self._text_kv(call, run, executor),
            (modulation.shift, modulation.scale),
            variant,
            embed=call.embed,
        )
        executor.cache.mark_written(traffic.writes)
        result = self._adapter.output(h, call)
        run.clock.append((variant, start, self._now(call)))
        run.index += 1
        run.broken = False
        return result

    def _current_run(self, call: Call) -> _Run:
        """The run this call belongs to; a pipeline's new timesteps begin a new one."""
        if self._pipeline is not None:
            timesteps = self._pipeline.scheduler.timesteps
            # set_timesteps always makes a new tensor, and this one is kept alive, so identity tells runs apart.
            finished = self._run is not None and self._run.index == len(self._run.schedule)
            if timesteps is not self._pipeline_timesteps or finished:
                self._pipeline_timesteps = timesteps
                self.begin(_from_first_call(timesteps, call.timestep))
        run = self._run
        if run is None:
            raise ValueError("no run has begun: call begin(timesteps) before the transformer")
        if run.broken:
            raise ValueError("this run stopped in the middle of a step: call begin(timesteps) for a new one")
        if run.index == len(run.schedule):
            raise ValueError(f"the run's {len(run.schedule)} calls are over: call begin(timesteps) for a new one")
        return run

    def _check_latents(self, latents: Tensor, run: _Run) -> None:
        """Raise ValueError for another shape than the run began with, or another dtype or device than the weights."""
        if run.latents_shape is None:
            run.latents_shape = latents.shape
        elif run.latents_shape != latents.shape:
            raise ValueError(
                f"hidden_states: shape is {list(latents.shape)}, but this run began with {list(run.latents_shape)}: "
                "call begin(timesteps) for a new one"
            )
        parameter = next(self.transformer.parameters())
        if latents.dtype != parameter.dtype or latents.device != parameter.device:
            raise ValueError(
                f"hidden_states: is {latents.dtype} on {latents.device}, "
                f"must be {parameter.dtype} on {parameter.device} as the transformer"
            )

    def _executor_for(self, shape: tuple[int, int, int, int], groups: int) -> Executor:
        """The executor whose slots fit; slots of another shape are freed before new ones are made."""
        if self._executor is None or (self._executor.shape, self._executor.groups) != (shape, groups):
            self._executor = None
            self._executor = Executor(self._adapter.stack, self.config, shape, groups)
        return self._executor

    def _text_kv(self, call: Call, run: _Run, executor: Executor) -> list[TextKV | None]:
        """Keys and values of the text, computed again only when the caller hands over another text."""
        if run.text is not call.text or run.text_version != call.text._version:
            run.text_kv = executor.text_kv(*self._adapter.project_text(call))
            run.text, run.text_version = call.text, call.text._version
        return run.text_kv

    def _now(self, call: Call) -> Any:
        if call.latents.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _from_first_call(timesteps: Any, first: Tensor) -> list[float]:
    """The pipeline's timesteps from the one it really begins with (image-to-video pipelines skip some)."""
    values = [float(t) for t in timesteps]
    begin = float(first.reshape(-1)[0])
    for index, value in enumerate(values):
        if value == begin:
            return values[index:]
    raise ValueError(f"timestep: the run begins at {begin}, which is not among the scheduler's timesteps {values}")


def accelerate(target: Any, config: PABConfig) -> PABHandle:
    """Put a Pyramid Attention Broadcast runtime behind a pipeline or a bare transformer.

    Parameters
    ----------
    target : diffusers pipeline or nn.Module
        A pipeline with `.transformer` and `.scheduler`: its runs are noticed by themselves. Or a transformer: announce
        each run with ``handle.begin(timesteps)``.
    config : PABConfig

    Returns
    -------
    PABHandle
        A context manager; leaving it (or ``close()``) restores the transformer bit for bit.

    Raises
    ------
    TypeError, ValueError
        The transformer is of no known family, is accelerated already, or has modules or options (LoRA, quantised
        linears, hooks, unknown attention processors) that the executor would skip over; the message names them.
    """
    if isinstance(target, nn.Module):
        return PABHandle(target, config)
    if isinstance(getattr(target, "transformer", None), nn.Module) and hasattr(target, "scheduler"):
        return PABHandle(target.transformer, config, pipeline=target)
    raise TypeError(
        f"target: got {type(target).__name__}, must be a transformer or a pipeline with one and a scheduler"
    )
