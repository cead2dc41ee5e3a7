"""What is taken for granted without waiting for the GPU is checked there, and never silently wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Doubts:
    """Makes a result NaN where something that it rests on turns out to be wrong, and tells so at the next call.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self._wrong = torch.zeros((), dtype=torch.bool, device=device)
        # Read by the host whenever it comes by; that it has arrived by then is not waited for.
        self._seen = torch.zeros((), dtype=torch.bool, pin_memory=device.type == "cuda")

    def begin(self) -> None:
        """A new run: nothing is wrong."""
        self._wrong = torch.zeros_like(self._wrong)
        self._seen = torch.zeros((), dtype=torch.bool, pin_memory=self._wrong.device.type == "cuda")

    def check(self) -> None:
        """Raise ValueError if something was found wrong meanwhile."""
        if self._seen:
            raise ValueError(
                "this run's results are NaN since a call that did not fit its plan: its timestep was not that of the "
                "next step, or an argument was changed in place under torch.inference_mode. Call begin(timesteps) for "
                "a new run, with the timesteps that come"
            )

    def of_timestep(self, timestep: Tensor, allowed: Sequence[float]) -> Tensor:
        """True, on the device, where a row of a timestep is none of `allowed`; of one a token the largest counts."""
        rows = timestep.reshape(1 if timestep.ndim == 0 else len(timestep), -1).amax(1).double()
        wrong = torch.ones_like(rows, dtype=torch.bool)
        for value in dict.fromkeys(allowed):
            wrong &= rows != value
        return wrong.any()

    def apply(self, wrong: Sequence[Tensor], result: Tensor) -> Tensor:
        """`result`, or NaN where a bool of `wrong` is True, now or earlier in the run."""
        if not wrong:
            return result
        for each in wrong:
            self._wrong |= each
        self._seen.copy_(self._wrong, non_blocking=True)
        return torch.where(self._wrong, torch.nan, result)
