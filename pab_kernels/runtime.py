"""`accelerate`: puts a Pyramid Attention Broadcast runtime behind a transformer's forward, and takes it away again."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pab_kernels.branches import TextKV
from pab_kernels.cache import BroadcastCache
from pab_kernels.config import PABConfig
from pab_kernels.executor import Executor
from pab_kernels.graphs import StepGraphs
from pab_kernels.models import adapter_for
from pab_kernels.models.adapter import Call
from pab_kernels.schedule import Schedule, StepVariant

TEXT_PADDING = 64
"""For graphs, text is padded to a multiple of this many tokens."""


@dataclass
class Report:
    """What a handle's latest run did."""

    steps: int
    computed: dict[str, int]
    broadcast: dict[str, int]
    slots: int
    cache_bytes: int
    graphs: int
    eager: str | None
    """Why steps run without CUDA graphs, None where they have them."""
    seconds: dict[str, tuple[int, float]]
    """For each variant: how many steps ran, and the seconds they took together."""

    def __str__(self) -> str:
        lines = [f"{self.steps} steps"]
        lines += [
            f"  {kind}: {self.computed[kind]} computed, {self.broadcast[kind]} broadcast" for kind in self.computed
        ]
        graphs = f"{self.graphs} CUDA graphs" if self.eager is None else f"no CUDA graphs: {self.eager}"
        lines.append(f"  cache: {self.slots} slots, {self.cache_bytes / 2**20:.1f} MiB; {graphs}")
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
    text: tuple[tuple[Tensor, int], ...] = ()
    """The tensors that the text's keys and values were made from, and their versions."""
    clock: list[tuple[StepVariant, Any, Any]] = field(default_factory=list)


