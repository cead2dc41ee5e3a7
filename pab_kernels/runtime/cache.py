"""The slots of one run: which exist, what they cost, and which of them the current run has written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from pab_kernels.runtime.slots import DeviceSlots, HostSlots, Shape, SlotKey, SlotLayout, SlotStore


class BroadcastCache:
    """Owns one preallocated slot for every (block, branch) that may be broadcast.

    Parameters
    ----------
    storage : mapping of SlotKey to int
        Where slots are needed, in the order in which a step comes to them, and the number of the tensor that each
        lies in; slots that are never alive at the same call may share one. A branch that never broadcasts has none.
    shape : (B, T, S, C)
        Of every slot.
    groups : int
        Rows G of a gate [G, C].
    dtype : torch.dtype
        Of the gates, and of the slots if `slot_dtype` is None.
    device : torch.device
    cache_device : torch.device
        Where the slots lie: as `device`, or the CPU for pinned host memory. Gates lie on `device` in any case.
    slot_dtype : torch.dtype, optional
        float8_e4m3fn or int8: slots of one byte an element, with a scale a row.

    Attributes
    ----------
    slots : SlotStore
        Hands out the values.
    positions : dict
        For each branch the positions of its blocks, int64 on the device.
    gates : dict
        For each gated branch the gates of all its slots [slots, G, C], in the order of `positions`.

    Raises
    ------
    torch.cuda.OutOfMemoryError
        With the GiB that the cache needs, for which shape, and what would shrink it.
    MemoryError
        The host's memory does not suffice.
    """

    def __init__(
        self,
        storage: Mapping[SlotKey, int],
        shape: Shape,
        groups: int,
        dtype: torch.dtype,
        device: torch.device,
        cache_device: torch.device,
        slot_dtype: torch.dtype | None = None,
    ) -> None:
        layout = SlotLayout(shape, slot_dtype or dtype)
        self.storage = dict(storage)
        self.positions: dict[str, Tensor] = {}
        self.gates: dict[str, Tensor] = {}
        self._gate: dict[SlotKey, Tensor] = {}
        self._holds: dict[int, SlotKey] = {}
        """For each tensor the slot that the current run last wrote to it."""
        store = DeviceSlots if cache_device.type == device.type else HostSlots
        try:
            for branch in dict.fromkeys(key.branch for key in storage):
                own = [key for key in storage if key.branch == branch]
                self.positions[branch] = torch.tensor([key.position for key in own], device=device)
                if branch != "cross":
                    self.gates[branch] = torch.empty(len(own), groups, shape[-1], dtype=dtype, device=device)
                    self._gate |= zip(own, self.gates[branch], strict=True)
            self.slots: SlotStore = store(storage, layout, device)
        except torch.cuda.OutOfMemoryError as error:
            self.gates.clear()
            self._gate.clear()
            count = len(set(storage.values()))
            size = count * layout.nbytes / 2**30
            raise torch.cuda.OutOfMemoryError(
                f"the broadcast cache needs {size:.1f} GiB: {count} slots of {layout}. "
                "Fewer blocks (spatial_block, temporal_block, cross_block), fewer kinds, fewer frames or a smaller "
                "resolution or batch would shrink it; so would slots of one byte an element, or in host memory "
                '(cache_dtype="fp8", cache_device="cpu").'
            ) from error

    def gate(self, key: SlotKey) -> Tensor | None:
        """The gate [G, C] of the step that wrote a slot, None where the branch has none."""
        return self._gate.get(key)

    def __iter__(self) -> Iterator[SlotKey]:
        return iter(self.storage)

    def __len__(self) -> int:
        return len(self.storage)

    @property
    def nbytes(self) -> int:
        """Bytes on the device: slots, or what stands in for those in host memory, and gates."""
        return self.slots.nbytes + sum(gates.nbytes for gates in self.gates.values())

    @property
    def host_bytes(self) -> int:
        """Bytes in pinned host memory."""
        return self.slots.host_bytes

    def invalidate(self) -> None:
        """Forget every slot's content: a new run begins."""
        self._holds.clear()

    def mark_written(self, keys: Iterable[SlotKey]) -> None:
        """Note that this run has written these slots (a replayed graph writes them without running Python)."""
        self._holds |= {self.storage[key]: key for key in keys}

    def require(self, keys: Iterable[SlotKey]) -> None:
        """Raise ValueError if a slot about to be read does not hold what this run has written."""
        for key in keys:
            if self._holds.get(self.storage[key]) != key:
                raise ValueError(f"slot {key.branch} of block {key.position}: read before this run has written it")
