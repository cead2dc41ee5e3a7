"""Where slots lie: on the device, or in pinned host memory behind a few staging tensors."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import psutil
import torch
from torch import Tensor

from pab_kernels.blocks.linears import Rows
from pab_kernels.ops import MAX_BRANCHES
from pab_kernels.ops.quantized import LIMITS, Quantized

STAGES = MAX_BRANCHES + 1
"""Staging tensors on the device. A pass takes at most `MAX_BRANCHES` outputs; where one of them is new, it may also
read what its slot held, and write its change."""

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class SlotKey:
    """The slot of a branch: its kind, its block's position in the model, and its number among those of its kind there.

    `kind` is one of `config.BRANCHES`; all but unusual blocks have one branch of each kind, number 0. Or it is "stack":
    what several blocks added to the stream, the last of them at `position`. `lane` tells the slots of one branch apart,
    where it has more than one: see `schedule.MlpVariant`. With `change` it is not the slot of the output but that of
    its change between the last two calls that computed it.
    """

    kind: str
    position: int
    number: int = 0
    lane: int = 0
    change: bool = False

    def at(self, lane: int) -> SlotKey:
        """The slot of the same branch in another lane."""
        return self if lane == self.lane else replace(self, lane=lane)

    @property
    def changed(self) -> SlotKey:
        """The slot of the change of what is in this one."""
        return replace(self, change=True)

    def __str__(self) -> str:
        number = f" ({self.number})" if self.number else ""
        lane = f", slot {self.lane}" if self.lane else ""
        return f"slot {self.kind} of block {self.position}{number}{lane}{', change' if self.change else ''}"


@dataclass(frozen=True)
class SlotLayout:
    """How a slot [B, T, S, C] lies in memory: its elements, and after them a scale a row if they have one byte each."""

    shape: Shape
    dtype: torch.dtype

    @property
    def quantized(self) -> bool:
        """Whether elements have one byte, and rows a scale."""
        return self.dtype in LIMITS

    @property
    def nbytes(self) -> int:
        """Of one slot."""
        scales = 4 * math.prod(self.shape[:3]) if self.quantized else 0
        return self._offset + scales

    @property
    def _offset(self) -> int:
        """Of the scales: elements end where 16 bytes do."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // 16) * 16

    def view(self, memory: Tensor) -> Rows:
        """The slot in `memory`, uint8 [nbytes]."""
        size = math.prod(self.shape) * self.dtype.itemsize
        values = memory[:size].view(self.dtype).view(self.shape)
        if not self.quantized:
            return values
        return Quantized(values, memory[self._offset :].view(torch.float32).view(self.shape[:3]))

    def pieces(self, memory: Tensor, batch: slice | None) -> list[Tensor]:
        """The parts of `memory` that hold the sequences `batch` of a slot; None: all."""
        if batch is None:
            return [memory]
        value = self.view(memory)
        return [value[batch]] if isinstance(value, Tensor) else [value.values[batch], value.row_scale[batch]]

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype}"


def sequences(value: Rows, batch: slice | None) -> Rows:
    """The sequences `batch` of rows [B, T, S, C]; None: all."""
    if batch is None:
        return value
    return value[batch] if isinstance(value, Tensor) else Quantized(value.values[batch], value.row_scale[batch])


class SlotStore(Protocol):
    """Hands out the slots' values on the device, within a step: those that the step reads, and those it writes.

    What is handed out may be used until the next `release`.
    """

    layout: SlotLayout
    nbytes: int
    """Bytes on the device."""
    host_bytes: int
    """Bytes in host memory."""

    def step(self, reads: Set[SlotKey], batch: slice | None = None) -> AbstractContextManager[object]:
        """One step, which will read the slots `reads`, in the order in which the store was given its keys.

        `batch` are the sequences that it runs, None: all. Those of the others stay what they are.
        """

    def read(self, key: SlotKey) -> Rows:
        """The value [B, T, S, C] of a slot, of the step's sequences."""

    def out(self, key: SlotKey) -> Rows:
        """Where to write the new value of a slot, [B, T, S, C], of the step's sequences."""

    def wrote(self, key: SlotKey) -> None:
        """The kernel that writes what `out` or `read` gave for this slot has been launched."""

    def release(self) -> None:
        """The kernels that read what was handed out so far have been launched."""


class DeviceSlots:
    """Slots on the device, each in its place: a `SlotStore`.

    Parameters
    ----------
    storage : mapping of SlotKey to int
        The number of the tensor that each slot lies in, from 0.
    layout : SlotLayout
        Of every slot.
    device : torch.device

    Raises
    ------
    torch.cuda.OutOfMemoryError
    """

    host_bytes = 0

    def __init__(self, storage: Mapping[SlotKey, int], layout: SlotLayout, device: torch.device) -> None:
        self.layout = layout
        values = [_memory(layout, device) for _ in set(storage.values())]
        self._values = {key: layout.view(values[number]) for key, number in storage.items()}
        self.nbytes = sum(value.nbytes for value in values)
        self._batch: slice | None = None

    def step(self, reads: Set[SlotKey], batch: slice | None = None) -> AbstractContextManager[object]:
        """Nothing is to be prepared."""
        self._batch = batch
        return nullcontext()

    def read(self, key: SlotKey) -> Rows:
        """The slot itself."""
        return sequences(self._values[key], self._batch)

    def out(self, key: SlotKey) -> Rows:
        """The slot itself."""
        return sequences(self._values[key], self._batch)

    def wrote(self, key: SlotKey) -> None:
        """It lies where it belongs."""

    def release(self) -> None:
        """All are the reader's for good."""


