"""Euler steps of rectified flow with guidance, and what all steps of a run need, computed at its beginning."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pab_kernels.models.adapter import Adapter, Call
from pab_kernels.models.seen import Seen
from pab_kernels.ops.checks import check_shape


def step_sizes(timesteps: Sequence[float]) -> list[float]:
    """How far each step goes: from its timestep to the next, from the last to 0, as a share of all 1000."""
    return [(now - after) / 1000 for now, after in pairwise((*timesteps, 0.0))]


def euler_step(
    latents: Tensor, prediction: Tensor, guidance_scale: float | Tensor, step_size: float | Tensor
) -> Tensor:
    """Latents after one step, ``latents + step_size * (uncond + guidance_scale * (cond - uncond))``, in float32.

    Parameters
    ----------
    latents : Tensor
        float32 [B, C, T, H, W].
    prediction : Tensor
        Velocity [2B, C_out, T, H, W], the conditional half first; or [B, C_out, T, H, W] without guidance. Channels
        after the first C are a learned variance, which is not used.
    guidance_scale, step_size : float or Tensor
        Numbers, or float32 tensors of no dimension.
    """
    velocity = prediction[:, : latents.shape[1]].float()
    if len(velocity) != len(latents):
        cond, uncond = velocity.chunk(2)
        velocity = uncond + guidance_scale * (cond - uncond)
    return latents + step_size * velocity


@dataclass(frozen=True)
class FlowInputs:
    """What each of a run's N steps takes besides the latents.

    `call` stands for all calls of the transformer; `shape` is that of the latents [B, C, T, H, W]. `modulation`
    [N, G, K + 2, C] holds the blocks' vectors, shift and scale; `scales` float32 [N, 2] guidance scale and step size.
    `arguments` are the caller's own tensors, which must stay as `seen` saw them.
    """

    call: Call
    shape: tuple[int, ...]
    modulation: Tensor
    scales: Tensor
    seen: Seen
    arguments: tuple[Tensor, ...]

    @classmethod
    def make(
        cls,
        adapter: Adapter,
        latents: Tensor,
        timesteps: Sequence[float],
        guidance_scale: float,
        arguments: dict[str, Any],
    ) -> FlowInputs:
        """As for `PABHandle.rectified_flow`; all steps are modulated as one large batch."""
        if not adapter.whole_steps:
            name = type(adapter.host).__name__
            raise ValueError(f"rectified_flow: a {name} does not predict what this sampler adds: call it step by step")
        weight = next(adapter.host.parameters())
        device, steps, rows = weight.device, len(timesteps), len(latents) * (2 if guidance_scale > 1 else 1)
        # Only the shape of a call's latents is asked for: this has one element.
        example = weight.new_empty(()).expand(rows, *latents.shape[1:])
        call = adapter.bind(example, timestep=torch.zeros(rows, device=device), **arguments)
        many = {name: value.repeat(steps, *[1] * (value.ndim - 1)) for name, value in _same(call).items()}
        many["timestep"] = torch.tensor(timesteps, dtype=torch.float32, device=device).repeat_interleave(rows)
        layout = dataclasses.replace(call.layout, batch=steps * rows, modulations=steps * call.layout.modulations)
        modulation = adapter.modulate(dataclasses.replace(call, tensors=many, layout=layout))
        if modulation.blocks is None:
            raise ValueError("modulation: has no blocks, must be of a family whose blocks have tables")
        packed = torch.cat([modulation.blocks, modulation.shift[:, None], modulation.scale[:, None]], dim=1)
        pairs = [(guidance_scale, size) for size in step_sizes(timesteps)]
        scales = torch.tensor(pairs, dtype=torch.float32, device=device)
        seen, own = Seen(), tuple(value for value in arguments.values() if isinstance(value, Tensor))
        seen.changed("arguments", *own)
        rows = packed.unflatten(0, (steps, call.layout.modulations))
        return cls(call, tuple(latents.shape), rows, scales, seen, own)

    def at(self, step: int, latents: Tensor) -> dict[str, Tensor]:
        """All inputs of one step, for `Workspace.step`.

        Raises
        ------
        ValueError
            The latents have another shape or device than the run, or an argument was changed in place.
        """
        check_shape("latents", latents, self.shape)
        if self.seen.changed("arguments", *self.arguments):
            self.seen.forget()
            raise ValueError("arguments: were changed in the middle of a run: call rectified_flow again for its steps")
        if latents.device != self.scales.device:
            raise ValueError(f"latents: device is {latents.device}, must be {self.scales.device} as the transformer")
        rows = {"modulation": self.modulation[step], "scales": self.scales[step]}
        return {**_same(self.call), **rows, "latents": latents.float()}


def _same(call: Call) -> dict[str, Tensor]:
    """What the adapter reads at every step alike."""
    return {name: value for name, value in call.tensors.items() if name not in ("latents", "timestep")}
