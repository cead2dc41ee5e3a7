"""What a run costs on a mesh of GPUs, computed from shapes and rates, and which mesh costs least.

A prediction, not a measurement: every rank computes as fast as one GPU does on all of it, and exchanges neither overlap
nor wait for each other.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from pab_kernels.blocks.block import BlockStack
from pab_kernels.blocks.self_attention import SelfAttention
from pab_kernels.blocks.sharded import Shards, near_even
from pab_kernels.config import PABConfig
from pab_kernels.distributed.mesh import AXES, Mesh
from pab_kernels.measure.floor import Ceilings, computed_branches, step_work
from pab_kernels.models import checkpoints
from pab_kernels.pipelines.demo import CONFIG_NAME, WEIGHTS, parts
from pab_kernels.pipelines.generate import DEFAULTS, Request
from pab_kernels.pipelines.loading import Source
from pab_kernels.pipelines.memory import TEXT_LENGTHS, ModelShape, PlannedRun
from pab_kernels.pipelines.sizes import VideoSize, plan_config
from pab_kernels.schedule import Schedule, StepVariant

H200 = Ceilings(flops=610e12, bandwidth=4.25e12, fp8_flops=940e12)
"""What whole runs reach, not what their GEMMs alone do.

So computed, runs with PAB that were measured on one NVIDIA H200 (PyTorch 2.11+cu130) come out within 4 % (Open-Sora at
360p, 480p and 480p 8 s, and Latte, in bfloat16 and fp8), and those of Open-Sora-Plan 1.2 within 11 %.
"""


@dataclass(frozen=True)
class Link:
    """What an exchange takes in a CUDA graph: `latency` seconds, and its bytes over `rate`, one way in bytes/s."""

    latency: float
    rate: float

    def seconds(self, nbytes: float) -> float:
        """Of one exchange in which a rank sends `nbytes`."""
        return self.latency + nbytes / self.rate


LINKS = {"nccl": Link(28e-6, 208e9), "symmetric": Link(10e-6, 262e9)}
"""By backend, with what packs and places the rows.

