"""Replays a recorded denoising run of the original and measures how far this runtime strays from it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pab_kernels.config import PABConfig
from pab_kernels.models.checkpoints import CLASSES
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
            The file is not a recording; the message says what is missing.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file: {error}") from error
        missing = [key for key in ("model", "model_config", "pab", "dt", "cfg_scale", "loop") if key not in metadata]
        missing += [key for key in ("in.x", "in.y", "in.timesteps", "out.base", "out.pab") if key not in tensors]
        if missing:
            raise ValueError(f"{path}: not a recording, it has no {', '.join(missing)}")
        if metadata["loop"] != "cfg-euler":
            raise ValueError(f"{path}: loop is {metadata['loop']!r}, must be cfg-euler")

        def part(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

        return cls(
            family=metadata["model"],
            model_config=json.loads(metadata["model_config"]),
            pab_config=PABConfig.from_dict(json.loads(metadata["pab"])),
            dt=float(metadata["dt"]),
            cfg_scale=float(metadata["cfg_scale"]),
            state=part("state."),
            inputs=part("in."),
            base=tensors["out.base"],
            pab=tensors["out.pab"],
        )


def replay(
    recording: Recording, config: PABConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Run the recorded loop through this runtime; latents after every step [steps, 1, C, T, H, W] float32 on the CPU.

    Raises
    ------
    ValueError
        The recording's family is not supported.
    """
    if recording.family not in CLASSES:
        raise ValueError(f"model: the recording is of {recording.family!r}, must be one of {', '.join(CLASSES)}")
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
    host = CLASSES[recording.family](**recording.model_config)
    host.load_state_dict(recording.state)
    return host


def _arguments(recording: Recording, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    """What the host's forward takes besides latents and timestep."""
    given = {key: value.to(device) for key, value in recording.inputs.items() if key not in ("x", "timesteps")}
    text = given.pop("y").to(dtype)
    if recording.family == "open_sora":
        return {"y": text, **given}
    return {"encoder_hidden_states": text, "return_dict": False, **given}
