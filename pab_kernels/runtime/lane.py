"""The device and the stream of one handle: nothing is taken from what happens to be current."""

from __future__ import annotations

import threading
from types import TracebackType

import torch
from torch import Tensor

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
        self.stream: torch.cuda.Stream | None = torch.cuda.Stream(device) if device.type == "cuda" else None
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

    def hand_out(self, value: Tensor) -> Tensor:
        """`value`, made here, as a tensor of the caller's own, outside of the lane; on a CPU it is that already."""
        return value if self.stream is None else value.clone()
