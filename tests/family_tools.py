"""Tiny hosts of the families whose workloads there are, their inputs and runs, for tests of trust in the runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pab_kernels import PABConfig
from pab_kernels.workloads import WORKLOADS
from tests.problem_tools import WORKLOADS_OF_FAMILIES

FAMILIES = {WORKLOADS[name].family: name for name in WORKLOADS_OF_FAMILIES}
STEPS = (940.0, 820.0, 700.0, 580.0, 460.0, 340.0)
PAB = PABConfig(
    spatial_broadcast=True, spatial_threshold=(100, 900), spatial_range=2,
    temporal_broadcast=True, temporal_threshold=(100, 900), temporal_range=3,
    cross_broadcast=True, cross_threshold=(100, 900), cross_range=4,
)  # fmt: skip


@dataclass(frozen=True)
class Host:
    """A tiny host and what it takes besides latents and timestep."""

    model: Any
    given: dict[str, Any]
    shape: tuple[int, ...]

    @torch.no_grad()
    def call(self, latents: Tensor, timestep: float, **changed: Any) -> Tensor:
        """The prediction."""
        return prediction(self.model(latents, timestep=torch.full((2,), timestep), **self.given | changed))

    def run(self, steps: Sequence[float] = STEPS, seed: int = 5, **changed: Any) -> Tensor:
        """Predictions of random latents, one a step."""
        generator = torch.Generator().manual_seed(seed)
        latents = [torch.randn(self.shape, generator=generator) for _ in steps]
        return torch.stack([self.call(x, t, **changed) for x, t in zip(latents, steps, strict=True)])


def prediction(output: Any) -> Tensor:
    """The tensor of what a host returns."""
    return output if isinstance(output, Tensor) else output[0]


def host(family: str, seed: int = 1) -> Host:
    """Weights large enough that a difference shows."""
    tiny = WORKLOADS[FAMILIES[family]].tiny()
    model, inputs = tiny.host("cpu", torch.float32), tiny.inputs("cpu", torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return Host(model, inputs.given, (2, *inputs.latents.shape[1:]))


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||."""
    return float((got.float() - want.float()).norm() / want.float().norm())
