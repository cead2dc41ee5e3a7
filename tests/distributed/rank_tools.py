"""Runs of tiny transformers on the ranks of a mesh, each a process on a CPU; many cases for one start of processes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from pab_kernels import Mesh, PABConfig, PABHandle, accelerate
from pab_kernels.blocks import sharded
from tests.family_tools import FAMILIES, PAB, host, prediction
from tests.wan_tools import TEXT, tiny_ltx, tiny_wan

STEPS = [940.0, 820.0, 700.0, 580.0, 460.0, 340.0, 220.0, 50.0]
TIMEOUT = 120


def _broadcast(order: int, **every: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, number in every.items():
        found |= {f"{kind}_broadcast": True, f"{kind}_threshold": (60, 930), f"{kind}_range": number}
        found[f"{kind}_order"] = order
    return found


CONFIGS = {
    "off": PABConfig(),
    "pab": PAB,
    "guidance": PABConfig.from_dict(_broadcast(0, guidance=3, temporal=2, spatial=2)),
    "all": PABConfig.from_dict(
        _broadcast(1, spatial=2, temporal=3, cross=2, mlp=2, stack=3, guidance=2) | {"stack_block": (1, 2)}
    ),
}


@dataclass
class Model:
    """A tiny transformer and its calls: one of both halves, or one for each."""

    transformer: Any
    latents: Tensor
    calls: list[dict[str, Any]]
    """Arguments, of each forward of a step."""
    stamp: Callable[[Tensor, float], Tensor]
    """The timestep argument for these latents."""
    flow: bool = False
    """Whether the runtime takes whole steps of rectified flow."""

    def steps(self, handle: PABHandle) -> Callable[..., Tensor]:
        """After `begin`: from latents and timestep to the latents after the step."""
        if not self.flow:
            return self.step
        step = handle.rectified_flow(self.latents, 3.0, **self.calls[0])
        return lambda latents, t, stop=False: step(latents)

    def step(self, x: Tensor, t: float, stop: bool = False) -> Tensor:
        """The latents after a step of guidance 3; with `stop` only the first forward is called."""
        if len(self.calls) == 1:
            both = torch.cat([x, x])
            out = prediction(self.transformer(both, timestep=self.stamp(both, t), **self.calls[0]))
            second, first = (half[:, : x.shape[1]] if x.ndim == 5 else half for half in out.chunk(2))
        else:
            found = []
            for arguments in self.calls[: 1 if stop else 2]:
                found.append(prediction(self.transformer(x, timestep=self.stamp(x, t), **arguments)))
            first, second = found[0], found[-1]
        return x - 0.1 * (second + 3 * (first - second)).to(x.dtype)


def model(family: str) -> Model:
    """With weights large enough that a difference shows."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def rows(x: Tensor, t: float) -> Tensor:
        return torch.full((len(x),), t)

    if family in FAMILIES:
        made = host(family)
        return Model(made.model, random(1, *made.shape[1:]), [made.given], rows)
    if family.startswith("open_sora"):
        made = host("open_sora")
        mask = torch.ones(2, made.shape[2], dtype=torch.bool)
        mask[:, 0] = False
        given = [made.given | {"x_mask": mask}]
        return Model(made.model, random(1, *made.shape[1:]), given, rows, flow="whole steps" in family)
    if family.startswith("wan"):
        texts = [{"encoder_hidden_states": random(1, 6, TEXT), "return_dict": False} for _ in range(2)]
        latents = random(1, 16, 5, 4, 6)

        def tokens(x: Tensor, t: float) -> Tensor:
            each = torch.full((len(x), 5, 6), t)
            each[:, 0] = 0  # a given frame
            return each.flatten(1)

        if family == "wan":
            return Model(tiny_wan(), latents, texts, rows)
        return Model(tiny_wan(num_attention_heads=3), latents, texts, tokens)  # two heads on one rank, one on the other
    text, size = random(2, 6, TEXT), {"num_frames": 3, "height": 3, "width": 5}
    arguments = {"encoder_hidden_states": text, "encoder_attention_mask": None, "return_dict": False, **size}
    return Model(tiny_ltx(), random(1, 45, 8), [arguments], rows)


