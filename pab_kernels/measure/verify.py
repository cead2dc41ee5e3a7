"""Replays a recorded denoising run of the original and measures how far this runtime strays from it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pab_kernels.config import PABConfig
from pab_kernels.measure.recordings import RecordingFile, put
from pab_kernels.models import checkpoints
from pab_kernels.runtime.accelerate import accelerate


@dataclass(frozen=True)
class Recording:
    """A recorded run: weights, inputs, and the latents after every step without PAB and with it.

    `base` and `pab` are [steps, 1, C, T, H, W] float32; `inputs` holds the `in.*` tensors under their short names.
    """

    family: str
    model_config: dict[str, Any]
    pab_config: PABConfig
    dt: float
    cfg_scale: float
    state: dict[str, Tensor]
    inputs: dict[str, Tensor]
    base: Tensor
    pab: Tensor

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recording:
        """Read a recording.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            The file is not a recording; the message names it, the key and what is wrong.
        """
        metadata = ("model", "model_config", "pab", "dt", "cfg_scale", "loop")
        tensors = ("in.x", "in.y", "in.timesteps", "out.base", "out.pab")
        file = RecordingFile.read(path, "a recording", metadata, tensors)
        if (loop := file.metadata["loop"]) != "cfg-euler":
            raise ValueError(f"{path}: loop is {loop!r}, must be cfg-euler")
        if (family := file.metadata["model"]) not in checkpoints.CLASSES:
            known = ", ".join(checkpoints.CLASSES)
            raise ValueError(f"{path}: the recording is of {family!r}, must be one of {known}")
        timesteps, latents = file.floating("in.timesteps", dims=1), file.floating("in.x", dims=5)
        steps = (len(timesteps), *latents.shape)
        try:
            pab_config = PABConfig.from_dict(file.json("pab"))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: pab: {error}") from error
        return cls(
            family=family,
            model_config=file.json("model_config"),
            pab_config=pab_config,
            dt=file.number("dt"),
            cfg_scale=file.number("cfg_scale"),
            state=file.part("state."),
            inputs=file.part("in."),
            base=file.floating("out.base", steps),
            pab=file.floating("out.pab", steps),
        )


def replay(
    recording: Recording, config: PABConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Run the recorded loop through this runtime; latents after every step [steps, 1, C, T, H, W] float32 on the CPU.

    Raises
    ------
    ValueError, TypeError
        Settings, weights or inputs do not fit the host.
    """
    # nn.Module's own cast: diffusers' warns about modules to keep in float32, of which there are none here.
    host = nn.Module.to(_host(recording), device=device, dtype=dtype).eval()
    given = _arguments(recording, device, dtype)
    timesteps = recording.inputs["timesteps"]
    latents = recording.inputs["x"].to(device, torch.float32)
    steps = []
    with accelerate(host, config) as handle, torch.no_grad():
        handle.begin(timesteps)
        for t in timesteps.to(device):
            v = host(torch.cat([latents, latents]).to(dtype), timestep=t.expand(2), **given)
            v = v if isinstance(v, Tensor) else v[0]
            cond, uncond = v[:, : latents.shape[1]].float().chunk(2)
            latents = latents + recording.dt * (uncond + recording.cfg_scale * (cond - uncond))
            steps.append(latents.cpu())
    return torch.stack(steps)


def worst_error(steps: Tensor, recorded: Tensor) -> float:
    """The largest over steps of ||out - recorded|| / ||recorded||; NaN anywhere gives infinity."""
    errors = (steps - recorded).flatten(1).norm(dim=1) / recorded.flatten(1).norm(dim=1)
    return float("inf") if errors.isnan().any() else float(errors.max())


def default_tolerance(family: str, dtype: torch.dtype) -> float:
    """The largest error to expect of a right replay of a float32 recording in `dtype`.

    Open-Sora's transformer rounds the timestep to its own dtype, as the original does. In bfloat16 that alone
    (above 512 it moves in steps of 4) takes the recorded run 6e-2 away.
    """
    if dtype == torch.float32:
        return 1e-4
    if family == "open_sora":
        return 1e-1
    return 2e-2 if dtype == torch.bfloat16 else 5e-3


def _host(recording: Recording) -> nn.Module:
    return put(checkpoints.build(recording.family, **recording.model_config), recording.state)


def _arguments(recording: Recording, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    """What the host's forward takes besides latents and timestep."""
    given = {key: value.to(device) for key, value in recording.inputs.items() if key not in ("x", "timesteps")}
    text = given.pop("y").to(dtype)
    if recording.family == "open_sora":
        return {"y": text, **given}
    return {"encoder_hidden_states": text, "return_dict": False, **given}