@dataclass
class _Stage:
    """A staging tensor; when a load into it has arrived; and when a save from it is over, so that it may be written."""

    memory: Tensor
    value: Rows
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
    storage, layout, device
        As for `DeviceSlots`; the device is that of the staging tensors.

    Raises
    ------
    MemoryError
        The host has not enough memory, or it cannot be pinned.
    torch.cuda.OutOfMemoryError
        The staging tensors do not fit on the device.
    """

    def __init__(self, storage: Mapping[SlotKey, int], layout: SlotLayout, device: torch.device) -> None:
        self.layout = layout
        count = len(set(storage.values()))
        values = _host_memory(count, layout)
        if device.type == "cuda" and count:
            _pin(values, layout)
            weakref.finalize(self, _unpin, values, device).atexit = False
        self._values = {key: values[number] for key, number in storage.items()}
        memory = [_memory(layout, device) for _ in range(min(STAGES, count))]
        self._stages = [_Stage(each, layout.view(each)) for each in memory]
        self._loads, self._saves = CopyStream(device), CopyStream(device)
        self._free: deque[_Stage] = deque()
        self._ahead: deque[SlotKey] = deque()  # to be loaded, in order
        self._arriving: dict[SlotKey, _Stage] = {}
        self._lent: dict[SlotKey, _Stage] = {}
        self._batch: slice | None = None
        self.nbytes = sum(stage.memory.nbytes for stage in self._stages)
        self.host_bytes = values.nbytes

    @contextmanager
    def step(self, reads: Set[SlotKey], batch: slice | None = None) -> Iterator[None]:
        """Starts with all staging tensors free, and ends when the computation has waited for all copies."""
        for stage in self._stages:
            stage.saved = None
        self._free = deque(self._stages)
        self._ahead = deque(key for key in self._values if key in reads)
        self._arriving, self._lent, self._batch = {}, {}, batch
        self._loads.fork()
        self._saves.fork()
        try:
            self._prefetch()
            yield
        finally:
            self._loads.join()
            self._saves.join()

    def read(self, key: SlotKey) -> Rows:
        """A staging tensor with the slot's value; the computation waits for its copy."""
        if key not in self._arriving:
            self._load()
        stage = self._lent[key] = self._arriving.pop(key)
        _wait(stage.arrived)
        return sequences(stage.value, self._batch)

    def out(self, key: SlotKey) -> Rows:
        """A free staging tensor."""
        stage = self._lent[key] = self._free.popleft()
        _wait(stage.saved)
        return sequences(stage.value, self._batch)

    def wrote(self, key: SlotKey) -> None:
        """Saves it."""
        stage = self._lent[key]
        stage.saved = self._copy(self._saves, self._values[key], stage.memory, None)

    def release(self) -> None:
        """Frees what was handed out, and loads ahead."""
        self._free.extend(self._lent.values())
        self._lent.clear()
        self._prefetch()

    def _prefetch(self) -> None:
        # One staging tensor is left for `out`, which follows a pass, when no other is handed out.
        while self._ahead and self._free and len(self._arriving) < len(self._stages) - 1:
            self._load()

    def _load(self) -> None:
        key, stage = self._ahead.popleft(), self._free.popleft()
        stage.arrived = self._copy(self._loads, stage.memory, self._values[key], stage.saved)
        self._arriving[key] = stage

    def _copy(
        self, stream: CopyStream, to: Tensor, source: Tensor, after: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        """Copy the step's sequences of a slot."""
        for pair in zip(self.layout.pieces(to, self._batch), self.layout.pieces(source, self._batch), strict=True):
            after = stream.copy(*pair, after)
        return after


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


def _memory(layout: SlotLayout, device: torch.device) -> Tensor:
    return torch.empty(layout.nbytes, dtype=torch.uint8, device=device)


def _host_memory(count: int, layout: SlotLayout) -> Tensor:
    """Host memory [count, nbytes] for `count` slots; MemoryError if there is not enough."""
    size, available = count * layout.nbytes, available_host_memory()
    if size > available:
        raise MemoryError(f"{_needs(count, layout)}; {available / 2**30:.1f} GiB are available")
    return torch.empty(count, layout.nbytes, dtype=torch.uint8)


def _pin(values: Tensor, layout: SlotLayout) -> None:
    """Lock the pages of `values`, so that a GPU copies to and from them by itself.

    Torch's own pinned memory would be rounded up to a power of two, and stay with its allocator for good.
    """
    code = int(torch.cuda.cudart().cudaHostRegister(values.data_ptr(), values.nbytes, 0))
    if code != 0:
        raise MemoryError(f"{_needs(len(values), layout)}; it could not be pinned (CUDA error {code})")


def _unpin(values: Tensor, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # copies may be under way
    torch.cuda.cudart().cudaHostUnregister(values.data_ptr())


def _needs(count: int, layout: SlotLayout) -> str:
    size = count * layout.nbytes / 2**30
    return f"the broadcast cache needs {size:.1f} GiB of host memory for {count} slots of {layout}"
