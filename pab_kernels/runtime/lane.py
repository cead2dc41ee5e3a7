"""The device and the stream of one handle: nothing is taken from what happens to be current."""

from __future__ import annotations

import threading
from collections import defaultdict
from types import TracebackType

import torch
from torch import Tensor

_FREE: defaultdict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)
"""Streams of lanes that are closed: with each comes a workspace of cuBLAS (33 MiB), which torch keeps."""
CAPTURES = threading.Lock()
"""Held while a graph is captured: torch's random number generator knows of one capture in a process."""


class Lane:
    """``with lane:`` runs on its own device and stream, after all that the caller's stream was given, before the rest.

    The caller's stream is the one that is current on this device, whichever device is current. So memory that the
    caller frees afterwards, and what it reads afterwards, are in order. On a CPU this does nothing.

    Parameters
    ----------
    device : torch.device

    Attributes
    ----------
    device : torch.device
    stream : torch.cuda.Stream or None
        None on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            try:
                self.stream = _FREE[device].pop()
            except IndexError:
                self.stream = torch.cuda.Stream(device)
        self._entered: list[tuple[torch.cuda.Stream, torch.cuda.StreamContext]] = []

    def __enter__(self) -> Lane:
        if self.stream is not None:
            caller = torch.cuda.current_stream(self.device)
            if caller != self.stream:
                self.stream.wait_stream(caller)
            context = torch.cuda.stream(self.stream)  # its device becomes current, too
            context.__enter__()
            self._entered.append((caller, context))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.stream is not None:
            caller, context = self._entered.pop()
            context.__exit__(kind, error, trace)
            if caller != self.stream:
                caller.wait_stream(self.stream)

    def close(self) -> None:
        """Let another lane have the stream."""
        if self.stream is not None:
            _FREE[self.device].append(self.stream)

    def hand_out(self, value: Tensor) -> Tensor:
        """`value`, made here, as a tensor of the caller's own, outside of the lane; on a CPU it is that already."""
        return value if self.stream is None else value.clone()
