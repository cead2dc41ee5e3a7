"""What a linear took in the model's dtype and in fp8, and the file that keeps it: the next run decides alike.

A choice that hangs on a measurement may fall differently from run to run where both take about as long, and with it the
numbers. So it is measured once for a GPU, a version of torch and of this package, and a shape.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pab_kernels import files

log = logging.getLogger(__name__)

GAIN = 1.02
"""How many times faster fp8 must be to be chosen: not to follow the noise of a measurement."""


@dataclass(frozen=True)
class Shape:
    """What decides: the layer, the rows M of its input, its channels, and the features of its first GEMM."""

    layer: str
    rows: int
    channels: int
    features: int


@dataclass(frozen=True)
class Trial:
    """Milliseconds of one layer with the pass that feeds it, in the model's dtype and in fp8."""

    plain_ms: float
    fp8_ms: float

    @property
    def pays(self) -> bool:
        """Whether the layer runs in fp8."""
        return self.plain_ms > GAIN * self.fp8_ms


def kept_at() -> Path:
    """The file: in the folder that ``PAB_CACHE`` names, else in pab_kernels in the user's (``XDG_CACHE_HOME``)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(os.environ.get("PAB_CACHE") or cache / "pab_kernels") / "fp8_linears.jsonl"


def _machine(device: torch.device) -> dict[str, str]:
    """What a measurement holds for, beside its shape."""
    try:
        version = metadata.version("pab-kernels")
    except metadata.PackageNotFoundError:
        version = "not installed"
    return {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__, "pab_kernels": version}


def recall(device: torch.device) -> dict[Shape, Trial]:
    """What was measured on GPUs like this one. The first measurement of a shape holds; other lines are skipped."""
    if device.type != "cuda":
        return {}
    machine = _machine(device)
    found: dict[Shape, Trial] = {}
    try:
        lines = kept_at().read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    for line in lines:
        try:
            record: Any = json.loads(line)
            if {key: record[key] for key in machine} != machine:
                continue
            shape = Shape(*(record[field.name] for field in dataclasses.fields(Shape)))
            trial = Trial(float(record["plain_ms"]), float(record["fp8_ms"]))
        except (ValueError, TypeError, KeyError):
            log.warning("%s: skipped a line that is no measurement: %.80s", kept_at(), line)
            continue
        found.setdefault(shape, trial)
    return found


def keep(device: torch.device, shape: Shape, trial: Trial) -> None:
    """Add a measurement to the file; where that cannot be written, say so, and go on."""
    if device.type != "cuda":
        return
    record = {**_machine(device), **dataclasses.asdict(shape), **dataclasses.asdict(trial)}
    try:
        files.append(kept_at(), json.dumps(record) + "\n")
    except (OSError, ValueError) as error:
        log.warning("the next run measures again, since this one's choice could not be kept: %s", error)
