"""Guidance of two forwards a step, on a mesh: each half of the ranks computes one of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pab_kernels.distributed.mesh import Ranks
from pab_kernels.runtime.guidance import Pairs
from pab_kernels.schedule import Schedule


class Apart:
    """Takes the two forwards of a step: that of the rank's own half runs, the other one comes from another rank.

    The first, where it is another rank's, returns NaN, in a tensor that the second fills: pipelines combine the two
    after both. The second returns what it is on every rank.

    Parameters
    ----------
    ranks : Ranks
    """

    def __init__(self, ranks: Ranks) -> None:
        self._own = ranks.guidance
        self._exchange = ranks.exchange("guidance")
        self._first = torch.empty(0)
        """The first forward's prediction, from the second on on every rank."""
        self._handed: Tensor | None = None
        """What the caller has of the first forward, until the second."""
        self._waits = False

    def begin(self) -> None:
        """A new run."""
        self._handed, self._waits = None, False

    def first(self, step: int, compute: Callable[[], Tensor], nothing: Callable[[], Tensor]) -> Tensor:
        """The first forward of a step: this rank's, or NaN.

        Raises
        ------
        ValueError
            The second forward of the step before never came.
        """
        if self._waits:
            raise ValueError(
                f"mesh: step {step} begins, but the second forward of the one before never came: with guidance=2 each "
                "step has two forwards, or a batch of both halves; without guidance, use Mesh(guidance=1)"
            )
        result = compute() if self._own == 0 else nothing()
        self._first, self._waits = result.clone(), True
        return result

    def handed(self, value: Tensor) -> None:
        """What the caller got of the forward that was run last; fills what it got of the first.

        It is the caller's, so this happens on the caller's stream and in its mode, which may be that of inference.
        """
        if self._waits:
            self._handed = value
        elif self._handed is not None:
            if self._own == 1:
                self._handed.copy_(self._first)
            self._handed = None

    def second(
        self,
        step: int,
        compute: Callable[[], Tensor] | None,
        nothing: Callable[[], Tensor],
        pairs: Pairs | None,
        schedule: Schedule,
    ) -> Tensor:
        """The second forward of a step, on every rank; `compute` is None where guidance is broadcast.

        Raises
        ------
        ValueError
            The first one did not come before.
        """
        if not self._waits:
            raise ValueError(f"mesh: the first forward of step {step} must come before the second")
        mine = self._first
        if self._own == 1:
            mine = nothing() if compute is None else compute()
        self._first, second = self._exchange.gather(mine, 0, [len(mine)] * 2).chunk(2)
        self._waits = False
        if pairs is None:
            return second
        pairs.take(0, step, self._first)
        if compute is None:
            return pairs.second(step, schedule)
        pairs.take(1, step, second)
        return second
