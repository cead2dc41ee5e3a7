"""The forms in which a benchmark runs a host: eager, compiled, with PAB the plain way, through this runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from diffusers.hooks import HookRegistry, PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from torch import nn

from pab_kernels.config import KINDS, PABConfig
from pab_kernels.distributed.mesh import Mesh
from pab_kernels.plain import PlainPAB
from pab_kernels.runtime.accelerate import accelerate
from pab_kernels.runtime.report import Report
from pab_kernels.workloads import Inputs, Workload

CONDITIONAL: Literal["first"] = "first"
"""The half of a benchmark's batch that is conditional."""
COMPILE_SCOPES = ("model", "blocks")


@dataclass(frozen=True)
class Problem:
    """What all contenders run: a host with its weights, inputs, and the settings of PAB."""

    workload: Workload
    host: nn.Module
    inputs: Inputs
    timesteps: list[float]
    config: PABConfig
    dtype: torch.dtype
    device: torch.device
    compile_scope: str = "model"
    cache_device: str | None = None
    """Where this runtime's slots lie, as for `accelerate`."""
    mesh: Mesh = field(default_factory=Mesh)
    """Of the ranks that run it together; each has the same."""

    @classmethod
    def make(
        cls,
        workload: Workload,
        config: PABConfig,
        device: torch.device,
        dtype: torch.dtype,
        steps: int | None = None,
        compile_scope: str = "model",
        cache_device: str | None = None,
    ) -> Problem:
        """Random weights and inputs of `workload`, on the device."""
        timesteps = workload.timesteps(steps)
        host, inputs = workload.host(device, dtype), workload.inputs(device, dtype, steps)
        return cls(workload, host, inputs, timesteps, config, dtype, device, compile_scope, cache_device)

    def settings(self, pab: bool) -> PABConfig:
        """The settings of a contender with PAB, or without."""
        return self.config if pab else PABConfig()


@dataclass
class Session:
    """A host made ready to run: call `begin` before every run, then `model` as the host."""

    model: nn.Module
    begin: Callable[[list[float]], object] = lambda timesteps: None
    report: Callable[[], Report] | None = None


@dataclass(frozen=True)
class Contender:
    """One form of the run. `like` is the contender whose result it should come near; `fp8` linears few devices have."""

    label: str
    pab: bool
    like: str
    open: Callable[[Problem, PABConfig], AbstractContextManager[Session]]
    fp8: bool = False


@contextmanager
def _eager(problem: Problem, config: PABConfig) -> Iterator[Session]:
    yield Session(problem.host)


@contextmanager
def _compiled(problem: Problem, config: PABConfig) -> Iterator[Session]:
    modules = [problem.host]
    if problem.compile_scope == "blocks":
        names = ("spatial_blocks", "temporal_blocks", "transformer_blocks", "temporal_transformer_blocks", "blocks")
        modules = [block for name in names for block in getattr(problem.host, name, ())]
    torch._dynamo.reset()
    try:
        for module in modules:
            module.compile(dynamic=False)  # else a block of another shape would make all of them dynamic
        yield Session(problem.host)
    finally:
        for module in modules:
            module._compiled_call_impl = None
        torch._dynamo.reset()


@contextmanager
def _plain(problem: Problem, config: PABConfig) -> Iterator[Session]:
    with PlainPAB(problem.host, config, problem.workload.forwards_per_step, CONDITIONAL) as plain:
        yield Session(problem.host, plain.begin)


@contextmanager
def _diffusers_hook(problem: Problem, config: PABConfig) -> Iterator[Session]:
    """diffusers' own PAB. Its settings know no blocks and no MLP; they count calls from a run's first, as ours do."""
    host, call = problem.host, -1

    def count(module: nn.Module, args: Any) -> None:
        nonlocal call
        call += 1

    def begin(timesteps: list[float]) -> None:
        nonlocal call
        call = -1
        registry.reset_stateful_hooks()

    ranges = {f"{kind}_attention_block_skip_range": getattr(config, f"{kind}_range") for kind in KINDS}
    windows = {f"{kind}_attention_timestep_skip_range": getattr(config, f"{kind}_threshold") for kind in KINDS}
    counter = host.register_forward_pre_hook(count)
    registry = HookRegistry.check_if_exists_or_initialize(host)
    apply_pyramid_attention_broadcast(
        host,
        PyramidAttentionBroadcastConfig(
            **ranges,
            **windows,
            # Anchored: diffusers looks for spatial names first, and its default "blocks" is part of every name.
            spatial_attention_block_identifiers=(r"^transformer_blocks",),
            temporal_attention_block_identifiers=(r"^temporal_transformer_blocks",),
            cross_attention_block_identifiers=(r"^transformer_blocks",),
            current_timestep_callback=lambda: int(problem.timesteps[call]),
        ),
    )
    try:
        yield Session(host, begin)
    finally:
        counter.remove()
        # Removing diffusers' hooks would leave its own forward on every module.
        for module in host.modules():
            if module.__dict__.pop("_diffusers_hook", None) is not None:
                module.__dict__.pop("forward", None)


@contextmanager
def _runtime(problem: Problem, config: PABConfig, **options: Any) -> Iterator[Session]:
    options |= {"cache_device": problem.cache_device, "forwards_per_step": problem.workload.forwards_per_step}
    options |= {"mesh": problem.mesh}
    with accelerate(problem.host, config, conditional=CONDITIONAL, **options) as handle:
        yield Session(problem.host, handle.begin, handle.report)


_fp8 = partial(_runtime, linear_precision="fp8")
CONTENDERS: dict[str, Contender] = {
    "eager": Contender("host, eager", False, "eager", _eager),
    "compile": Contender("host, torch.compile", False, "eager", _compiled),
    "plain": Contender("PAB, plain form", True, "plain", _plain),
    "hook": Contender("PAB, diffusers' hook", True, "plain", _diffusers_hook),
    "runtime": Contender("this runtime, no PAB", False, "eager", _runtime),
    "runtime+pab": Contender("this runtime, PAB", True, "plain", _runtime),
    "runtime+pab8": Contender("PAB, slots in fp8", True, "runtime+pab", partial(_runtime, cache_dtype="fp8")),
    "runtime-fp8": Contender("linears in fp8, no PAB", False, "runtime", _fp8, fp8=True),
    "runtime-fp8+pab": Contender("linears in fp8, PAB", True, "runtime+pab", _fp8, fp8=True),
    "runtime-fp8+pab-eager": Contender(
        "linears in fp8, PAB, no CUDA graphs", True, "runtime+pab", partial(_fp8, cuda_graphs=False), fp8=True
    ),
    "runtime-fp8a+pab": Contender(
        "linears and attention in fp8", True, "runtime+pab", partial(_fp8, attention_precision="fp8"), fp8=True
    ),
    "runtime-fp8+pab8": Contender(
        "linears and slots in fp8", True, "runtime+pab", partial(_fp8, cache_dtype="fp8"), fp8=True
    ),
}
"""In the order in which they run."""
