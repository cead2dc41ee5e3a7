"""The mesh of ranks that run one video together, and this rank's place in it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from pab_kernels.distributed.exchange import BACKENDS, Exchange, choose

AXES = ("guidance", "frames")

_JOINED: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()
"""Torch's meshes of each process group: what one costs in memory, it costs once."""


@dataclass(frozen=True)
class Mesh:
    """How many ranks split a call, and along what: a pure description, the same on every rank.

    Every rank runs the same pipeline on the same prompts and seeds; what is around the transformer happens on all of
    them alike, and what the transformer returns is the same everywhere. Rank ``g * frames + f`` holds half g of
    guidance and share f of the frames.

    Parameters
    ----------
    guidance : {1, 2}
        2 gives each half of guidance ranks of its own: of the batch, where both are one call, else of the two calls.
    frames : int
        In so many parts the latent frames are split (or the tokens, where a video is one sequence of them), near even.
        A temporal or full attention that is computed exchanges rows between ranks; one that is broadcast does not.
    backend : {"symmetric", "nccl", "gloo"}, optional
        What exchanges them, instead of the first of `exchange.BACKENDS` that serves the device.

    Raises
    ------
    TypeError, ValueError
        A number that is none, or out of range; an unknown backend.
    """

    guidance: int = 1
    frames: int = 1
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in AXES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: got {value!r}, must be an integer")
        if self.guidance not in (1, 2):
            raise ValueError(f"guidance: got {self.guidance}, must be 1 or 2: it has two halves")
        if self.frames < 1:
            raise ValueError(f"frames: got {self.frames}, must be at least 1")
        if self.backend is not None and self.backend not in BACKENDS:
            raise ValueError(f"backend: got {self.backend!r}, must be one of {', '.join(BACKENDS)}")

    @property
    def size(self) -> int:
        """Ranks."""
        return self.guidance * self.frames

    def __str__(self) -> str:
        backend = "" if self.backend is None else f",backend={self.backend}"
        return f"guidance={self.guidance},frames={self.frames}{backend}"

    def join(self, device: torch.device) -> Ranks | None:
        """This rank's place, in the process group that there is; None for a mesh of one. All ranks call it together.

        Raises
        ------
        ValueError
            There is no process group, it has another size, or the backend does not serve the device.
        """
        if self.size == 1:
            return None
        start = f"start it with `torchrun --nproc-per-node {self.size}` or `pab generate --gpus {self.size}`"
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(f"mesh: {self} takes {self.size} ranks, but there is no process group: {start}")
        if dist.get_world_size() != self.size:
            raise ValueError(f"mesh: {self} takes {self.size} ranks, but there are {dist.get_world_size()}: {start}")
        meshes = _JOINED.setdefault(dist.group.WORLD, {})
        key = (device.type, self.guidance, self.frames)
        if key not in meshes:
            meshes[key] = init_device_mesh(device.type, (self.guidance, self.frames), mesh_dim_names=AXES)
        groups = {name: meshes[key].get_group(name) for name in AXES if getattr(self, name) > 1}
        places = divmod(dist.get_rank(), self.frames)
        return Ranks(self, places[0], places[1], device, choose(self.backend, device), groups)


@dataclass(frozen=True)
class Ranks:
    """The ranks of a mesh from the view of one of them: its place on both axes, and their process groups."""

    mesh: Mesh
    guidance: int
    frames: int
    device: torch.device
    backend: str
    groups: dict[str, Any]
    """Of the axes that have more than one rank."""

    def exchange(self, axis: str) -> Exchange:
        """A new exchange along an axis of more than one rank."""
        return Exchange(self.groups[axis], self.backend)

    def agree(self, find: Callable[[], Any]) -> Any:
        """What rank 0 finds, on every rank; only there it is looked for. All ranks call it together."""
        found = [find() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def check_alike(self, name: str, *tensors: Tensor) -> None:
        """Raise ValueError, on every rank, if one has other values in `tensors`. Waits for the device."""
        sums = [tensor.double().sum() for tensor in tensors] + [tensor.double().square().sum() for tensor in tensors]
        mine = torch.stack(sums).to(self.device).nan_to_num()
        every = [torch.empty_like(mine) for _ in range(self.mesh.size)]
        dist.all_gather(every, mine)
        if not all(torch.equal(each, every[0]) for each in every):
            raise ValueError(
                f"{name}: differ between the ranks of the mesh, must be the same on all: give each the same prompts, "
                "settings and seed, and the sampler a generator"
            )