Fitted to the two exchanges around one attention, of Open-Sora at 480p and of Open-Sora-Plan 1.2 and batches of 1 and 2,
as they were measured between two NVIDIA H200s on NVLink (PyTorch 2.11+cu130).
"""


@dataclass(frozen=True)
class MeshCost:
    """Computed seconds of a run on a mesh: of the rank that has most, and of the exchanges, with the bytes it sends."""

    mesh: Mesh
    steps: int
    compute: float
    exchanges: float
    nbytes: int

    @property
    def seconds(self) -> float:
        """Of the run."""
        return self.compute + self.exchanges


def most_parts(stack: BlockStack, shape: Sequence[int]) -> int:
    """Over how many ranks the frames of a stream of `shape` (B, T, S, C) can be split.

    Ranks that share a sequence split what is attended to apart: tokens of a frame, or heads.
    """
    most = shape[1]
    for block in stack.blocks:
        for branch in block.branches:
            weights = branch.weights
            if isinstance(weights, SelfAttention) and weights.sequence != "spatial":
                most = min(most, weights.heads if weights.sequence == "full" else shape[2])
    return most


def meshes(gpus: int, most: int, guided: bool) -> list[Mesh]:
    """All meshes of `gpus` ranks for a stream whose frames at most so many can share, guidance first.

    Raises
    ------
    ValueError
        There is none.
    """
    halves = [count for count in (2, 1) if gpus % count == 0 and (guided or count == 1)]
    found = [Mesh(count, gpus // count) for count in halves if gpus // count <= most]
    if not found:
        halved = "two halves of guidance" if guided else "no guidance"
        fit = f"at most {most}" + (f", or even and at most {2 * most}" if guided else "")
        raise ValueError(f"gpus: got {gpus}, over which frames and {halved} cannot be split, must be {fit}")
    return found


def run_cost(
    mesh: Mesh,
    stack: BlockStack,
    schedule: Schedule,
    shape: tuple[int, int, int, int],
    text: int,
    ceilings: Ceilings = H200,
    link: Link | None = None,
) -> MeshCost:
    """What a run costs on a mesh.

    Parameters
    ----------
    mesh : Mesh
    stack : BlockStack
        Only shapes and dtype of its weights are read.
    schedule : Schedule
    shape : (B, T, S, C)
        Of the whole stream; both halves of guidance in B.
    text : int
        Text tokens that count.
    ceilings, link
        What a GPU reaches, and an exchange; by default that of the mesh's backend.
    """
    link = LINKS.get(mesh.backend or "", LINKS["symmetric"]) if link is None else link
    compute = exchanges = 0.0
    total = 0
    for variant, count in Counter(schedule).items():
        work = step_work(stack, schedule, variant, shape, text)
        seconds = work.seconds(ceilings, fp8=schedule.config.linear_precision is not None)
        sent = sent_bytes(mesh, stack, schedule, variant, shape)
        compute += count * seconds * share(mesh, shape, variant)
        exchanges += count * (sum(map(link.seconds, sent)) + gathers(mesh) * link.latency)
        total += count * sum(sent)
    return MeshCost(mesh, len(schedule), compute, exchanges, total)


def share(mesh: Mesh, shape: Sequence[int], variant: StepVariant) -> float:
    """What the rank that has most does of a step: guidance that is broadcast leaves the other half's ranks idle."""
    frames = -(-shape[1] // mesh.frames) / shape[1]
    return frames if variant.guidance else frames / mesh.guidance


def gathers(mesh: Mesh) -> int:
    """How often a step gathers its prediction: once along each axis."""
    return (mesh.guidance > 1) + (mesh.frames > 1)


def sent_bytes(
    mesh: Mesh, stack: BlockStack, schedule: Schedule, variant: StepVariant, shape: Sequence[int]
) -> list[int]:
    """Bytes that rank 0 sends in each exchange of attention in a step; none where that is broadcast, or not split."""
    if mesh.frames == 1:
        return []
    batch, frames, tokens, channels = shape
    rows = 1 if variant.guidance else mesh.guidance
    batch = -(-batch // (2 if variant.guidance else rows))
    sizes = near_even(frames, mesh.frames)
    local = (batch, sizes[0], tokens, channels)
    together: Any = SimpleNamespace(apart=False)  # as `LINKS` are fitted; nothing is exchanged
    shards = Shards(sizes, 0, together)
    fp8 = schedule.config.linear_precision is not None
    return [
        nbytes
        for branch in computed_branches(stack, schedule, variant)
        for nbytes in branch.weights.sent(local, shards, stack.dtype.itemsize, fp8)
    ]


def chosen_mesh(source: Source, request: Request, config: PABConfig | None, gpus: int, text: str | None) -> Mesh:
    """The mesh of a request: what ``--mesh`` says, or the one of `gpus` ranks that costs least.

    Raises
    ------
    ValueError
        As `parse_mesh`, or there is no mesh of so many ranks, or the frames cannot be split as asked.
    """
    if gpus == 1:
        return parse_mesh(text, gpus) or Mesh()
    host = _describe(source, request.size)
    side = getattr(host.config, "sample_size", 0)
    own = VideoSize(0, 0, 0, (getattr(host.config, "video_length", 1), side, side))  # the demo's, in pixels
    rows = len(request.prompts) * (2 if request.guidance > 1 else 1)
    run = PlannedRun(source.family, request.size or own, config or PABConfig(), rows)
    return costs_of(run, ModelShape.of_host(host), gpus, text, request.steps, request.guidance > 1)[0].mesh


def _describe(source: Source, size: VideoSize | None) -> Any:
    """The transformer of `source` without its weights, on the meta device; of a Latte pipeline the released one."""
    if source.family != "demo":
        return checkpoints.build(source.family, **plan_config(source.family, size))
    with torch.device("meta"):
        return parts((WEIGHTS if source.model == "demo" else Path(source.model)) / CONFIG_NAME)[0]


def costs_of(
    run: PlannedRun,
    model: ModelShape,
    gpus: int,
    text: str | None = None,
    steps: int | None = None,
    guided: bool = True,
) -> list[MeshCost]:
    """What a run costs on the mesh that ``--mesh`` says, or on each of `gpus` ranks, the cheapest first.

    Timesteps are taken to be spaced evenly; `steps` are by default the family's.

    Raises
    ------
    ValueError
        As `parse_mesh`, or there is no mesh of so many ranks, or the frames cannot be split as asked.
    """
    steps = steps or (DEFAULTS[run.family].steps if run.family in DEFAULTS else 50)
    schedule = Schedule(run.config, [1000 * (1 - i / steps) for i in range(steps)])
    batch, frames, tokens, channels = model.shape(dataclasses.replace(run, mesh=Mesh()))
    shape = (batch * run.forwards, frames, tokens, channels)
    asked = parse_mesh(text, gpus)
    most = most_parts(model.stack, shape)
    if asked is not None and asked.frames > most:
        raise ValueError(f"mesh: got frames={asked.frames}, must be at most {most} for this model and size")
    found = meshes(gpus, most, guided) if asked is None else [asked]
    costs = [run_cost(mesh, model.stack, schedule, shape, TEXT_LENGTHS.get(run.family, 16)) for mesh in found]
    return sorted(costs, key=lambda cost: cost.seconds)


def parse_mesh(text: str | None, gpus: int) -> Mesh | None:
    """The mesh of ``--mesh guidance=2,frames=4`` (and maybe ``backend=nccl``); None where that is not given.

    Raises
    ------
    ValueError
        Something else, an axis twice, or a mesh of another number of ranks.
    """
    if text is None:
        return None
    parts = text.replace(" ", "").split(",")
    axes = dict(part.partition("=")[::2] for part in parts)
    backend = axes.pop("backend", None)
    if (
        len(axes) + (backend is not None) < len(parts)
        or not axes.keys() <= set(AXES)
        or not all(value.isdecimal() for value in axes.values())
    ):
        raise ValueError(f"mesh: got {text!r}, must be such as guidance=2,frames={max(1, gpus // 2)}")
    mesh = Mesh(int(axes.get("guidance", 1)), int(axes.get("frames", 1)), backend)
    if mesh.size != gpus:
        raise ValueError(f"mesh: got {text!r}, which are {mesh.size} ranks, must be {gpus}, as --gpus says")
    return mesh
