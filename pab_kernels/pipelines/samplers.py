"""The timesteps at which each family's sampler really calls the transformer."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from pab_kernels.runtime.rectified_flow import step_sizes

SCHEDULERS: dict[str, Any] = {
    "latte": DDIMScheduler,
    "open_sora_plan_v110": PNDMScheduler,
    "open_sora_plan_v120": EulerAncestralDiscreteScheduler,
}
"""diffusers' scheduler of each family but Open-Sora, whose rectified flow is `rflow_timesteps`, Wan and LTX-Video."""


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


def wan_timesteps(steps: int, shift: float = 3.0) -> list[float]:
    """Timesteps of Wan's UniPC, integers; `shift` is 3 at 480p and 5 at 720p and for Wan 2.2 5B."""
    scheduler: Any = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    return [float(t) for t in scheduler.timesteps]


def ltx_timesteps(steps: int, tokens: int = 6930) -> list[float]:
    """Timesteps of LTX-Video's Euler steps, shifted towards noise for more `tokens`; by default those of 480p, 6 s.

    The settings are those of the released model's scheduler_config.json, the shift is that of diffusers' pipeline:
    linear in the tokens, 0.95 at 1,024 and 2.05 at 4,096.
    """
    scheduler: Any = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    mu = 0.95 + (tokens - 1024) * (2.05 - 0.95) / (4096 - 1024)
    scheduler.set_timesteps(sigmas=[1 - i * (1 - 1 / steps) / max(steps - 1, 1) for i in range(steps)], mu=mu)
    return [float(t) for t in scheduler.timesteps]


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
    """Timesteps of every step of a run of `family` with `steps` steps; Open-Sora's, Wan's and LTX-Video's for 480p.

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
    if family in ("wan_2_1", "wan_2_2"):
        return wan_timesteps(steps, 3.0 if family == "wan_2_1" else 5.0)
    if family == "ltx":
        return ltx_timesteps(steps)
    if family not in SCHEDULERS:
        known = ", ".join(("open_sora", *SCHEDULERS, "wan_2_1", "wan_2_2", "ltx"))
        raise ValueError(f"family: got {family!r}, must be one of {known}")
    scheduler = SCHEDULERS[family]()
    scheduler.set_timesteps(steps)
    return [float(t) for t in scheduler.timesteps]
