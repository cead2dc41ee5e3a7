"""The timesteps at which each family's sampler really calls the transformer."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, PNDMScheduler
from torch import Tensor

from pab_kernels.runtime.rectified_flow import step_sizes

SCHEDULERS: dict[str, Any] = {
    "latte": DDIMScheduler,
    "open_sora_plan_v110": PNDMScheduler,
    "open_sora_plan_v120": EulerAncestralDiscreteScheduler,
}
"""diffusers' scheduler of each family but Open-Sora, whose rectified flow is `rflow_timesteps`."""


def rflow_timesteps(steps: int, height: int, width: int, latent_frames: int) -> list[float]:
    """Timesteps of Open-Sora's rectified flow, shifted towards noise for more pixels and frames.

    With x = 1 - i / steps and r = sqrt(height * width / 512^2) * sqrt(latent_frames), t = 1000 r x / (1 + (r - 1) x)
    (Open-Sora's `timestep_transform`, after arXiv:2403.03206).

    Parameters
    ----------
    steps : int
    height, width : int
        In pixels.
    latent_frames : int
        Frames after the VAE; at least 1 is counted.

    Returns
    -------
    list of float
        Descending from 1000.
    """
    ratio = math.sqrt(height * width / 512**2) * math.sqrt(max(latent_frames, 1))
    shares = [1 - i / steps for i in range(steps)]
    return [1000 * ratio * x / (1 + (ratio - 1) * x) for x in shares]


class RFlowScheduler:
    """Open-Sora's rectified flow: Euler steps along the predicted velocity, from noise at 1000 to data at 0.

    Attributes
    ----------
    timesteps : Tensor
        [steps] float32 on the CPU, a new tensor for each run.
    init_noise_sigma : float
        Standard deviation of the noise that a run starts from.
    """

    init_noise_sigma = 1.0

    def __init__(self) -> None:
        self.timesteps = torch.empty(0)
        self._values: list[float] = []

    def set_timesteps(self, steps: int, height: int, width: int, latent_frames: int) -> None:
        """Begin a run; see `rflow_timesteps`."""
        self.timesteps = torch.tensor(rflow_timesteps(steps, height, width, latent_frames), dtype=torch.float32)
        self._values = self.timesteps.tolist()

    def scale_model_input(self, latents: Tensor, t: float | Tensor) -> Tensor:
        """The transformer takes the latents as they are."""
        return latents

    def step(self, v: Tensor, t: float | Tensor, latents: Tensor) -> Tensor:
        """Latents at the timestep after `t`: ``latents + v * (t - next) / 1000``, after the last one at 0.

        Parameters
        ----------
        v : Tensor
            Predicted velocity, shape and dtype of latents.
        t : float or Tensor
            One of `timesteps`.
        latents : Tensor

        Raises
        ------
        ValueError
            `t` is not one of the run's timesteps.
        """
        if float(t) not in self._values:
            raise ValueError(f"t: got {float(t)}, must be one of the run's {len(self._values)} timesteps")
        return latents + v * step_sizes(self._values)[self._values.index(float(t))]


def family_timesteps(family: str, steps: int) -> list[float]:
    """Timesteps of every transformer call of a run of `family` with `steps` steps; Open-Sora's for 480p, 2 s.

    PNDM calls the transformer more often than it steps (159 calls for 150 steps).

    Raises
    ------
    ValueError
        Unknown family, or fewer than 1 step.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, must be at least 1")
    if family == "open_sora":
        return rflow_timesteps(steps, 480, 854, 15)
    if family not in SCHEDULERS:
        raise ValueError(f"family: got {family!r}, must be one of open_sora, {', '.join(SCHEDULERS)}")
    scheduler = SCHEDULERS[family]()
    scheduler.set_timesteps(steps)
    return [float(t) for t in scheduler.timesteps]
