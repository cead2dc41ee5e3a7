"""Guidance by halves: which rows of a call are conditional, and what stands for those that do not run."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from pab_kernels.runtime.run import Forward, Run
from pab_kernels.schedule import Schedule

BOTH = "cond_uncond"
"""What diffusers calls a forward that is both halves of guidance in one batch."""
Conditional = Literal["first", "second"]
"""The half of a batch that is conditional."""


class Difference:
    """The conditional prediction without the other one, of the last step that ran both, and its change.

    It lies where graphs find it, in float32 or wider.

    Parameters
    ----------
    like : Tensor
        One of the predictions.
    order : {0, 1}
        1 keeps the change too.
    """

    def __init__(self, like: Tensor, order: int) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32)
        self._value = torch.empty_like(like, dtype=dtype)
        self._change = torch.empty_like(self._value) if order else None

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self._value.nbytes * (1 if self._change is None else 2)

    def keep(self, conditional: Tensor, other: Tensor) -> None:
        """Take in the predictions of a step that ran both."""
        difference = conditional.to(self._value.dtype) - other
        if self._change is not None:
            torch.sub(difference, self._value, out=self._change)
        self._value.copy_(difference)

    def other(self, conditional: Tensor, ahead: Tensor | float | None) -> Tensor:
        """The prediction that belongs to `conditional`, repeated, or forecast so far `ahead`."""
        difference = self._value
        if ahead is not None:
            assert self._change is not None
            difference = difference + ahead * self._change
        return (conditional - difference).to(conditional.dtype)


class Halves:
    """Which halves of guidance the calls of a transformer hold: 0 is the conditional one, 1 the other.

    Parameters
    ----------
    broadcast : bool
        Whether guidance is broadcast; if not, no call is taken apart.
    pipeline : diffusers pipeline or None
        It says whether its calls are guided, and ours also which half comes first.
    conditional : {"first", "second"}, optional
        Instead of the pipeline's. By default "second", as diffusers puts it.

    Raises
    ------
    ValueError
        `conditional` is neither.
    """

    def __init__(self, broadcast: bool, pipeline: Any, conditional: str | None) -> None:
        if conditional not in (None, "first", "second"):
            raise ValueError(f"conditional: got {conditional!r}, must be first or second")
        self._broadcast, self._pipeline = broadcast, pipeline
        first = getattr(pipeline, "cond_first", False) if conditional is None else conditional == "first"
        self._order = (0, 1) if first else (1, 0)

    def of(self, run: Run, forward: Forward, batch: int, whole_step: int | None) -> tuple[int, ...]:
        """The halves of a call, in the order of its rows.

        Parameters
        ----------
        run : Run
        forward : str or int
            Of several a step the first is the conditional one, as far as they are told apart here: of two the second is
            left out.
        batch : int
            Rows of the call.
        whole_step : int or None
            Rows of the latents where the call is a whole step, the conditional half first.

        Raises
        ------
        ValueError
            More than two forwards a step.
        """
        if not self._broadcast:
            return (0,)
        if whole_step is not None:
            return (0, 1) if batch == 2 * whole_step else (0,)
        if _separate(run, forward):
            return (_number(run, forward, "guidance_broadcast"),)
        return self._order if run.guided and self._guided() else (0,)

    def kept(self, run: Run, forward: Forward) -> bool:
        """Whether the halves are forwards of their own, of which this is one, and their difference is broadcast."""
        return self._broadcast and _separate(run, forward)

    def apart(self, run: Run, forward: Forward) -> int | None:
        """Which half of guidance this forward is, where the halves are forwards of their own.

        Raises
        ------
        ValueError
            More than two forwards a step.
        """
        if not (_separate(run, forward) and run.guided and self._guided()):
            return None
        return _number(run, forward, "mesh: guidance=2")

    def _guided(self) -> bool:
        """Whether the pipeline's calls have two halves now."""
        said = getattr(self._pipeline, "do_classifier_free_guidance", None)
        if said is None:
            scale = getattr(self._pipeline, "guidance_scale", None)
            said = not isinstance(scale, int | float) or scale > 1
        return bool(said)


def _separate(run: Run, forward: Forward) -> bool:
    """Whether a step has several forwards, of which this is one."""
    return run.forwards > 1 if isinstance(forward, int) else forward != BOTH


def _number(run: Run, forward: Forward, what: str) -> int:
    """Which of two forwards it is; ValueError for more."""
    number = run.number(forward)
    if number > 1 or run.forwards > 2:
        raise ValueError(
            f"{what}: forward {forward!r} is one of {max(run.forwards, number + 1)} a step, must be one of two"
        )
    return number


class Pairs:
    """Guidance where both predictions are forwards of their own: the second is kept as its difference to the first.

    Parameters
    ----------
    order : {0, 1}
        See `Difference`.
    """

    def __init__(self, order: int) -> None:
        self._order = order
        self._first: Tensor | None = None
        self._step = -1
        self._difference: Difference | None = None

    def take(self, half: int, step: int, prediction: Tensor) -> None:
        """Keep what a forward gave."""
        if half == 0:
            self._first, self._step = prediction.clone(), step
            return
        if self._difference is None:
            self._difference = Difference(prediction, self._order)
        self._difference.keep(self._first_of(step), prediction)

    def second(self, step: int, schedule: Schedule) -> Tensor:
        """What the second forward of a step would give.

        Raises
        ------
        ValueError
            The first one of this step did not come, or no step of this run has run both.
        """
        first = self._first_of(step)
        if self._difference is None:
            raise ValueError("guidance: the difference is read before this run has written it")
        ahead = schedule.ahead(step, "guidance") if schedule[step].forecasts("guidance") else None
        return self._difference.other(first, ahead)

    def _first_of(self, step: int) -> Tensor:
        if self._first is None or self._step != step:
            raise ValueError(f"guidance: the first forward of step {step} must come before the second")
        return self._first
