"""Rows between ranks: split along one dimension, joined along another; and what all ranks hold, on each of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from pab_kernels.blocks.sharded import Along
from pab_kernels.ops.copies import copy_beside, copy_rows


class Exchange:
    """Exchanges between the ranks of one axis of a mesh.

    Each beginning is collective: all ranks of the axis make it, in the same order. On a GPU it can be captured into a
    graph, once it was made before.

    Parameters
    ----------
    group : ProcessGroup
    backend : str
        A name of `BACKENDS`.

    Attributes
    ----------
    apart : bool
        Whether rows should move in pieces, one beside the computation of the next.
    calls, sent : int
        How often rows were exchanged, and the bytes that this rank had for others; a replayed graph is not counted.
    """

    def __init__(self, group: Any, backend: str) -> None:
        self.group = group
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)
        self.calls = self.sent = 0
        self.apart = backend != "nccl"  # whose kernels would take multiprocessors from what runs beside
        self._mover = BACKENDS[backend][1](self)

    def buffer(self, name: str, shape: Sequence[int], take: Along, like: Tensor) -> Tensor | None:
        """Where to compute what `begin` is to move, so that it is not copied before; None where that is anywhere.

        Parameters
        ----------
        name : str
            Buffers of different names are apart.
        shape : sequence of int
        take : Along
            As for `begin`: what other ranks have.
        like : Tensor
            Of its dtype, on its device.
        """
        find = getattr(self._mover, "buffer", None)
        return None if find is None else find(name, shape, take, like)

    def begin(
        self, name: str, x: Tensor, give: Along, take: Along, out: Tensor | None = None, *, dense: bool = False
    ) -> Callable[[], Tensor]:
        """Rank r gets its part of x along `give`, from every rank, joined along `take`, beside what is launched next.

        Parameters
        ----------
        name : str
            Of the buffer that x is in, or is copied to where there are buffers. Two exchanges in a row of the same one
            must be of the same x.
        x : Tensor
            Of this rank; along `take` that of rank r has the size ``take.sizes[r]``, all else is alike.
        give, take : Along
        out : Tensor, optional
            Where it goes, at ``take.starts``; the rest stays as it is. None: all of it is new.
        dense : bool
            Return a contiguous tensor; else one with the strides that cost least.

        Returns
        -------
        callable
            Has the current stream wait, and returns `out`, or a tensor of the size ``sum(take.sizes)`` along `take`
            and of this rank's along `give`. To be called once, before the same buffer is computed into again.
        """
        self.calls += 1
        self.sent += x.numel() // x.shape[give.dim] * (sum(give.sizes) - give.sizes[self.rank]) * x.element_size()
        wait = self._mover(name, x, give, take, out)

        def come() -> Tensor:
            y = wait()
            if dense and not y.is_contiguous():
                strided, y = y, y.new_empty(y.shape)
                copy_rows(y, strided)
            return y

        return come

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

    def __call__(self, name: str, x: Tensor, give: Along, take: Along, out: Tensor | None) -> Callable[[], Tensor]:
        dtype, target = x.dtype, out
        if x.element_size() == 1:  # gloo and NCCL know only some of the dtypes of one byte
            x, out = x.view(torch.uint8), None if out is None else out.view(torch.uint8)
        ranks = range(len(give.sizes))
        parts = [_part(x, give, rank).movedim(take.dim, 0) for rank in ranks]
        sizes = [part.numel() for part in parts]
        sent = x.new_empty(sum(sizes))
        for part, place in zip(parts, sent.split(sizes), strict=True):
            copy_rows(place.view(part.shape), part)
        shape = list(parts[self._rank].shape)
        received, row = x.new_empty(sum(take.sizes), *shape[1:]), math.prod(shape[1:])
        counts = [size * row for size in take.sizes]
        work = dist.all_to_all_single(received.view(-1), sent, counts, sizes, group=self._group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            if out is None or target is None:
                return received.movedim(0, take.dim).view(dtype)
            for rank, part in zip(ranks, received.split(take.sizes), strict=True):
                copy_rows(_part(out, take, rank), part.movedim(0, take.dim))
            return target

        return wait


class Symmetric:
    """Symmetric memory: each rank reads its part of what the others have, where it lies, straight into its place.

    It does so on a stream of its own, one exchange after the other, and after a barrier. Nothing is overwritten that
    another rank still reads: before a rank computes into a buffer again, it waits for an exchange of another one, whose
    barrier comes after the others' reading of the first.
    """

    def __init__(self, exchange: Exchange) -> None:
        # Multicast is not needed, and a fault in it takes the GPUs of a host down.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        self._group, self._rank, self._size = exchange.group, exchange.rank, exchange.size
        self._memory: dict[tuple[str, int], tuple[Tensor, Any]] = {}
        self._stream: torch.cuda.Stream | None = None

    def buffer(self, name: str, shape: Sequence[int], take: Along, like: Tensor) -> Tensor:
        """See `Exchange.buffer`. The first time is collective."""
        return self._buffer(name, shape, take, like)[0]

    def _buffer(self, name: str, shape: Sequence[int], take: Along, like: Tensor) -> tuple[Tensor, Any]:
        """And the handle through which this rank reads that of others. As large as that of the rank that has most."""
        count = math.prod(shape)
        key = name, count // take.sizes[self._rank] * max(take.sizes) * like.element_size()
        if key not in self._memory:
            self._memory[key] = self._allocate(key[1], like.device)
        memory, handle = self._memory[key]
        return memory.view(like.dtype)[:count].view(tuple(shape)), handle

    def _allocate(self, nbytes: int, device: torch.device) -> tuple[Tensor, Any]:
        """Memory that the others can read, and the handle."""
        memory = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
        return memory, symmetric_memory.rendezvous(memory, self._group)

    def __call__(self, name: str, x: Tensor, give: Along, take: Along, out: Tensor | None) -> Callable[[], Tensor]:
        place, handle = self._buffer(name, x.shape, take, x)
        if x.data_ptr() != place.data_ptr():
            copy_rows(place, x)
        elif not x.is_contiguous():
            raise ValueError(f"x: strides are {x.stride()}, must be contiguous where it lies in a buffer")
        if out is None:
            shape = list(x.shape)
            shape[take.dim], shape[give.dim] = sum(take.sizes), give.sizes[self._rank]
            out = x.new_empty(shape)
        result, done = out, None
        if not x.is_cuda:
            self._take(handle, place, give, take, out)
        else:
            # First in line, or the barrier would wait for a place behind the blocks of a GEMM that runs beside.
            self._stream = self._stream or torch.cuda.Stream(x.device, priority=-1)
            self._stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(self._stream):
                self._take(handle, place, give, take, out)
                done = self._stream.record_event()

        def wait() -> Tensor:
            copy_rows(_part(result, take, self._rank), _part(place, give, self._rank))  # its own, while others' come
            if done is not None:
                torch.cuda.current_stream(x.device).wait_event(done)
            return result

        return wait

    def _take(self, handle: Any, place: Tensor, give: Along, take: Along, out: Tensor) -> None:
        """This rank's part of what the others have in `place`."""
        handle.barrier(channel=0)
        for step in range(1, self._size):
            peer = (self._rank + step) % self._size  # so that not all read from the same
            shape = list(place.shape)
            shape[take.dim] = take.sizes[peer]
            theirs = handle.get_buffer(peer, shape, place.dtype)
            copy_beside(_part(out, take, peer), _part(theirs, give, self._rank))


def _part(x: Tensor, along: Along, rank: int) -> Tensor:
    return x.narrow(along.dim, along.starts[rank], along.sizes[rank])


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
