"""Named denoising runs of the families at their real sizes, to time and to test; weights and inputs are random."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pab_kernels.models.checkpoints import SIZES, random_weights
from pab_kernels.pipelines.samplers import family_timesteps, ltx_timesteps, rflow_timesteps, wan_timesteps


@dataclass(frozen=True)
class Inputs:
    """What a denoising loop starts from, all on the device.

    `latents` float32 [1, C, T, H, W], or packed [1, tokens, C] as LTX-Video takes them; `timesteps`, one tensor a step;
    `given` are the host's other arguments, for both halves of guidance. Where a step calls the host once for each half,
    `forwards` are their names and arguments, and `timesteps` have one row.
    """

    latents: Tensor
    timesteps: list[Tensor]
    given: dict[str, Any]
    forwards: tuple[tuple[str, dict[str, Any]], ...] = ()


@dataclass(frozen=True)
class Workload:
    """One denoising run: a family, a size, a number of steps. Guidance makes a call a batch of 2, or a step two calls.

    `latent` is (T, H, W) before patches of `patch` x `patch`; `pixels` is (frames, height, width) of the video. The
    text has `text` tokens of which `text_used` count; where both are equal there is no mask. `model` holds what differs
    from the released model. `shift` is that of Wan's sampler.
    """

    name: str
    family: str
    pixels: tuple[int, int, int]
    latent: tuple[int, int, int]
    steps: int
    text: int
    text_used: int
    guidance: float = 7.0
    text_channels: int = 4096
    model: dict[str, Any] = field(default_factory=dict)
    channels: int = 4
    patch: int = 2
    shift: float = 3.0

    @property
    def grid(self) -> tuple[int, int]:
        """(T, S) after patches of the latent."""
        frames, height, width = self.latent
        return frames, -(-height // self.patch) * -(-width // self.patch)

    @property
    def forwards_per_step(self) -> int:
        """How often a step calls the transformer: Wan's pipelines call it for each half of guidance."""
        return 2 if self.family.startswith("wan") else 1

    @property
    def whole_steps(self) -> bool:
        """Whether the runtime takes whole steps, sampler included: guidance in one call, on latents [B, C, T, H, W]."""
        return self.forwards_per_step == 1 and self.family != "ltx"

    def timesteps(self, steps: int | None = None) -> list[float]:
        """The timestep of every call, one call a step.

        Latte's and Open-Sora-Plan 1.2's are those of their samplers, Open-Sora's depend on its size. Open-Sora-Plan
        1.1's are spaced evenly: the calls that PNDM repeats at its start are left out.
        """
        steps = self.steps if steps is None else steps
        if self.family == "open_sora":
            return rflow_timesteps(steps, *self.pixels[1:], self.latent[0])
        if self.family == "open_sora_plan_v110":
            return [1000 * (1 - i / steps) for i in range(steps)]
        if self.family.startswith("wan"):
            return wan_timesteps(steps, self.shift)
        if self.family == "ltx":
            return ltx_timesteps(steps, math.prod(self.grid))
        return family_timesteps(self.family, steps)

    def host(self, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
        """The family's transformer with random weights."""
        return random_weights(self.family, dtype=dtype, device=device, seed=seed, **self.model)

    def inputs(self, device: torch.device | str, dtype: torch.dtype, steps: int | None = None, seed: int = 0) -> Inputs:
        """Random noise and text; the noise is drawn on the CPU, so that every device starts alike."""
        generator = torch.Generator().manual_seed(seed)
        shape = (math.prod(self.grid), self.channels) if self.family == "ltx" else (self.channels, *self.latent)
        latents = torch.randn(1, *shape, generator=generator)
        text = torch.randn(2, self.text, self.text_channels, generator=generator).to(device, dtype)
        given = self._given(text, device)
        forwards: tuple[tuple[str, dict[str, Any]], ...] = ()
        if self.forwards_per_step == 2:
            halves = [{**given, "encoder_hidden_states": half.clone()} for half in text.split(1)]
            forwards = tuple(zip(("cond", "uncond"), halves, strict=True))
        return Inputs(
            latents=latents.to(device),
            # A tensor each: views into one would be misaligned inputs to a compiled host.
            timesteps=[torch.full(self._timestep_shape, t, device=device) for t in self.timesteps(steps)],
            given=given,
            forwards=forwards,
        )

    @property
    def _timestep_shape(self) -> tuple[int, ...]:
        """Wan 2.2 5B has a timestep a token."""
        if self.forwards_per_step == 1:
            return (2,)
        return (1, math.prod(self.grid)) if self.channels == 48 else (1,)

    def _given(self, text: Tensor, device: torch.device | str) -> dict[str, Any]:
        mask = (torch.arange(self.text, device=device) < self.text_used).long()[None]
        if self.family == "open_sora":
            height, width = (torch.tensor([float(n)]) for n in self.pixels[1:])
            return {
                "y": text[:, None],
                "mask": mask,
                "fps": torch.tensor([24.0], device=device),
                # On the CPU, because the host reads their values: on a GPU it would wait for them at every call.
                "height": height,
                "width": width,
            }
        if self.family == "latte" or self.family.startswith("wan"):
            return {"encoder_hidden_states": text, "return_dict": False}
        if self.family == "ltx":
            return {
                "encoder_hidden_states": text,
                "encoder_attention_mask": mask.repeat(2, 1),
                **dict(zip(("num_frames", "height", "width"), self.latent, strict=True)),
                "rope_interpolation_scale": (8 / 25, 32, 32),  # the VAE's compression; 25 frames a second
                "return_dict": False,
            }
        return {
            "encoder_hidden_states": text[:, None],
            "encoder_attention_mask": mask.repeat(2, 1)[:, None],
            "return_dict": False,
        }

    def tiny(self) -> Workload:
        """The same run with two narrow layers on a few tokens and steps, to try everything without a GPU."""
        small: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24}
        small |= {"num_layers": 2, "sample_size": (8, 8)}
        wan: dict[str, Any] = {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "ffn_dim": 40,
            "text_dim": 16,
        }
        model: dict[str, Any] = {
            "open_sora": {"depth": 2, "hidden_size": 24, "num_heads": 2},
            "latte": {**small, "sample_size": 8, "video_length": 5},
            "open_sora_plan_v110": {**small, "video_length": 5},
            "open_sora_plan_v120": {**small, "sample_size_t": 5},
            "wan_2_1": wan,
            "wan_2_2": wan,
            "ltx": {**small, "attention_head_dim": 10, "cross_attention_dim": 20},
        }[self.family]
        if not self.family.startswith("wan"):
            model["caption_channels"] = 16
        if self.family in ("wan_2_1", "wan_2_2", "ltx"):
            model.pop("sample_size", None)
        return dataclasses.replace(
            self,
            name=f"{self.name} (tiny)",
            latent=(5, 6, 7) if self.family == "open_sora" else (5, 8, 8),
            steps=min(self.steps, 12),
            text=9,
            text_used=9 if self.text == self.text_used else 4,
            text_channels=16,
            model=model,
        )


