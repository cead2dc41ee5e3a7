"""Where slots lie: on the device, or in pinned host memory behind a few staging tensors."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import psutil
import torch
from torch import Tensor

from pab_kernels.ops import MAX_BRANCHES

STAGES = MAX_BRANCHES
"""Staging tensors on the device. A pass takes at most `MAX_BRANCHES` outputs, so with as many one can always be had."""

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class SlotKey:
    """The slot of branch `branch` ("spatial", "temporal", "cross", "mlp") of the block at `position` in the model."""

    branch: str
    position: int


class SlotStore(Protocol):
    """Hands out the slots' values on the device, within a step: those that the step reads, and those it writes.

    A tensor that is handed out may be used until the next `release`.
    """

    nbytes: int
    """Bytes on the device."""
    host_bytes: int
    """Bytes in host memory."""

    def step(self, reads: Set[SlotKey]) -> AbstractContextManager[object]:
        """One step, which will read the slots `reads`, in the order in which the store was given its keys."""

    def read(self, key: SlotKey) -> Tensor:
        """The value [B, T, S, C] of a slot."""

    def out(self, key: SlotKey) -> Tensor:
        """Where to write the new value of a slot, [B, T, S, C]."""

    def wrote(self, key: SlotKey) -> None:
        """The kernel that writes what `out` gave for this slot has been launched."""

    def release(self) -> None:
        """The kernels that read what was handed out so far have been launched."""


class DeviceSlots:
    """Slots on the device, each in its place: a `SlotStore`.

    Parameters
    ----------
    storage : mapping of SlotKey to int
        The number of the tensor that each slot lies in, from 0.
    shape : (B, T, S, C)
        Of every slot.
    dtype : torch.dtype
    device : torch.device

    Raises
    ------
    torch.cuda.OutOfMemoryError
    """

    host_bytes = 0

    def __init__(self, storage: Mapping[SlotKey, int], shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        values = [torch.empty(shape, dtype=dtype, device=device) for _ in set(storage.values())]
        self._values = {key: values[number] for key, number in storage.items()}
        self.nbytes = sum(value.nbytes for value in values)

    def step(self, reads: Set[SlotKey]) -> AbstractContextManager[object]:
        """Nothing is to be prepared."""
        return nullcontext()

    def read(self, key: SlotKey) -> Tensor:
        """The slot itself."""
        return self._values[key]

    def out(self, key: SlotKey) -> Tensor:
        """The slot itself."""
        return self._values[key]

    def wrote(self, key: SlotKey) -> None:
        """It lies where it belongs."""

    def release(self) -> None:
        """All are the reader's for good."""


@dataclass
class _Stage:
    """A staging tensor; when a load into it has arrived; and when a save from it is over, so that it may be written."""

    value: Tensor
    arrived: torch.cuda.Event | None = None
    saved: torch.cuda.Event | None = None


