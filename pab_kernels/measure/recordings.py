"""How recordings are read: .safetensors files from elsewhere, whose metadata are settings in JSON. None is trusted."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pab_kernels.files import check_input
from pab_kernels.models import weight_files


@dataclass(frozen=True)
class RecordingFile:
    """What a file holds. Errors of its methods are ValueErrors that name the file and the key."""

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(
        cls, path: str | os.PathLike[str], what: str, metadata: Iterable[str], tensors: Iterable[str] = ()
    ) -> RecordingFile:
        """Read a file that must have these keys; `what` it is goes into the message of one that does not.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            It is a folder, no .safetensors file, or lacks keys.
        """
        check_input("recording", path)
        path = Path(path)
        try:
            with safe_open(path, framework="pt") as file:
                found = cls(path, file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(f"{path}: not a safetensors file: {error}") from error
        missing = [key for key in metadata if key not in found.metadata]
        missing += [key for key in tensors if key not in found.tensors]
        if missing:
            raise ValueError(f"{path}: not {what}, it has no {', '.join(missing)}")
        return found

    def json(self, key: str, kind: type = dict) -> Any:
        """A setting, which must be a `kind`: a dict or a list."""
        try:
            value = json.loads(self.metadata[key])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}: {key} is not JSON: {error}") from error
        if not isinstance(value, kind):
            raise ValueError(f"{self.path}: {key} is a {type(value).__name__}, must be a {kind.__name__}")
        return value

    def number(self, key: str) -> float:
        """A setting that is a finite number."""
        try:
            value = float(self.metadata[key])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{self.path}: {key} is {self.metadata[key]!r:.100}, must be a finite number")
        return value

    def floating(self, key: str, shape: tuple[int, ...] | None = None, dims: int = 0) -> Tensor:
        """A tensor of a floating dtype, of this shape or of so many dimensions, none of them empty."""
        value = self.tensors[key]
        fits = value.dim() == dims if shape is None else tuple(value.shape) == shape
        if not value.is_floating_point() or not fits or not value.numel():
            must = f"{dims} dimensions" if shape is None else str(list(shape))
            raise ValueError(f"{self.path}: {key} is {value.dtype} {list(value.shape)}, must be floating, of {must}")
        return value

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, without it."""
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


def put(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """`model`, whose parameters are on the meta device, with copies of recorded weights in float32.

    Raises
    ------
    ValueError
        They do not fit; nothing was made of the model's size.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if difference := weight_files.difference(expected, state):
        raise ValueError(f"the recorded weights do not fit {type(model).__name__}:\n{difference}")
    model.load_state_dict({name: value.clone().float() for name, value in state.items()}, assign=True)
    return model
