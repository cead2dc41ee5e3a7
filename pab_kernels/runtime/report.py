"""What a run did: calls, cache, graphs and the time of each step variant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pab_kernels import clock
from pab_kernels.runtime.precision import count_fp8
from pab_kernels.runtime.shapes import Shapes
from pab_kernels.runtime.workspace import Workspace
from pab_kernels.schedule import StepVariant


@dataclass
class Report:
    """What a handle's latest run did."""

    calls: int
    computed: dict[str, int]
    broadcast: dict[str, int]
    slots: int
    cache_bytes: int
    """On the transformer's device."""
    host_bytes: int
    """Of slots in pinned host memory."""
    fp8: dict[str, int]
    """In how many blocks each layer runs in fp8."""
    graphs: int
    """CUDA graphs that there are, of all shapes that are kept."""
    captured: int
    """CUDA graphs captured since `accelerate`: more than `graphs` where shapes were dropped for others."""
    shapes: int
    """Shapes of call that slots and graphs are kept for."""
    eager: str | None
    """Why steps run without CUDA graphs, None where they have them."""
    seconds: dict[str, tuple[int, float]]
    """For each variant: how many steps ran, and the seconds they took together."""
    exchanges: dict[str, tuple[int, int]] = field(default_factory=dict)
    """For each variant on a mesh that splits frames: how often a step's attention exchanges rows with other ranks, and
    the bytes that this one sends."""

    @classmethod
    def of(cls, done: Sequence[tuple[StepVariant, Any, Any]], kinds: Sequence[str], shapes: Shapes) -> Report:
        """Of the calls of a run, each with its marks in time, and of what is kept. Waits for the device."""
        seconds: dict[str, tuple[int, float]] = {}
        for variant, start, end in done:
            count, total = seconds.get(str(variant), (0, 0.0))
            seconds[str(variant)] = (count + 1, total + clock.seconds(start, end))
        broadcast = {kind: sum(getattr(variant, kind) for variant, _, _ in done) for kind in kinds}
        workspaces = shapes.latest
        caches = [workspace.cache for workspace in workspaces]
        return cls(
            calls=len(done),
            computed={kind: len(done) - count for kind, count in broadcast.items()},
            broadcast=broadcast,
            slots=sum(map(len, caches)),
            cache_bytes=sum(cache.nbytes for cache in caches),
            host_bytes=sum(cache.host_bytes for cache in caches),
            fp8=next((count_fp8(workspace.stack) for workspace in workspaces), {}),
            graphs=sum(workspace.graphs for workspace in workspaces),
            captured=shapes.captured,
            shapes=len(shapes),
            eager=next((workspace.eager for workspace in workspaces if workspace.eager), None),
            seconds=seconds,
            exchanges=_exchanges({variant for variant, _, _ in done}, workspaces),
        )

    def __str__(self) -> str:
        lines = [f"{self.calls} transformer calls"]
        lines += [
            f"  {kind}: {self.computed[kind]} computed, {self.broadcast[kind]} broadcast" for kind in self.computed
        ]
        graphs = f"{self.graphs} CUDA graphs of {self.shapes} shapes ({self.captured} captured)"
        if self.eager is not None:
            graphs = (
                f"no CUDA graphs: {self.eager}" if not self.graphs else f"{graphs}, some steps without: {self.eager}"
            )
        host = f" and {self.host_bytes / 2**20:.1f} MiB in host memory" if self.host_bytes else ""
        lines.append(f"  cache: {self.slots} slots, {self.cache_bytes / 2**20:.1f} MiB{host}; {graphs}")
        if self.fp8:
            lines.append(f"  in fp8: {', '.join(f'{layer} of {count} blocks' for layer, count in self.fp8.items())}")
        for name, (count, seconds) in self.seconds.items():
            calls, sent = self.exchanges.get(name, (0, 0))
            moved = f", {calls} exchanges of {sent / 2**20:.1f} MiB in all" if name in self.exchanges else ""
            lines.append(f"  {name}: {count} x {seconds / count * 1e3:.2f} ms{moved}")
        return "\n".join(lines)


def _exchanges(variants: Iterable[StepVariant], workspaces: Sequence[Workspace]) -> dict[str, tuple[int, int]]:
    """Those of the first of a step's forwards; they are alike."""
    if not workspaces or not workspaces[0].shared:
        return {}
    return {str(variant): workspaces[0].exchanges(workspaces[0].variant(variant)) for variant in variants}