@dataclass
class _Workspace:
    """What is allocated for one shape: the executor with its slots, the text's keys and values, the graphs."""

    executor: Executor
    text: list[TextKV | None] = field(default_factory=list)
    kv_len: Tensor | None = None
    text_shape: torch.Size | None = None
    graphs: StepGraphs | None = None


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

    def __init__(
        self, transformer: nn.Module, config: PABConfig, pipeline: Any = None, cuda_graphs: bool = True
    ) -> None:
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
        self._cuda_graphs = cuda_graphs
        self._workspace: _Workspace | None = None
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
        return None if self._workspace is None else self._workspace.executor.cache

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
            self._workspace = None
            if self._run is not None:
                self._run.text = ()

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
        graphs = None if self._workspace is None else self._workspace.graphs
        return Report(
            steps=len(done),
            computed={kind: len(done) - broadcast[kind] for kind in kinds},
            broadcast=dict(broadcast),
            slots=0 if self.cache is None else len(self.cache),
            cache_bytes=0 if self.cache is None else self.cache.nbytes,
            graphs=0 if graphs is None else len(graphs),
            eager=self._why_eager(),
            seconds=seconds,
        )

    def _why_eager(self) -> str | None:
        """Why steps run without CUDA graphs."""
        if not self._cuda_graphs:
            return "switched off"
        if next(self.transformer.parameters()).device.type != "cuda":
            return "not on a CUDA device"
        graphs = None if self._workspace is None else self._workspace.graphs
        return None if graphs is None else graphs.failure

    @torch.no_grad()
    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the host's forward."""
        call = self._adapter.bind(*args, **kwargs)
        run = self._current_run(call)
        self._check_latents(call.tensors["latents"], run)
        variant = run.schedule[run.index]
        run.broken = True  # until this step is complete
        start = self._now()
        workspace = self._workspace_for(call)
        cache, traffic = workspace.executor.cache, workspace.executor.traffic(variant)
        cache.require(traffic.reads)
        self._adapter.prepare(call)
        self._update_text(call, run, workspace)

        def step(tensors: dict[str, Tensor]) -> Tensor:
            now = dataclasses.replace(call, tensors=tensors)
            modulation = self._adapter.modulate(now)
            h = workspace.executor.step(
                self._adapter.embed(now),
                modulation.blocks,
                workspace.text,
                (modulation.shift, modulation.scale),
                variant,
                embed=self._adapter.frame_embed(now),
                rope=self._adapter.rope(now),
            )
            return self._adapter.project_out(h, now)

        if self._why_eager() is None:
            if workspace.graphs is None or not workspace.graphs.fit(call.tensors):
                workspace.graphs = StepGraphs(call.tensors)
            sample = workspace.graphs.run(variant, step, call.tensors)
        else:
            sample = step(call.tensors)
        cache.mark_written(traffic.writes)
        run.clock.append((variant, start, self._now()))
        run.index += 1
        run.broken = False
        return self._adapter.wrap(sample, call)

    def _current_run(self, call: Call) -> _Run:
        """The run this call belongs to; a pipeline's new timesteps begin a new one."""
        if self._pipeline is not None:
            timesteps = self._pipeline.scheduler.timesteps
            # set_timesteps always makes a new tensor, and this one is kept alive, so identity tells runs apart.
            finished = self._run is not None and self._run.index == len(self._run.schedule)
            if timesteps is not self._pipeline_timesteps or finished:
                self._pipeline_timesteps = timesteps
                self.begin(_from_first_call(timesteps, call.tensors["timestep"]))
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

    def _workspace_for(self, call: Call) -> _Workspace:
        """The workspace that fits this call; one of another shape is freed before a new one is made."""
        executor = None if self._workspace is None else self._workspace.executor
        if executor is None or (executor.shape, executor.groups) != (call.shape, call.groups):
            executor = self._workspace = None
            self._workspace = _Workspace(Executor(self._adapter.stack, self.config, call.shape, call.groups))
        assert self._workspace is not None
        return self._workspace

    def _update_text(self, call: Call, run: _Run, workspace: _Workspace) -> None:
        """Make keys and values of the text, if the caller handed over another one than at the last call.

        For graphs the text is padded to a multiple of `TEXT_PADDING` with its length on the device, so that a prompt
        of another length replays the graphs there are.
        """
        sources = tuple((tensor, tensor._version) for tensor in call.text_sources)
        if len(run.text) == len(sources) and all(
            old is new and old_version == version
            for (old, old_version), (new, version) in zip(run.text, sources, strict=True)
        ):
            return
        text, kv_len = _pack(call.text, call.text_mask)
        if self._why_eager() is None:
            if kv_len is None:
                kv_len = torch.full((len(text),), text.shape[1], dtype=torch.int32, device=text.device)
            text = F.pad(text, (0, 0, 0, -text.shape[1] % TEXT_PADDING))
        same = workspace.text_shape == text.shape and (workspace.kv_len is None) == (kv_len is None)
        if same and workspace.kv_len is not None and kv_len is not None:
            kv_len = workspace.kv_len.copy_(kv_len)
        elif not same:
            workspace.graphs = None
        projected = self._adapter.project_text(text)
        workspace.text = workspace.executor.text_kv(projected, kv_len, out=workspace.text if same else None)
        workspace.kv_len, workspace.text_shape = kv_len, text.shape
        run.text = sources

    def _now(self) -> Any:
        if next(self.transformer.parameters()).device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _pack(text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Text [B, L, C] with the tokens that count in front, and how many they are (int32 [B]).

    Attention does not depend on the order of its keys, so a mask with holes becomes a length.
    """
    if mask is None:
        return text, None
    order = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return text.gather(1, order[..., None].expand_as(text)), mask.sum(1, dtype=torch.int32)


def _from_first_call(timesteps: Any, first: Tensor) -> list[float]:
    """The pipeline's timesteps from the one it really begins with (image-to-video pipelines skip some)."""
    values = [float(t) for t in timesteps]
    begin = float(first.reshape(-1)[0])
    for index, value in enumerate(values):
        if value == begin:
            return values[index:]
    raise ValueError(f"timestep: the run begins at {begin}, which is not among the scheduler's timesteps {values}")


def accelerate(target: Any, config: PABConfig, *, cuda_graphs: bool = True) -> PABHandle:
    """Put a Pyramid Attention Broadcast runtime behind a pipeline or a bare transformer.

    Parameters
    ----------
    target : diffusers pipeline or nn.Module
        A pipeline with `.transformer` and `.scheduler`: its runs are noticed by themselves. Or a transformer: announce
        each run with ``handle.begin(timesteps)``.
    config : PABConfig
    cuda_graphs : bool
        On a GPU, replay each `StepVariant` from a captured graph.

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
        return PABHandle(target, config, cuda_graphs=cuda_graphs)
    if isinstance(getattr(target, "transformer", None), nn.Module) and hasattr(target, "scheduler"):
        return PABHandle(target.transformer, config, pipeline=target, cuda_graphs=cuda_graphs)
    raise TypeError(
        f"target: got {type(target).__name__}, must be a transformer or a pipeline with one and a scheduler"
    )
