"""Samplers: which of diffusers' fit, the timesteps at which they really call the transformer, Open-Sora's own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
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

from pab_kernels.pipelines.arguments import MAX_STEPS, check_steps
from pab_kernels.runtime.rectified_flow import step_sizes

SCHEDULERS: dict[str, Any] = {
    "latte": DDIMScheduler,
    "open_sora_plan_v110": PNDMScheduler,
    "open_sora_plan_v120": EulerAncestralDiscreteScheduler,
}
"""diffusers' scheduler of each family but Open-Sora, whose rectified flow is `rflow_timesteps`, Wan and LTX-Video."""

_FLOW = {
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LTXEulerAncestralRFScheduler",
}
"""diffusers' samplers of rectified flow alone, by name, since not every version has them all."""

_SIGMAS_WITH_LATENTS = {"LTXEulerAncestralRFScheduler"}
"""Those whose step computes with sigmas as tensors of one dimension, which must lie where the latents are.

The others take single numbers of their tables, which torch lets meet a tensor on any device.
"""

_MORE = {"prev_timestep", "starting_mask_ratio", "old_pred_original_sample"}
"""Arguments of a step that only its own pipeline gives."""


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


def prediction_of(scheduler: Any) -> str | None:
    """What `scheduler` takes a transformer to predict: "flow", or its `prediction_type`; None for an unknown kind.

    "flow" is diffusers' rectified flow, noise minus data. Others predict over the discrete timesteps of a schedule of
    noise: "epsilon", "v_prediction" or "sample".
    """
    if isinstance(scheduler, RFlowScheduler) or _FLOW.intersection(cls.__name__ for cls in type(scheduler).__mro__):
        return "flow"
    config = getattr(scheduler, "config", {})
    prediction = config.get("prediction_type")
    flows = (prediction == "flow_prediction", bool(config.get("use_flow_sigmas")))
    if any(flows):
        return "flow" if all(flows) else None
    # Samplers over another measure of noise (EDM, consistency models, IPNDM), or over words, have no such table.
    return prediction if hasattr(scheduler, "alphas_cumprod") else None


def check_scheduler(scheduler: Any, predictions: Sequence[str]) -> None:
    """Refuse, by name, a scheduler that does not fit a transformer or our loop.

    Parameters
    ----------
    scheduler
        Any of diffusers, or one with the same methods.
    predictions : sequence of str
        What the transformer may have been trained to predict; see `prediction_of`.

    Raises
    ------
    ValueError
        The scheduler takes it to predict something else; runs from data to noise; draws noise that no generator
        reaches, so that no seed would be honoured; or its step needs more than prediction, timestep and latents.
    """
    name = type(scheduler).__name__
    step = getattr(scheduler, "step", None)
    if step is None or not hasattr(scheduler, "set_timesteps"):
        raise ValueError(f"scheduler: got {name}, must have set_timesteps and step as diffusers' have")
    parameters = inspect.signature(step).parameters
    needed = [p for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(needed) > 3 or parameters.keys() & _MORE:
        raise ValueError(f"scheduler: got {name}, whose step takes more than prediction, timestep and latents")
    prediction = prediction_of(scheduler)
    if prediction not in predictions:
        what = "is for another kind of model" if prediction is None else f"takes the model to predict {prediction}"
        raise ValueError(
            f"scheduler: got {name}, which {what}; must be for one that predicts {' or '.join(predictions)}"
        )
    if "Inverse" in name:
        raise ValueError(f"scheduler: got {name}, which runs from data to noise; must run from noise to data")
    if hasattr(scheduler, "noise_sampler_seed"):
        raise ValueError(
            f"scheduler: got {name}, whose noise hangs on the whole batch and not on the seed of each video: use "
            "DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++'"
        )


def take_step(
    scheduler: Any, prediction: Tensor, t: Tensor, latents: Tensor, generators: torch.Generator | list[torch.Generator]
) -> tuple[Tensor, Tensor | None]:
    """A step of one of diffusers' schedulers.

    Returns
    -------
    latents : Tensor
        What the sampler adds was drawn from `generators`.
    denoised : Tensor or None
        What they are now taken to become, if the sampler tells.
    """
    draws = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    if type(scheduler).__name__ in _SIGMAS_WITH_LATENTS:
        scheduler.sigmas = scheduler.sigmas.to(latents.device)
    latents, *told = scheduler.step(prediction, t, latents, return_dict=False, **draws)
    # TCD tells of a noisy sample.
    return latents, told[0] if told and type(scheduler).__name__ != "TCDScheduler" else None


def set_timesteps(scheduler: Any, steps: int, predictions: Sequence[str], name: str = "num_inference_steps") -> None:
    """Begin a run of one of diffusers' schedulers, on the CPU, before any other work.

    Parameters
    ----------
    scheduler
    steps : int
        1 to 1000.
    predictions : sequence of str
        As for `check_scheduler`.
    name : str
        What the caller calls the steps.

    Raises
    ------
    ValueError
        As `check_scheduler`, or the scheduler cannot plan so many steps, or plans timesteps that no model was trained
        for.
    """
    check_scheduler(scheduler, predictions)
    steps, sampler = check_steps(steps), type(scheduler).__name__
    config = getattr(scheduler, "config", {})
    if isinstance(scheduler, PNDMScheduler) and not config.get("skip_prk_steps") and steps < 4:
        raise ValueError(f"{name} must be at least 4 for PNDM, got {steps}")
    try:
        scheduler.set_timesteps(steps)
    except Exception as error:
        raise ValueError(f"{name}: got {steps}, which {sampler} cannot plan: {error}") from error
    timesteps = [float(t) for t in scheduler.timesteps]
    last = config.get("num_train_timesteps", MAX_STEPS)
    if not timesteps or not all(0 <= t <= last for t in timesteps):
        raise ValueError(f"scheduler: got {sampler}, which plans {timesteps[:3]}...: must be timesteps in [0, {last}]")
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and getattr(scheduler, "order", 1) == 1 and bool((sigmas[:-1].diff() == 0).any()):
        raise ValueError(
            f"{name}: got {steps}, of which {sampler} makes some twice, and then divides by their difference: use fewer"
        )


def family_timesteps(family: str, steps: int) -> list[float]:
    """Timesteps of every step of a run of `family` with `steps` steps; Open-Sora's, Wan's and LTX-Video's for 480p.

    PNDM calls the transformer more often than it steps (159 calls for 150 steps).

    Raises
    ------
    ValueError
        Unknown family, or steps that its sampler does not take: 1 to 1000, for PNDM at least 4.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps: got {steps}, must be in [1, {MAX_STEPS}]")
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
    set_timesteps(scheduler, steps, ("epsilon",), "steps")
    return [float(t) for t in scheduler.timesteps]
