"""`accelerate`: puts a Pyramid Attention Broadcast runtime behind a transformer's forward, and takes it away again."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from pab_kernels import clock
from pab_kernels.config import PABConfig
from pab_kernels.models import adapter_for
from pab_kernels.models.adapter import Call
from pab_kernels.runtime.cache import BroadcastCache
from pab_kernels.runtime.precision import Fp8Linears, count_fp8
from pab_kernels.runtime.rectified_flow import FlowInputs
from pab_kernels.runtime.report import Report
from pab_kernels.runtime.workspace import Workspace
from pab_kernels.schedule import Schedule, StepVariant


@dataclass
class _Run:
    """One denoising run: it begins with timesteps and is never resumed after an error."""

    schedule: Schedule
    calls: int = 0
    broken: bool = False
    shapes: dict[int, torch.Size] = field(default_factory=dict)
    """Latents of each forward of a step, as the run began."""
    clock: list[tuple[StepVariant, Any, Any]] = field(default_factory=list)


class PABHandle:
    """The runtime behind one transformer; made by `accelerate`.

    Attributes
    ----------
    config : PABConfig
    transformer : nn.Module
    """

    def __init__(
        self,
        transformer: nn.Module,
        config: PABConfig,
        pipeline: Any = None,
        *,
        cuda_graphs: bool = True,
        forwards_per_step: int = 1,
        cache_device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(config, PABConfig):
            raise TypeError(f"config: got {type(config).__name__}, must be a PABConfig")
        if not isinstance(forwards_per_step, int) or forwards_per_step < 1:
            raise ValueError(f"forwards_per_step: got {forwards_per_step!r}, must be an integer of at least 1")
        if "forward" in transformer.__dict__:
            raise TypeError(
                f"{type(transformer).__name__}: its forward is replaced already (another handle, or an offloading hook)"
            )
        self._cache_device = _cache_device(cache_device, next(transformer.parameters()).device)
        self.config = config
        self.transformer = transformer
        self._pipeline = pipeline
        self._adapter = adapter_for(transformer)
        self._fp8: Fp8Linears | None = None
        if config.linear_precision is not None:
            try:
                measure = config.linear_precision == "fp8"
                self._fp8 = Fp8Linears(self._adapter.stack, config.linear_exclude, measure=measure)
            except ValueError:
                self._adapter.restore()
                raise
        self._cuda_graphs = cuda_graphs
        self._workspaces: list[Workspace | None] = [None] * forwards_per_step
        self._run: _Run | None = None
        self._pipeline_timesteps: Any = None
        transformer.forward = self._forward
        self._open = True

    @property
    def schedule(self) -> Schedule | None:
        """Plan of the current run."""
        return None if self._run is None else self._run.schedule

    @property
    def caches(self) -> tuple[BroadcastCache, ...]:
        """The slots, a cache for each forward of a step."""
        return tuple(workspace.cache for workspace in self._workspaces if workspace is not None)

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
            # Before the weights, which for a moment are there twice.
            self._fp8 = None
            self._workspaces = [None] * len(self._workspaces)
            self._adapter.restore()

    def begin(self, timesteps: Iterable[float] | Tensor, first_call: int = 0) -> Schedule:
        """Begin a run: plan it over `timesteps`, one for each step that will happen, and forget every slot.

        For a pipeline this happens by itself. The first step that comes is that of index `first_call`, where the
        caller knows the predictions of those before. Returns the plan.

        Raises
        ------
        ValueError
            No timesteps, no step `first_call`, or the host's weights were moved since `accelerate`.
        """
        values = timesteps.tolist() if isinstance(timesteps, Tensor) else list(timesteps)
        self._adapter.check_weights()
        if not 0 <= first_call < max(len(values), 1):
            raise ValueError(f"first_call: got {first_call}, must be at least 0 and less than {len(values)}, the steps")
        self._run = _Run(Schedule(self.config, values), calls=first_call * len(self._workspaces))
        for i, workspace in enumerate(self._workspaces):
            if workspace is None:
                continue
            if workspace.serves(self._run.schedule):
                workspace.begin_run()
            else:
                self._workspaces[i] = None
        return self._run.schedule

    def report(self) -> Report:
        """What the latest run did so far; waits for the GPU if there is one."""
        done = [] if self._run is None else self._run.clock
        seconds: dict[str, tuple[int, float]] = {}
        for variant, start, end in done:
            count, total = seconds.get(str(variant), (0, 0.0))
            seconds[str(variant)] = (count + 1, total + clock.seconds(start, end))
        kinds = self._adapter.stack.kinds
        broadcast = Counter({kind: sum(getattr(variant, kind) for variant, _, _ in done) for kind in kinds})
        workspaces = [workspace for workspace in self._workspaces if workspace is not None]
        return Report(
            calls=len(done),
            computed={kind: len(done) - broadcast[kind] for kind in kinds},
            broadcast=dict(broadcast),
            slots=sum(map(len, self.caches)),
            cache_bytes=sum(cache.nbytes for cache in self.caches),
            host_bytes=sum(cache.host_bytes for cache in self.caches),
            fp8=next((count_fp8(workspace.stack) for workspace in workspaces), {}),
            graphs=sum(workspace.graphs for workspace in workspaces),
            eager=next((workspace.eager for workspace in workspaces if workspace.eager), None),
            seconds=seconds,
        )

    @torch.no_grad()
    def rectified_flow(self, latents: Tensor, guidance_scale: float, **arguments: Any) -> Callable[[Tensor], Tensor]:
        """The steps of a loop of rectified flow over the run that `begin` announced.

        Each is one graph from latents to latents: guidance and the Euler update are inside, see `euler_step`. The
        modulation of all steps is computed here.

        Parameters
        ----------
        latents : Tensor
            float32 [B, C, T, H, W], of which only the shape counts.
        guidance_scale : float
            1 or less goes without guidance.
        arguments
            Of the transformer, besides latents and timestep, the same at every step: for 2B rows, the conditional half
            first, or for B without guidance.

        Returns
        -------
        callable
            Takes the latents before a step and returns those after it, a tensor of the caller's own. It raises
            ValueError for latents of another shape or device, and where the run is over or is not the current one.

        Raises
        ------
        ValueError
            No run has begun, the handle has several forwards a step, or the transformer would refuse the arguments.
        """
        if len(self._workspaces) != 1:
            raise ValueError(f"forwards_per_step: is {len(self._workspaces)}, must be 1 for both halves in one call")
        run = self._checked_run()
        inputs = FlowInputs.make(self._adapter, latents, run.schedule.timesteps, guidance_scale, arguments)

        @torch.no_grad()
        def step(latents: Tensor) -> Tensor:
            if self._checked_run() is not run:
                raise ValueError("another run has begun: call rectified_flow again for its steps")
            return self._step(run, inputs.call, inputs.at(run.calls, latents))

        return step

    @torch.no_grad()
    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the host's forward."""
        call = self._adapter.bind(*args, **kwargs)
        run = self._current_run(call)
        return self._adapter.wrap(self._step(run, call), call)

    def _step(self, run: _Run, call: Call, flow: dict[str, Tensor] | None = None) -> Tensor:
        """The run's next call; see `Workspace.step`."""
        step, forward = divmod(run.calls, len(self._workspaces))
        self._check_latents(call.tensors["latents"], run, forward)
        run.broken = True  # until this call is complete
        start = self._now()
        workspace = self._workspaces[forward]
        if workspace is None or not workspace.fits(call):
            # Slots of another shape are freed before new ones are made.
            workspace = self._workspaces[forward] = None
            stack = self._adapter.stack if self._fp8 is None else self._fp8.at(call.layout.rows)
            workspace = Workspace(self._adapter, stack, run.schedule, call, self._cuda_graphs, self._cache_device)
            self._workspaces[forward] = workspace
        variant = run.schedule[step]
        result = workspace.step(call, variant, flow)
        run.clock.append((variant, start, self._now()))
        run.calls += 1
        run.broken = False
        return result

    def _current_run(self, call: Call) -> _Run:
        """The run this call belongs to; a pipeline's new timesteps begin a new one."""
        if self._pipeline is not None:
            timesteps = self._pipeline.scheduler.timesteps
            # set_timesteps always makes a new tensor, and this one is kept alive, so identity tells runs apart.
            if timesteps is not self._pipeline_timesteps or self._is_over():
                self._pipeline_timesteps = timesteps
                self.begin(_from_first_call(timesteps, call.tensors["timestep"]))
        return self._checked_run()

    def _checked_run(self) -> _Run:
        """The run that has begun, if it can go on."""
        if not self._open:
            raise ValueError("the handle is closed: accelerate the transformer again")
        run = self._run
        if run is None:
            raise ValueError("no run has begun: call begin(timesteps) before the transformer")
        if run.broken:
            raise ValueError("this run stopped in the middle of a step: call begin(timesteps) for a new one")
        if self._is_over():
            raise ValueError(f"the run's {len(run.schedule)} steps are over: call begin(timesteps) for a new one")
        return run

    def _is_over(self) -> bool:
        return self._run is not None and self._run.calls == len(self._run.schedule) * len(self._workspaces)

    def _check_latents(self, latents: Tensor, run: _Run, forward: int) -> None:
        """Raise ValueError for another shape than the run began with, or another dtype or device than the weights."""
        shape = run.shapes.setdefault(forward, latents.shape)
        if shape != latents.shape:
            raise ValueError(
                f"hidden_states: shape is {list(latents.shape)}, but this run began with {list(shape)}: "
                "call begin(timesteps) for a new one"
            )
        parameter = next(self.transformer.parameters())
        if latents.dtype != parameter.dtype or latents.device != parameter.device:
            raise ValueError(
                f"hidden_states: is {latents.dtype} on {latents.device}, "
                f"must be {parameter.dtype} on {parameter.device} as the transformer"
            )

    def _now(self) -> Any:
        return clock.mark(next(self.transformer.parameters()).device)


