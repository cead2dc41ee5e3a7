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
    address: int
    copy: Tensor | None
    """On a CPU, where ``tensor.data`` and NumPy write without a version; and of a tensor of `torch.inference_mode`."""

    @classmethod
    def of(cls, tensor: Tensor) -> _Record:
        version = version_of(tensor)
        copy = tensor.clone() if version is None or tensor.device.type == "cpu" else None
        return cls(tensor, version, tensor.data_ptr(), copy)


class Seen:
    """Remembers tensors by name.

    Another tensor counts as new, as does one whose version went up, or that lies elsewhere. On a CPU its values are
    compared, too. Tensors of `torch.inference_mode` have no version: their values are compared on a GPU as well, but
    there the answer comes too late, and becomes a doubt.
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

    def check_mask(self, name: str, mask: Tensor) -> None:
        """Raise ValueError unless a mask holds nothing but 0 and 1. Only a new one on a GPU is waited for."""
        if mask.dtype == torch.bool or not self.changed(name, mask):
            return
        if not bool(((mask == 0) | (mask == 1)).all()):
            self.forget()
            raise ValueError(f"{name}: has other values than 0 and 1, must be 1 for tokens that count (no bias)")

    def doubts(self) -> tuple[Tensor, ...]:
        """Since the last call of this method: bool tensors, on the GPU, that are True where `changed` was wrong."""
        found, self._doubts = tuple(self._doubts), []
        return found

    def forget(self) -> None:
        """Take whatever comes next for new."""
        self._records.clear()
        self._values.clear()

    def _same(self, old: _Record, tensor: Tensor) -> bool:
        if old.tensor is not tensor or old.version != version_of(tensor) or old.address != tensor.data_ptr():
            return False
        if old.copy is None:
            return True
        if tensor.device.type == "cuda":
            self._doubts.append((tensor != old.copy).any())
            return True
        return torch.equal(tensor, old.copy)
