"""Whether a caller's tensors are what they were, and what small ones hold, without waiting for a GPU again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written in place; None where torch does not count, as in `torch.inference_mode`."""
    try:
        return tensor._version
    except RuntimeError:
        return None


@dataclass
class _Record:
    tensor: Tensor
    version: int | None
    copy: Tensor | None
    """Of a tensor without a version: one of `torch.inference_mode`."""

    @classmethod
    def of(cls, tensor: Tensor) -> _Record:
        version = version_of(tensor)
        return cls(tensor, version, tensor.clone() if version is None else None)


class Seen:
    """Remembers tensors by name.

    Another tensor counts as new, as does one whose version went up. Tensors of `torch.inference_mode` have none: on a
    CPU they are compared with a copy; on a GPU so, too, but there the answer comes too late, and becomes a doubt.
    """

    def __init__(self) -> None:
        self._records: dict[str, list[_Record]] = {}
        self._values: dict[str, tuple[float, ...]] = {}
        self._doubts: list[Tensor] = []

    def changed(self, name: str, *tensors: Tensor) -> bool:
        """Whether these tensors are not what they were at the last call with this name; they are remembered."""
        old = self._records.get(name, [])
        if len(old) == len(tensors) and all(map(self._same, old, tensors)):
            return False
        self._records[name] = list(map(_Record.of, tensors))
        return True

    def values(self, name: str, tensor: Tensor) -> tuple[float, ...]:
        """All elements of a small tensor. Only one on a GPU that is new is waited for."""
        if tensor.device.type == "cpu":
            return tuple(tensor.flatten().tolist())
        if self.changed(name, tensor) or name not in self._values:
            self._values[name] = tuple(tensor.flatten().tolist())
        return self._values[name]

    def doubts(self) -> tuple[Tensor, ...]:
        """Since the last call of this method: bool tensors, on the GPU, that are True where `changed` was wrong."""
        found, self._doubts = tuple(self._doubts), []
        return found

    def forget(self) -> None:
        """Take whatever comes next for new."""
        self._records.clear()
        self._values.clear()

    def _same(self, old: _Record, tensor: Tensor) -> bool:
        if old.tensor is not tensor:
            return False
        if old.copy is None:
            return old.version == tensor._version
        if tensor.device.type == "cuda":
            self._doubts.append((tensor != old.copy).any())
            return True
        return torch.equal(tensor, old.copy)
