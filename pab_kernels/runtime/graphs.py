"""CUDA graphs of denoising steps: one a `StepVariant`, captured the second time the variant comes up."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pab_kernels.runtime.lane import CAPTURES, Lane

log = logging.getLogger(__name__)

TRIES = 2
"""How often a capture is tried before its variant runs eagerly for good."""
_UNTOUCHED = 165.0
"""What outputs hold that no graph has written; exact in every dtype."""


class StepGraphs:
    """Runs a step eagerly once, then from a captured graph. All graphs share one memory pool and the same inputs.

    The first, eager run is a real step: it compiles kernels and sets up libraries, which capture must not do.

    Parameters
    ----------
    inputs : dict of Tensor
        Example inputs on a CUDA device; copies of them become the graphs' fixed inputs.
    lane : Lane
        Whose stream captures and replays; it is entered before `run`.

    Attributes
    ----------
    captured : int
        How many graphs were captured.
    """

    def __init__(self, inputs: dict[str, Tensor], lane: Lane) -> None:
        self._inputs = {name: value.clone() for name, value in inputs.items()}
        self._lane = lane
        self._pool = torch.cuda.graph_pool_handle()
        self._seen: set[Hashable] = set()
        self._failed: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._failures: dict[Hashable, str] = {}
        self.captured = 0

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def failure(self) -> str | None:
        """Why a variant could not be captured, if there is one; it runs eagerly."""
        return next(iter(self._failures.values()), None)

    def fit(self, inputs: dict[str, Tensor]) -> bool:
        """Whether `inputs` have the names, shapes and dtypes of the fixed ones."""
        return inputs.keys() == self._inputs.keys() and all(
            value.shape == self._inputs[name].shape and value.dtype == self._inputs[name].dtype
            for name, value in inputs.items()
        )

    def run(self, key: Hashable, step: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor]) -> Tensor:
        """The result of ``step(inputs)``, which the next run may overwrite.

        `step` must read nothing that changes between calls but its inputs and what lies at fixed addresses.
        """
        for name, value in inputs.items():
            self._inputs[name].copy_(value)
        if key not in self._graphs:
            if key not in self._seen or self._failed[key] >= TRIES:
                self._seen.add(key)
                return step(self._inputs)
            try:
                self._graphs[key] = self._capture(step)
            except RuntimeError as error:
                self._failed[key] += 1
                self._failures[key] = f"capture failed: {error}"
                then = "its steps run eagerly" if self._failed[key] >= TRIES else "it is tried again"
                log.warning("%s; %s", self._failures[key], then)
                if not self._graphs:
                    self._pool = torch.cuda.graph_pool_handle()  # what the failed capture took stays in the old one
                torch.cuda.empty_cache()
                return step(self._inputs)
            self.captured += 1
            self._failures.pop(key, None)
            return self._graphs[key][1]
        graph, output = self._graphs[key]
        graph.replay()
        return output

    def _capture(self, step: Callable[[dict[str, Tensor]], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._lane.device)
        # Other threads may do what they like meanwhile; only captures come one after the other. Nothing is collected,
        # since what a finalizer launches on this stream would become part of the graph.
        with CAPTURES, _uncollected():
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    output = step(self._inputs)
            except RuntimeError:
                # Torch then leaves its random numbers in capture until another capture succeeds: every later
                # torch.randn of the process would fail.
                torch.cuda.set_stream(stream)
                with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
                    torch.zeros(1, device=stream.device)
                raise
            # Its first replay shows that it is the step: what was launched elsewhere is done by now, and not in it.
            # A device that another thread captures on must not be waited for: hence here.
            torch.cuda.synchronize(self._lane.device)
        output.fill_(_UNTOUCHED)
        graph.replay()
        if bool((output == _UNTOUCHED).all()):
            raise RuntimeError("the capture recorded nothing: the step was launched on another device or stream")
        return graph, output


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's cyclic garbage collection."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
