"""Rows between ranks: split along one dimension, joined along another; and what all ranks hold, on each of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor


class Exchange:
    """Exchanges between the ranks of one axis of a mesh.

    Each call is collective: all ranks of the axis make it, in the same order. On a GPU it can be captured into a graph,
    once it was made before.

    Parameters
    ----------
    group : ProcessGroup
    backend : str
        A name of `BACKENDS`.

    Attributes
    ----------
    calls, sent : int
        How often rows were exchanged, and the bytes that this rank had for others; a replayed graph is not counted.
    """

    def __init__(self, group: Any, backend: str) -> None:
        self.group = group
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)
        self.calls = self.sent = 0
        self._mover = BACKENDS[backend][1](self)

    def buffer(
        self, name: str, shape: Sequence[int], largest: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor | None:
        """Where to compute what is to be exchanged, so that it is not copied before; None where that is anywhere.

        Parameters
        ----------
        name : str
            Buffers of different names are apart.
        shape : sequence of int
        largest : int
            The number of elements on the rank that has most.
        dtype : torch.dtype
        device : torch.device
        """
        find = getattr(self._mover, "buffer", None)
        return None if find is None else find(name, shape, largest, dtype, device)

    def __call__(
        self, x: Tensor, split: int, join: int, splits: Sequence[int], joins: Sequence[int], *, dense: bool = False
    ) -> Tensor:
        """Rank r gets part r of x along `split`, of size ``splits[r]``, from every rank, joined along `join`.

        Parameters
        ----------
        x : Tensor
            Of this rank; along `join` that of rank r has the size ``joins[r]``, all else is alike.
        dense : bool
            Return a contiguous tensor; else one with the strides that cost least.

        Returns
        -------
        Tensor
            Along `join` of size ``sum(joins)``, along `split` of this rank's.
        """
        self.calls += 1
        self.sent += (x.numel() - x.numel() // x.shape[split] * splits[self.rank]) * x.element_size()
        y = self._mover(x, split, join, tuple(splits), tuple(joins))
        if dense and not y.is_contiguous():
            strided, y = y, y.new_empty(y.shape)
            copy_rows(y, strided)
        return y

    def gather(self, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        """What all ranks hold, joined along `dim`, on every rank; that of rank r has the size ``sizes[r]``."""
        largest = max(sizes)
        mine = x.movedim(dim, 0)
        padded = mine.new_zeros(largest, *mine.shape[1:])
        padded[: len(mine)] = mine
        every = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(every, padded, group=self.group)
        return torch.cat([each[:size] for each, size in zip(every, sizes, strict=True)]).movedim(0, dim)


class AllToAll:
    """torch.distributed's all-to-all: parts are packed, and lie in the result one after the other as they came."""

    def __init__(self, exchange: Exchange) -> None:
        self._group, self._rank = exchange.group, exchange.rank

    def __call__(self, x: Tensor, split: int, join: int, splits: tuple[int, ...], joins: tuple[int, ...]) -> Tensor:
        parts = [part.movedim(join, 0) for part in x.split(splits, split)]
        sent = x.new_empty(x.numel())
        for part, place in zip(parts, sent.split([part.numel() for part in parts]), strict=True):
            copy_rows(place.view(part.shape), part)
        shape = list(parts[self._rank].shape)
        row = math.prod(shape[1:])
        received = x.new_empty(sum(joins), *shape[1:])
        dist.all_to_all_single(
            received.view(-1),
            sent,
            [size * row for size in joins],
            [part.numel() for part in parts],
            group=self._group,
        )
        return received.movedim(0, join)