MODELS = (*FAMILIES, "open_sora given frames", "open_sora whole steps", "wan", "wan tokens", "ltx")


@dataclass(frozen=True)
class Case:
    """A model with settings on a mesh."""

    family: str
    config: str
    guidance: int = 1
    frames: int = 1

    @property
    def mesh(self) -> Mesh:
        return Mesh(self.guidance, self.frames)

    def __str__(self) -> str:
        return f"{self.family}, {self.config}, {self.mesh}"


@dataclass
class Found:
    """What a rank has of a case: latents after each step, the same after an aborted run, exchanges of the steps."""

    run: Tensor
    again: Tensor
    slots: int
    exchanges: list[tuple[str, bool, tuple[int, int], tuple[int, int]]] = field(default_factory=list)
    """Of each call: variant, whether attention across frames is broadcast, what was planned and what was called."""


@torch.no_grad()
def run(case: Case, *, mesh: bool) -> Found:
    """The case, in this process alone or as one rank of its mesh."""
    made = model(case.family)
    if case.config != "pab":
        sharded.PIECE = 1  # what is as small as this moves in pieces too
    options: dict[str, Any] = {"conditional": "second", "forwards_per_step": len(made.calls)}
    with accelerate(made.transformer, CONFIGS[case.config], mesh=case.mesh if mesh else None, **options) as handle:
        exchanges: list[Any] = []

        def steps(latents: Tensor) -> Tensor:
            handle.begin(STEPS)
            step, found = made.steps(handle), []
            for i, t in enumerate(STEPS):
                before = _count(handle)
                latents = step(latents, t)
                found.append(latents)
                if mesh and case.frames > 1:
                    exchanges.append(_exchanges(handle, i, before, len(made.calls)))
            return torch.stack(found)

        first = steps(made.latents)
        handle.begin(STEPS)
        other, step = made.latents + 1, made.steps(handle)
        for t in STEPS[:3]:
            other = step(other, t)
        step(other, STEPS[3], stop=True)
        again = steps(made.latents)
        return Found(first, again, sum(cache.nbytes for cache in handle.caches), exchanges)


def _count(handle: PABHandle) -> tuple[int, int]:
    found = [each._share.frames for each in handle._shapes.latest if each._share.frames is not None]
    return sum(each.calls for each in found), sum(each.sent for each in found)


def _exchanges(handle: PABHandle, step: int, before: tuple[int, int], forwards: int) -> Any:
    schedule = handle.schedule
    assert schedule is not None
    planned, workspaces = (0, 0), handle._shapes.latest
    for workspace in workspaces:
        variant = workspace.variant(schedule[step])
        if schedule[step].guidance and forwards == 2 and workspace is workspaces[-1] and len(workspaces) == 2:
            continue  # the second forward is left out
        more = workspace.exchanges(variant)
        planned = planned[0] + more[0], planned[1] + more[1]
    variant = schedule[step]
    quiet = variant.temporal if "temporal" in handle._adapter.stack.kinds else variant.spatial
    now = _count(handle)
    return str(variant), quiet, planned, (now[0] - before[0], now[1] - before[1])


def _rank(rank: int, size: int, port: int, folder: str, work: Callable[[], Any], gpus: bool) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    if gpus:
        torch.cuda.set_device(rank)
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    torch.save(work(), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(size: int, work: Callable[[], Any], folder: Path, *, gpus: bool = False) -> list[Any]:
    """What `work`, a function that a new process can import, returns on each of so many ranks: CPU or a GPU each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = size, port, str(folder), work, gpus
    context = mp.start_processes(_rank, arguments, nprocs=size, join=False, start_method="spawn")
    assert context is not None
    try:
        if not context.join(timeout=TIMEOUT):
            while not context.join(timeout=TIMEOUT):
                pass
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]