class HostSlots:
    """Slots in pinned host memory, copied beside the computation: a `SlotStore`.

    Computed outputs are written to a staging tensor and saved from there; slots that the step reads are loaded ahead
    into free ones, in order, at every `release`. All waiting is between streams, so a step can be captured into a CUDA
    graph. A step that reads and writes slots of n bytes in all needs at least the time that n bytes take over PCIe:
    what this costs depends on how much there is to compute meanwhile.

    Parameters
    ----------
    storage, shape, dtype, device
        As for `DeviceSlots`; the device is that of the staging tensors.

    Raises
    ------
    MemoryError
        The host has not enough memory, or it cannot be pinned.
    torch.cuda.OutOfMemoryError
        The staging tensors do not fit on the device.
    """

    def __init__(self, storage: Mapping[SlotKey, int], shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        count = len(set(storage.values()))
        values = _host_memory(count, shape, dtype)
        if device.type == "cuda" and count:
            _pin(values)
            weakref.finalize(self, _unpin, values, device).atexit = False
        self._values = {key: values[number] for key, number in storage.items()}
        self._stages = [_Stage(torch.empty(shape, dtype=dtype, device=device)) for _ in range(min(STAGES, count))]
        self._loads, self._saves = CopyStream(device), CopyStream(device)
        self._free: deque[_Stage] = deque()
        self._ahead: deque[SlotKey] = deque()  # to be loaded, in order
        self._arriving: dict[SlotKey, _Stage] = {}
        self._lent: list[_Stage] = []
        self.nbytes = sum(stage.value.nbytes for stage in self._stages)
        self.host_bytes = values.nbytes

    @contextmanager
    def step(self, reads: Set[SlotKey]) -> Iterator[None]:
        """Starts with all staging tensors free, and ends when the computation has waited for all copies."""
        for stage in self._stages:
            stage.saved = None
        self._free = deque(self._stages)
        self._ahead = deque(key for key in self._values if key in reads)
        self._arriving, self._lent = {}, []
        self._loads.fork()
        self._saves.fork()
        try:
            self._prefetch()
            yield
        finally:
            self._loads.join()
            self._saves.join()

    def read(self, key: SlotKey) -> Tensor:
        """A staging tensor with the slot's value; the computation waits for its copy."""
        if key not in self._arriving:
            self._load()
        stage = self._arriving.pop(key)
        _wait(stage.arrived)
        self._lent.append(stage)
        return stage.value

    def out(self, key: SlotKey) -> Tensor:
        """A free staging tensor."""
        stage = self._free.popleft()
        _wait(stage.saved)
        self._lent.append(stage)
        return stage.value

    def wrote(self, key: SlotKey) -> None:
        """Saves what was written to the latest `out`."""
        stage = self._lent[-1]
        stage.saved = self._saves.copy(self._values[key], stage.value, None)

    def release(self) -> None:
        """Frees what was handed out, and loads ahead."""
        self._free.extend(self._lent)
        self._lent.clear()
        self._prefetch()

    def _prefetch(self) -> None:
        # One staging tensor is left for `out`, which follows a pass, when no other is handed out.
        while self._ahead and self._free and len(self._arriving) < len(self._stages) - 1:
            self._load()

    def _load(self) -> None:
        key, stage = self._ahead.popleft(), self._free.popleft()
        stage.arrived = self._loads.copy(stage.value, self._values[key], stage.saved)
        self._arriving[key] = stage


class CopyStream:
    """Copies between host and device beside the current stream. On a CPU device they are made at once.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fork(self) -> None:
        """Follow all that the current stream was given; in a capture: become part of it."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def join(self) -> None:
        """Let the current stream follow all copies."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def copy(self, to: Tensor, source: Tensor, after: torch.cuda.Event | None) -> torch.cuda.Event | None:
        """Copy after all that the current stream was given, and after `after`; returns the event of its end."""
        if self._stream is None:
            to.copy_(source)
            return None
        self.fork()
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
        return self._stream.record_event()


def _wait(event: torch.cuda.Event | None) -> None:
    """Let the current stream wait for `event`."""
    if event is not None:
        event.wait()


def available_host_memory() -> int:
    """Bytes of host memory that could be had without swapping."""
    return psutil.virtual_memory().available


def _host_memory(count: int, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Host memory [count, B, T, S, C] for `count` slots; MemoryError if there is not enough."""
    size, available = count * math.prod(shape) * dtype.itemsize, available_host_memory()
    if size > available:
        raise MemoryError(f"{_needs(count, shape, dtype)}; {available / 2**30:.1f} GiB are available")
    return torch.empty(count, *shape, dtype=dtype)


def _pin(values: Tensor) -> None:
    """Lock the pages of `values`, so that a GPU copies to and from them by itself.

    Torch's own pinned memory would be rounded up to a power of two, and stay with its allocator for good.
    """
    code = int(torch.cuda.cudart().cudaHostRegister(values.data_ptr(), values.nbytes, 0))
    if code != 0:
        needs = _needs(values.shape[0], values.shape[1:], values.dtype)
        raise MemoryError(f"{needs}; it could not be pinned (CUDA error {code})")


def _unpin(values: Tensor, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # copies may be under way
    torch.cuda.cudart().cudaHostUnregister(values.data_ptr())


def _needs(count: int, shape: Sequence[int], dtype: torch.dtype) -> str:
    size = count * math.prod(shape) * dtype.itemsize / 2**30
    return f"the broadcast cache needs {size:.1f} GiB of host memory for {count} slots of {list(shape)} {dtype}"
