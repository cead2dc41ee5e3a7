"""Replays recordings of the originals' video autoencoders and measures how far the hosts stray from them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pab_kernels.measure.recordings import RecordingFile, put
from pab_kernels.models import autoencoders
from pab_kernels.models.autoencoders import Tiling

_TILING = {field.name for field in dataclasses.fields(Tiling)}
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
            The file is not a recording of an autoencoder; the message names it, the key and what is wrong.
        """
        file = RecordingFile.read(path, "a recording of an autoencoder", ("family", "config", "cases"))
        if (family := file.metadata["family"]) not in autoencoders.CLASSES:
            known = ", ".join(autoencoders.CLASSES)
            raise ValueError(f"{path}: the recording is of {family!r}, must be one of {known}")
        config = {key: value for key, value in file.json("config").items() if not key.startswith("_")}
        if "config_vae_2d" in file.metadata:
            config["spatial"] = file.json("config_vae_2d")
        cases = tuple(_case(file, case) for case in file.json("cases", list))
        return cls(family, config, file.part("weights."), cases)


def _case(file: RecordingFile, case: Any) -> Case:
    case = case if isinstance(case, dict) else {}
    index, kind, frames, tiling = (case.get(key) for key in ("index", "kind", "num_frames", "tiling"))
    if kind not in ("decode", "encode"):
        raise ValueError(f"{file.path}: cases: got kind {kind!r:.100}, must be decode or encode")
    if not (frames is None or (isinstance(frames, int) and frames > 0)):
        raise ValueError(f"{file.path}: cases: got num_frames {frames!r:.100}, must be a whole number above 0")
    if tiling is not None and not (isinstance(tiling, dict) and tiling.keys() <= _TILING):
        raise ValueError(f"{file.path}: cases: got tiling {tiling!r:.100}, must have {', '.join(sorted(_TILING))}")
    names = ("latents", "video") if kind == "decode" else ("encode_in", "encode_mean")
    keys = [f"{name}.{index}" for name in names]
    if absent := [key for key in keys if key not in file.tensors]:
        raise ValueError(f"{file.path}: the recording has no {', '.join(absent)}")
    given, want = (file.floating(key, dims=5) for key in keys)
    return Case(kind, given, want, frames, tiling)


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
    try:
        with torch.device("meta"):
            vae = autoencoders.build(recording.family, **recording.config)
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError) as error:
        raise ValueError(f"config: these settings make no autoencoder of {recording.family}: {error}") from error
    return nn.Module.to(put(vae, recording.state), device=device, dtype=dtype)


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