def _open_sora() -> list[Workload]:
    sizes = {
        "144p": ((144, 256), (18, 32)),
        "240p": ((240, 426), (30, 53)),
        "360p": ((360, 640), (45, 80)),
        "480p": ((480, 854), (60, 106)),
        "720p": ((720, 1280), (90, 160)),
    }
    lengths = {"2s": (51, 15), "4s": (102, 30), "8s": (204, 60), "16s": (408, 120)}
    return [
        Workload(f"open_sora-{size}-{length}", "open_sora", (frames, *pixels), (t, *latent), 30, 300, 120)
        for size, (pixels, latent) in sizes.items()
        for length, (frames, t) in lengths.items()
    ]


def _plan_v110(name: str, frames: int, latent_frames: int, steps: int) -> Workload:
    return Workload(
        f"open_sora_plan_v110-{name}",
        "open_sora_plan_v110",
        (frames, 512, 512),
        (latent_frames, 64, 64),
        steps,
        300,
        80,
        guidance=7.5,
        model={"video_length": latent_frames},
    )


def _plan_v120(name: str, frames: int, latent_frames: int, steps: int) -> Workload:
    return Workload(
        f"open_sora_plan_v120-{name}",
        "open_sora_plan_v120",
        (frames, 480, 640),
        (latent_frames, 60, 80),
        steps,
        512,
        100,
        guidance=7.5,
        model={"sample_size_t": latent_frames},
    )


def _wan(family: str, size: str, length: str, frames: int, height: int, width: int, shift: float) -> Workload:
    channels, scale = (48, 16) if size == "5b" else (16, 8)
    return Workload(
        f"{family}-{size}-{length}",
        family,
        (frames, height, width),
        ((frames - 1) // 4 + 1, height // scale, width // scale),
        50,
        512,
        512,
        guidance=5.0,
        model=SIZES[family][size],
        channels=channels,
        shift=shift,
    )


def _ltx(name: str, frames: int, height: int, width: int) -> Workload:
    latent = ((frames - 1) // 8 + 1, height // 32, width // 32)
    return Workload(
        f"ltx-{name}", "ltx", (frames, height, width), latent, 50, 128, 60, guidance=3.0, channels=128, patch=1
    )


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        *_open_sora(),
        Workload("latte-16x512", "latte", (16, 512, 512), (16, 64, 64), 50, 60, 60, guidance=7.5),
        _plan_v110("65x512", 65, 17, 50),
        _plan_v110("65x512-150", 65, 17, 150),
        _plan_v110("221x512", 221, 56, 150),
        _plan_v120("29x480p", 29, 8, 30),
        _plan_v120("93x480p", 93, 24, 100),
        _wan("wan_2_1", "1.3b", "480p-5s", 81, 480, 832, 3.0),
        _wan("wan_2_1", "14b", "480p-5s", 81, 480, 832, 3.0),
        _wan("wan_2_1", "14b", "720p-5s", 81, 720, 1280, 5.0),
        _wan("wan_2_2", "5b", "720p-5s", 121, 704, 1280, 5.0),
        _ltx("480p-6s", 161, 480, 704),
        _ltx("704p-5s", 121, 704, 1216),
    )
}
"""All workloads by name."""


def workload(name: str) -> Workload:
    """The workload called `name`, or ValueError that names the nearest and all others."""
    if name not in WORKLOADS:
        near = difflib.get_close_matches(name, WORKLOADS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"workload: got {name!r}, {hint}must be one of {', '.join(WORKLOADS)}")
    return WORKLOADS[name]
