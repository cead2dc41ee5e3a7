"""All slots of one run: which exist, what they cost, and which of them the current run has written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pab_kernels.branches import Slot


@dataclass(frozen=True)
class SlotKey:
    """The slot of branch `branch` ("spatial", "temporal", "cross", "mlp") of the block at `position` in the model."""

    branch: str
    position: int


class BroadcastCache:
    """Owns one preallocated slot for every (block, branch) that may be broadcast.

    Parameters
    ----------
    keys : iterable of SlotKey
        Where slots are needed; a branch that never broadcasts has none.
    shape : (B, T, S, C)
        Of every slot.
    groups : int
        Rows G of a gate [G, C].
    dtype : torch.dtype
    device : torch.device

    Raises
    ------
    torch.cuda.OutOfMemoryError
        With the GiB that the cache needs, for which shape, and what would shrink it.
    """

    def __init__(
        self,
        keys: Iterable[SlotKey],
        shape: tuple[int, int, int, int],
        groups: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        keys = tuple(keys)
        self._slots: dict[SlotKey, Slot] = {}
        self.positions: dict[str, Tensor] = {}
        """For each branch the positions of its blocks, int64 on the device."""
        self.gates: dict[str, Tensor] = {}
        """For each gated branch the gates of all its slots [slots, G, C], in the order of `positions`."""
        try:
            for branch in dict.fromkeys(key.branch for key in keys):
                own = [key for key in keys if key.branch == branch]
                self.positions[branch] = torch.tensor([key.position for key in own], device=device)
                if branch != "cross":
                    self.gates[branch] = torch.empty(len(own), groups, shape[-1], dtype=dtype, device=device)
                for i, key in enumerate(own):
                    value = torch.empty(shape, dtype=dtype, device=device)
                    self._slots[key] = Slot(value, self.gates[branch][i] if branch in self.gates else None)
        except torch.cuda.OutOfMemoryError as error:
            self._slots.clear()
            self.gates.clear()
            size = len(keys) * torch.Size(shape).numel() * dtype.itemsize / 2**30
            raise torch.cuda.OutOfMemoryError(
                f"the broadcast cache needs {size:.1f} GiB: {len(keys)} slots of {list(shape)} {dtype}. "
                "Fewer blocks (spatial_block, temporal_block, cross_block), fewer kinds, fewer frames or a smaller "
                "resolution or batch would shrink it."
            ) from error

    def __getitem__(self, key: SlotKey) -> Slot:
        return self._slots[key]

    def get(self, key: SlotKey) -> Slot | None:
        """The slot, or None where this branch of this block is never broadcast."""
        return self._slots.get(key)

    def __iter__(self) -> Iterator[SlotKey]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots and their gates."""
        values = sum(slot.value.nbytes for slot in self._slots.values())
        return values + sum(gates.nbytes for gates in self.gates.values())

    def invalidate(self) -> None:
        """Forget every slot's content: a new run begins."""
        for slot in self._slots.values():
            slot.valid = False

    def mark_written(self, keys: Iterable[SlotKey]) -> None:
        """Note that this run has written these slots (a replayed graph writes them without running Python)."""
        for key in keys:
            self._slots[key].valid = True

    def require(self, keys: Iterable[SlotKey]) -> None:
        """Raise ValueError if a slot about to be read has not been written in this run."""
        for key in keys:
            if not self._slots[key].valid:
                raise ValueError(f"slot {key.branch} of block {key.position}: read before this run has written it")
