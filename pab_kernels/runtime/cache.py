"""The slots of one run: which exist, what they cost, and which of them the current run has written."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pab_kernels.runtime.slots import DeviceSlots, HostSlots, SlotKey, SlotLayout, SlotStore


def where(asked: torch.device | str | None, own: torch.device) -> torch.device:
    """Where slots lie for `cache_device`: on `own` by default; ValueError for another device than it or the CPU."""
    if asked is None or str(asked) in (own.type, str(own)):
        return own
    if str(asked) == "cpu":
        return torch.device("cpu")
    raise ValueError(f"cache_device: got {str(asked)!r}, must be {own.type} or cpu")


class SlotPool:
    """Slots that caches use in turn, such as those of the two transformers of Wan 2.2, of which one runs at a time.

    Caches with the same slots get the same store, which lives as long as one of them. What it holds belongs to the
    cache that wrote last: to the others it is as if they had written nothing.
    """

    def __init__(self) -> None:
        self._stores: weakref.WeakValueDictionary[Hashable, SlotStore] = weakref.WeakValueDictionary()
        self._owners: weakref.WeakKeyDictionary[SlotStore, weakref.ref[BroadcastCache]] = weakref.WeakKeyDictionary()

    def store(self, key: Hashable, make: Callable[[], SlotStore]) -> SlotStore:
        """The store that is known by `key`, made if there is none."""
        found = self._stores.get(key)
        if found is None:
            found = self._stores[key] = make()
        return found

    def owns(self, cache: BroadcastCache) -> bool:
        """Whether the store's content is what `cache` wrote."""
        owner = self._owners.get(cache.slots)
        return owner is not None and owner() is cache

    def take(self, cache: BroadcastCache) -> None:
        """From here on it is."""
        self._owners[cache.slots] = weakref.ref(cache)


class BroadcastCache:
    """Owns one preallocated slot for every branch that may be broadcast.

    Parameters
    ----------
    storage : mapping of SlotKey to int
        Where slots are needed, in the order in which a step comes to them, and the number of the tensor that each
        lies in; slots that are never alive at the same call may share one. A branch that never broadcasts has none.
    layout : SlotLayout
        Of every slot.
    device : torch.device
    cache_device : torch.device
        Where the slots lie: as `device`, or the CPU for pinned host memory. Gates lie on `device` in any case.
    gated : sequence of SlotKey
        Slots that are kept with the gate of the call that writes them.
    gate_shape : (G, C)
        Of such a gate.
    gate_dtype : torch.dtype, optional
    pool : SlotPool, optional
        Where caches that are not used at the same time find their slots.
    forward : hashable
        The forward of a step that the slots are for: those of another are never shared.

    Attributes
    ----------
    slots : SlotStore
        Hands out the values.
    gates : Tensor
        The gates [slots, G, C] of `gated`, in this order.

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
        layout: SlotLayout,
        device: torch.device,
        cache_device: torch.device,
        gated: Sequence[SlotKey] = (),
        gate_shape: tuple[int, int] = (0, 0),
        gate_dtype: torch.dtype | None = None,
        pool: SlotPool | None = None,
        forward: Hashable = None,
    ) -> None:
        self.storage = dict(storage)
        self._pool = pool
        self.gated = tuple(gated)
        self._holds: dict[int, SlotKey] = {}
        """For each tensor the slot that the current run last wrote to it."""
        cls = DeviceSlots if cache_device.type == device.type else HostSlots

        def make() -> SlotStore:
            return cls(storage, layout, device)

        try:
            self.gates = torch.empty(len(self.gated), *gate_shape, dtype=gate_dtype, device=device)
            key = (forward, cls, tuple(storage.items()), layout, device)
            self.slots: SlotStore = make() if pool is None else pool.store(key, make)
        except torch.cuda.OutOfMemoryError as error:
            self.gates = torch.empty(0)
            count = len(set(storage.values()))
            size = count * layout.nbytes / 2**30
            raise torch.cuda.OutOfMemoryError(
                f"the broadcast cache needs {size:.1f} GiB: {count} slots of {layout}. "
                "Fewer blocks (spatial_block, temporal_block, cross_block), fewer kinds, fewer frames or a smaller "
                "resolution or batch would shrink it; so would slots of one byte an element, or in host memory "
                '(cache_dtype="fp8", cache_device="cpu").'
            ) from error
        self._gate = dict(zip(self.gated, self.gates, strict=True))

    def gate(self, key: SlotKey) -> Tensor | None:
        """The gate [G, C] of the step that wrote a slot, None where none is kept."""
        return self._gate.get(key)

    def __iter__(self) -> Iterator[SlotKey]:
        return iter(self.storage)

    def __len__(self) -> int:
        return len(self.storage)

    @property
    def nbytes(self) -> int:
        """Bytes on the device: slots, or what stands in for those in host memory, and gates."""
        return self.slots.nbytes + self.gates.nbytes

    @property
    def host_bytes(self) -> int:
        """Bytes in pinned host memory."""
        return self.slots.host_bytes

    def invalidate(self) -> None:
        """Forget every slot's content: a new run begins."""
        self._holds.clear()

    def mark_written(self, keys: Iterable[SlotKey]) -> None:
        """Note that this run has written these slots (a replayed graph writes them without running Python).

        A change is one only where the output was there before.
        """
        keys = frozenset(keys)
        if keys and self._pool is not None and not self._pool.owns(self):
            self._holds.clear()
            self._pool.take(self)
        self._holds |= {
            self.storage[key]: key for key in keys if not key.change or self._has(replace(key, change=False))
        }

    def _has(self, key: SlotKey) -> bool:
        return self._holds.get(self.storage[key]) == key

    def require(self, keys: Iterable[SlotKey]) -> None:
        """Raise ValueError if a slot about to be read does not hold what this run has written."""
        mine = self._pool is None or self._pool.owns(self)
        for key in keys:
            if not mine or not self._has(key):
                raise ValueError(f"{key}: read before this run has written it")