class Symmetric:
    """Symmetric memory: each rank reads its part of what the others have, where it lies, straight into its place.

    A barrier comes before the reading. Nothing is overwritten that another rank still reads as long as two exchanges in
    a row are of different buffers, as they are around attention: the second one's barrier comes after the reading of
    the first.
    """

    def __init__(self, exchange: Exchange) -> None:
        # Multicast is not needed, and a fault in it takes the GPUs of a host down.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        self._group, self._rank, self._size = exchange.group, exchange.rank, exchange.size
        self._memory: dict[tuple[str, int], tuple[Tensor, Any]] = {}
        self._beside: torch.cuda.Stream | None = None

    def buffer(self, name: str, shape: Sequence[int], largest: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Exchange.buffer`. The first time is collective."""
        key = name, largest * dtype.itemsize
        if key not in self._memory:
            self._memory[key] = self._allocate(key[1], device)
        return self._memory[key][0].view(dtype)[: math.prod(shape)].view(tuple(shape))

    def _allocate(self, nbytes: int, device: torch.device) -> tuple[Tensor, Any]:
        """Memory that the others can read, and the handle through which this rank reads theirs."""
        memory = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
        return memory, symmetric_memory.rendezvous(memory, self._group)

    def __call__(self, x: Tensor, split: int, join: int, splits: tuple[int, ...], joins: tuple[int, ...]) -> Tensor:
        handle = next((each for memory, each in self._memory.values() if memory.data_ptr() == x.data_ptr()), None)
        if handle is None:
            largest = x.numel() // x.shape[join] * max(joins)
            place = self.buffer("attended", x.shape, largest, x.dtype, x.device)
            copy_rows(place, x)
            handle = self._memory["attended", largest * x.element_size()][1]
        elif not x.is_contiguous():
            raise ValueError(f"x: strides are {x.stride()}, must be contiguous where it lies in a buffer")
        shape = list(x.shape)
        shape[join], shape[split] = sum(joins), splits[self._rank]
        out, start, starts = x.new_empty(shape), sum(splits[: self._rank]), [0, *accumulate(joins)]

        def take(peer: int, theirs: Tensor) -> None:
            copy_rows(out.narrow(join, starts[peer], joins[peer]), theirs.narrow(split, start, splits[self._rank]))

        if x.is_cuda and self._beside is None:
            self._beside = torch.cuda.Stream(x.device)
        with nullcontext() if self._beside is None else _forked(self._beside):
            take(self._rank, x)  # its own, while the others' come over the links
        handle.barrier(channel=0)
        for step in range(1, self._size):
            peer = (self._rank + step) % self._size  # so that not all read from the same
            theirs = list(x.shape)
            theirs[join] = joins[peer]
            take(peer, handle.get_buffer(peer, theirs, x.dtype))
        if self._beside is not None:
            torch.cuda.current_stream(x.device).wait_stream(self._beside)
        return out


@contextmanager
def _forked(stream: torch.cuda.Stream) -> Iterator[None]:
    """On another stream, after what the current one was given."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield


def copy_rows(to: Tensor, source: Tensor) -> None:
    """Copy, 8 bytes at a time where the layouts allow it: torch moves strided tensors element by element."""
    pair = [to, source]
    per = 8 // to.element_size()
    wide = all(
        tensor.ndim > 0
        and tensor.stride(-1) == 1
        and not (tensor.shape[-1] % per or tensor.storage_offset() % per or any(s % per for s in tensor.stride()[:-1]))
        for tensor in pair
    )
    if per > 1 and wide:
        to, source = (tensor.view(torch.int64) for tensor in pair)
    to.copy_(source)


def _no_gloo(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "the tensors are not on a CPU"


def _no_gpu(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "the tensors are not on a GPU"


def _no_symmetric(device: torch.device) -> str | None:
    """Every rank reads the memory of all others, and so must be a GPU that this one can reach."""
    if device.type != "cuda":
        return "the tensors are not on a GPU"
    ranks, visible = dist.get_world_size(), torch.cuda.device_count()
    if int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) < ranks:
        return "some ranks are on other machines"
    if ranks > visible:
        return f"{ranks} ranks are more than the {visible} GPUs that this one sees"
    own = torch.cuda.current_device() if device.index is None else device.index
    if all(other == own or torch.cuda.can_device_access_peer(own, other) for other in range(ranks)):
        return None
    return f"GPU {own} cannot read the memory of all others"


BACKENDS: dict[str, tuple[Callable[[torch.device], str | None], Callable[[Exchange], Any]]] = {
    "symmetric": (_no_symmetric, Symmetric),
    "nccl": (_no_gpu, AllToAll),
    "gloo": (_no_gloo, AllToAll),
}
"""Best first: why a backend cannot serve a device (None: it can), and what moves the rows."""


def choose(backend: str | None, device: torch.device) -> str:
    """The backend that is asked for, or the first that serves the device; ValueError if none does."""
    reasons = {name: why_not(device) for name, (why_not, _) in BACKENDS.items() if backend in (None, name)}
    found = next((name for name, reason in reasons.items() if reason is None), None)
    if found is None:
        raise ValueError(f"backend: got {backend!r}: {'; '.join(filter(None, reasons.values()))}, which is {device}")
    return found