def handle_of(transformer: nn.Module) -> PABHandle | None:
    """The open handle whose runtime is the transformer's forward; None where there is none.

    Nor is there one where a hook or another forward stands in between, which must see every call.
    """
    owner = getattr(transformer.__dict__.get("forward"), "__self__", None)
    hooked = transformer._forward_hooks or transformer._forward_pre_hooks
    return owner if isinstance(owner, PABHandle) and not hooked else None


def _from_first_call(timesteps: Any, first: Tensor) -> list[float]:
    """The pipeline's timesteps from the one it really begins with (image-to-video pipelines skip some)."""
    values = [float(t) for t in timesteps]
    begin = float(first.reshape(-1)[0])
    for index, value in enumerate(values):
        if value == begin:
            return values[index:]
    raise ValueError(f"timestep: the run begins at {begin}, which is not among the scheduler's timesteps {values}")


def _cache_device(asked: torch.device | str | None, own: torch.device) -> torch.device:
    """Where the slots lie: `own` by default."""
    if asked is None or str(asked) in (own.type, str(own)):
        return own
    if str(asked) == "cpu":
        return torch.device("cpu")
    raise ValueError(f"cache_device: got {str(asked)!r}, must be {own.type} or cpu")


def accelerate(
    target: Any,
    config: PABConfig,
    *,
    linear_precision: str | None = None,
    cache_dtype: str | None = None,
    cache_device: torch.device | str | None = None,
    cuda_graphs: bool = True,
    forwards_per_step: int = 1,
) -> PABHandle:
    """Put a Pyramid Attention Broadcast runtime behind a pipeline or a bare transformer.

    Parameters
    ----------
    target : diffusers pipeline or nn.Module
        A pipeline with `.transformer` and `.scheduler`: its runs are noticed by themselves. Or a transformer: announce
        each run with ``handle.begin(timesteps)``.
    config : PABConfig
    linear_precision : {"fp8", "fp8-all"}, optional
        Instead of the config's.
    cache_dtype : {"fp8", "int8"}, optional
        Instead of the config's.
    cuda_graphs : bool
        On a GPU, replay each `StepVariant` from a captured graph.
    forwards_per_step : int
        How often the transformer is called in a denoising step: 1 where guidance doubles the batch, 2 where the
        conditional and the unconditional half are called one after the other. Each has a cache of its own.
    cache_device : torch.device or str, optional
        "cpu" keeps the slots in pinned host memory, with a few staging tensors on the GPU, from which they are copied
        to and fro beside the computation. Broadcasting then saves time only where computing attention takes longer
        than moving its output over PCIe, as full attention over many tokens does. By default slots lie with the
        transformer.

    Returns
    -------
    PABHandle
        A context manager; leaving it (or ``close()``) restores the transformer bit for bit.

    Raises
    ------
    TypeError, ValueError
        The transformer is of no known family, is accelerated already, or has modules or options (LoRA, quantised
        linears, hooks, unknown attention processors) that the executor would skip over; the message names them.
        Or an argument is out of range, or `linear_precision` is fp8 on a device without fp8 tensor cores.
    """
    given = {"linear_precision": linear_precision, "cache_dtype": cache_dtype}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if changes and isinstance(config, PABConfig):
        config = dataclasses.replace(config, **changes)
    if isinstance(target, nn.Module):
        pipeline, transformer = None, target
    elif isinstance(getattr(target, "transformer", None), nn.Module) and hasattr(target, "scheduler"):
        pipeline, transformer = target, target.transformer
    else:
        raise TypeError(
            f"target: got {type(target).__name__}, must be a transformer or a pipeline with one and a scheduler"
        )
    return PABHandle(
        transformer,
        config,
        pipeline,
        cuda_graphs=cuda_graphs,
        forwards_per_step=forwards_per_step,
        cache_device=cache_device,
    )
