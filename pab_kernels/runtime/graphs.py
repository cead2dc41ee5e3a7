"""CUDA graphs of denoising steps: one a `StepVariant`, captured the second time the variant comes up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class StepGraphs:
    """Runs a step eagerly once, then from a captured graph. All graphs share one memory pool and the same inputs.

    The first, eager run is a real step: it compiles kernels and sets up libraries, which capture must not do.

    Parameters
    ----------
    inputs : dict of Tensor
        Example inputs on a CUDA device; copies of them become the graphs' fixed inputs.
    """

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        self._inputs = {name: value.clone() for name, value in inputs.items()}
        self._pool = torch.cuda.graph_pool_handle()
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.failure: str | None = None
        """Why capture failed, if it did; steps then run eagerly."""

    def __len__(self) -> int:
        return len(self._graphs)

    def fit(self, inputs: dict[str, Tensor]) -> bool:
        """Whether `inputs` have the names, shapes and dtypes of the fixed ones."""
        return inputs.keys() == self._inputs.keys() and all(
            value.shape == self._inputs[name].shape and value.dtype == self._inputs[name].dtype
            for name, value in inputs.items()
        )

    def run(self, key: Hashable, step: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor]) -> Tensor:
        """The result of ``step(inputs)``, a tensor of the caller's own.

        `step` must read nothing that changes between calls but its inputs and what lies at fixed addresses.
        """
        for name, value in inputs.items():
            self._inputs[name].copy_(value)
        if key not in self._graphs:
            if key not in self._seen or self.failure is not None:
                self._seen.add(key)
                return step(self._inputs)
            try:
                self._graphs[key] = self._capture(step)
            except RuntimeError as error:
                self.failure = f"capture failed: {error}"
                log.warning("steps run eagerly, without CUDA graphs: %s", self.failure)
                return step(self._inputs)
        graph, output = self._graphs[key]
        graph.replay()
        # The next replay overwrites the graph's output.
        return output.clone()

    def _capture(self, step: Callable[[dict[str, Tensor]], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        current, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                output = step(self._inputs)
        except RuntimeError:
            # Torch then leaves its capture stream the current one, and its random numbers in capture until another
            # capture succeeds: every later torch.randn of the process would fail.
            torch.cuda.set_stream(current)
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                torch.zeros(1, device=current.device)
            raise
        return graph, output
