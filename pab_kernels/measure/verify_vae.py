"""Replays recordings of the originals' video autoencoders and measures how far the hosts stray from them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pab_kernels.models import autoencoders

TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 3e-1}
"""Largest difference of a pixel about [-1, 1] or a latent that a right replay of a float32 recording shows."""


@dataclass(frozen=True)
class Case:
    """A recorded call: "decode" gives `want` [B, 3, F, H, W] of latents, "encode" the mean latents of a video."""

    kind: str
    given: Tensor
    want: Tensor
    num_frames: int | None
    tiling: dict[str, Any] | None


@dataclass(frozen=True)
class VaeRecording:
    """Weights, settings and calls of one autoencoder."""

    family: str
    config: dict[str, Any]
    state: dict[str, Tensor]
    cases: tuple[Case, ...]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> VaeRecording:
        """Read a recording.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            The file is not a recording of an autoencoder; the message says what is missing.
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
        if missing := [key for key in ("family", "config", "cases") if key not in metadata]:
            raise ValueError(f"{path}: not a recording of an autoencoder, it has no {', '.join(missing)}")
        if metadata["family"] not in autoencoders.CLASSES:
            known = ", ".join(autoencoders.CLASSES)
            raise ValueError(f"{path}: the recording is of {metadata['family']!r}, must be one of {known}")
        config = {key: value for key, value in json.loads(metadata["config"]).items() if not key.startswith("_")}
        if "config_vae_2d" in metadata:
            config["spatial"] = json.loads(metadata["config_vae_2d"])
        cases = []
        for case in json.loads(metadata["cases"]):
            index, decode = case["index"], case["kind"] == "decode"
            given, want = ("latents", "video") if decode else ("encode_in", "encode_mean")
            if absent := [key for key in (f"{given}.{index}", f"{want}.{index}") if key not in tensors]:
                raise ValueError(f"{path}: the recording has no {', '.join(absent)}")
            parts = tensors[f"{given}.{index}"], tensors[f"{want}.{index}"]
            cases.append(Case(case["kind"], *parts, case.get("num_frames"), case.get("tiling")))
        prefix = "weights."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        return cls(metadata["family"], config, state, tuple(cases))


def is_vae(path: Path) -> bool:
    """Whether a file looks like a recording of an autoencoder rather than of a denoising run."""
    try:
        with safe_open(path, framework="pt") as file:
            return "cases" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def host(recording: VaeRecording, device: torch.device | str, dtype: torch.dtype) -> Any:
    """The recorded autoencoder.

    Raises
    ------
    ValueError
        Settings or weights do not fit the host.
    """
    vae = autoencoders.build(recording.family, **recording.config)
    try:
        vae.load_state_dict({key: value.float() for key, value in recording.state.items()})
    except RuntimeError as error:
        raise ValueError(f"weights: {error}") from error
    return torch.nn.Module.to(vae, device=device, dtype=dtype)


@torch.no_grad()
def replay(
    recording: VaeRecording, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Case, float]]:
    """Run every recorded call on the host.

    Yields
    ------
    The call, and the largest difference from what was recorded; infinite for another shape or NaN.
    """
    vae = host(recording, device, dtype)
    for case in recording.cases:
        if recording.family != "open_sora":
            base = autoencoders.CLASS_TILINGS[recording.family]
            vae.tiling = None if case.tiling is None else dataclasses.replace(base, **case.tiling)
        given = case.given.to(device, dtype)
        if case.kind == "encode":
            out = vae.encode(given)
        else:
            out = vae.decode(given) if case.num_frames is None else vae.decode(given, case.num_frames)
        yield case, difference(out.cpu(), case.want)


def difference(out: Tensor, want: Tensor) -> float:
    """The largest difference of an element; infinite where the shapes differ or anything is NaN."""
    if out.shape != want.shape:
        return float("inf")
    worst = (out.double() - want.double()).abs().max()
    return float("inf") if worst.isnan() else float(worst)
