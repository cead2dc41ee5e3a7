"""The timesteps of the calls, as far as the host can know them without waiting for a GPU at every step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pab_kernels.models.seen import version_of


class Timesteps:
    """Reads timesteps where it must.

    Those of one tensor, such as a scheduler's, are read once. Where each call brings a tensor of its own, the first
    two are read, and then they are unknown.
    """

    def __init__(self) -> None:
        self._tensor: Tensor | None = None  # kept, so that its memory is not given to another
        self._version: int | None = None
        self._values: list[float] = []
        self._new = 0
        """How many tensors in a row were new."""

    def begin(self) -> None:
        """A new run: its first timestep is read in any case."""
        self._tensor, self._new = None, 0

    def of(self, timestep: Tensor) -> tuple[float | None, bool]:
        """The timestep of a call, None if it is unknown, and whether the GPU should check it.

        Raises
        ------
        ValueError
            Rows that differ.
        """
        if timestep.device.type != "cuda":
            return _one(timestep), False
        single = timestep.numel() == 1 or not any(timestep.stride())
        whole = timestep if single else None
        version = version_of(timestep)
        kept = self._tensor
        if whole is not None and kept is not None and self._version == version and _same_memory(kept, whole):
            self._new = 0
            offset = whole.storage_offset()
            if offset < len(self._values):
                return self._values[offset], True
        self._new += 1
        if self._new > 2:
            return None, True
        self._tensor, self._version, self._values = timestep, version, []
        if whole is None or whole.untyped_storage().nbytes() > 2**16:
            return _one(timestep), False
        memory: Any = torch.empty(0, dtype=whole.dtype, device=whole.device)
        count = whole.untyped_storage().nbytes() // whole.dtype.itemsize
        self._values = memory.set_(whole.untyped_storage(), 0, (count,)).tolist()
        return self._values[whole.storage_offset()], False


def as_list(timesteps: Iterable[float] | Tensor) -> list[float]:
    """The timesteps of a run, one a step; TypeError for what is no list of numbers, ValueError for another shape."""
    if isinstance(timesteps, Tensor):
        if timesteps.ndim != 1 or timesteps.is_meta:
            where = " on the meta device" if timesteps.is_meta else ""
            raise ValueError(f"timesteps: shape is {list(timesteps.shape)}{where}, must be one a step, [steps]")
        values: list[float] = timesteps.tolist()
        return values
    try:
        return [float(each) for each in timesteps]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"timesteps: got {timesteps!r:.80}, must be numbers, one a step ({error})") from None


def _same_memory(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()


def _one(timestep: Tensor) -> float:
    """The timestep of all rows; where there is one a token, a row's largest: given frames have 0."""
    rows = timestep.reshape(1 if timestep.ndim == 0 else len(timestep), -1).amax(1).tolist()
    if len(set(rows)) > 1:
        raise ValueError(f"timestep: rows are {rows}, must be alike: a step is planned for the whole batch")
    return float(rows[0])
