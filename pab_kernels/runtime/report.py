"""What a run did: calls, cache, graphs and the time of each step variant."""

from __future__ import annotations

from dataclasses import dataclass


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
            lines.append(f"  {name}: {count} x {seconds / count * 1e3:.2f} ms")
        return "\n".join(lines)
