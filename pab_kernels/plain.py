"""Pyramid Attention Broadcast the plain way: the eager host, its own modules, outputs kept in Python.

This is how the original does it. It shares nothing with the executor but the schedule, so each checks the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pab_kernels.config import PABConfig
from pab_kernels.models.hosts import OpenSoraPlanV120
from pab_kernels.schedule import Schedule, StepVariant
from pab_kernels.tapped import TappedBlocks


@dataclass
class _Kept:
    """An output, its change since the call before that computed it, and the gate that it had."""

    value: Tensor
    change: Tensor | None = None
    gate: Tensor | None = None

    def update(self, value: Tensor, gate: Tensor | None) -> None:
        self.value, self.change, self.gate = value, value - self.value, gate

    def read(self, ahead: float) -> Tensor:
        """The output `ahead` changes later, gated."""
        value = self.value
        if ahead != 0.0:
            assert self.change is not None
            value = value + ahead * self.change
        return value if self.gate is None else self.gate * value


class PlainPAB(TappedBlocks):
    """Keeps the outputs of what `config` broadcasts, and hands them out again, or forecasts them.

    Attention is gated with its gate of the call that computed it, that of Open-Sora-Plan 1.2, Wan and LTX-Video anew;
    cross-attention is kept after its projection; the MLP is gated as it was computed. Of the block stack each block
    keeps what it added to the stream. Of guidance the difference between both predictions is kept.

    Parameters
    ----------
    host : nn.Module
        As for `TappedBlocks`.
    config : PABConfig
    forwards_per_step : int
        How often a step calls the host. Each of these calls keeps outputs of its own. Of two the second is the one that
        guidance leaves out.
    conditional : {"first", "second"}
        Which half of the batch is the conditional one, where `config` broadcasts guidance in one call a step.
    """

    def __init__(
        self,
        host: nn.Module,
        config: PABConfig,
        forwards_per_step: int = 1,
        conditional: Literal["first", "second"] = "second",
    ) -> None:
        self.config = config
        self.forwards_per_step = forwards_per_step
        self._conditional = conditional
        self._kept: dict[tuple[str | int, ...], _Kept] = {}
        self._first: Any = None
        """What the step's first call returned, where there are two."""
        self._schedule: Schedule | None = None
        super().__init__(host, regate=isinstance(host, OpenSoraPlanV120))
        self._host = host
        if config.guidance_broadcast:
            host.forward = partial(self._guided, host.forward)

    def close(self) -> None:
        """Give host and blocks their own forward back and forget every output. Closing twice does nothing."""
        super().close()
        self._kept.clear()
        self._host.__dict__.pop("forward", None)

    def begin(self, timesteps: Iterable[float]) -> None:
        """Plan a run over `timesteps`, one a step, and forget every output."""
        self._schedule, self.call = Schedule(self.config, timesteps), -1
        self._kept.clear()

    @property
    def _plan(self) -> Schedule:
        if self._schedule is None or self._step >= len(self._schedule):
            raise ValueError("no run has begun, or its calls are over: call begin(timesteps)")
        return self._schedule

    @property
    def _step(self) -> int:
        return self.call // self.forwards_per_step

    @property
    def _forward(self) -> int:
        return self.call % self.forwards_per_step

    @property
    def _variant(self) -> StepVariant:
        return self._plan[self._step]

    def block(self, kind: str, index: int, run: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The stream after a block: what it adds is computed, or kept from before."""
        if index not in self.config.blocks("stack"):
            return run(*args, **kwargs)
        stream = args[0] if args else kwargs["hidden_states"]
        key = "stack", kind, index
        if self._variant.stack:
            return stream + self._read(key, "stack", inside=False)
        after = run(*args, **kwargs)
        self._keep(key, after - stream, None)
        return after

    def branch(
        self,
        kind: str,
        index: int,
        name: str,
        stream: Tensor,
        compute: Callable[[], Tensor],
        gate: Tensor | None = None,
    ) -> Tensor:
        """The branch's gated output, computed or kept from before."""
        branch = {"attention": kind, "cross": "cross", "mlp": f"mlp_{kind}"}[name]
        has_slot = index in self.config.blocks(branch)
        key = name, kind, index, self._variant.lane(branch, index)
        if has_slot and self._variant.reads(branch, index):
            return self._read(key, branch, inside=index in self.config.blocks("stack"))
        value = compute()
        if has_slot and self._variant.writes(branch, index):
            self._keep(key, value, gate)
        return value if gate is None else gate * value

    def _halves(self) -> tuple[int, ...]:
        """The halves of guidance that this call computes, in the order of its rows: 0 is the conditional one."""
        if not self.config.guidance_broadcast:
            return (0,)
        if self.forwards_per_step > 1:
            return (self._forward,)
        if self._variant.guidance:
            return (0,)
        return (0, 1) if self._conditional == "first" else (1, 0)

    def _keep(self, key: tuple[str | int, ...], value: Tensor, gate: Tensor | None) -> None:
        halves = self._halves()
        gates = (None,) * len(halves) if gate is None else gate.chunk(len(halves))
        for half, part, of_part in zip(halves, value.chunk(len(halves)), gates, strict=True):
            place = (*key, half, self._forward)
            if place in self._kept:
                self._kept[place].update(part, of_part)
            else:
                self._kept[place] = _Kept(part, gate=of_part)

    def _read(self, key: tuple[str | int, ...], kind: str, inside: bool) -> Tensor:
        parts = []
        for half in self._halves():
            place = (*key, half, self._forward)
            parts.append(self._kept[place].read(self._plan.ahead(self._step, kind, inside=inside, half=half)))
        return torch.cat(parts)

    def _guided(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The host's forward, where guidance is broadcast: the unconditional prediction, new or made of the other."""
        if self.forwards_per_step > 1:
            if self._forward == 1 and self._variant.guidance:
                return _with_sample(self._first, _sample(self._first) - self._read_difference())
            found = run(*args, **kwargs)
            if self._forward == 0:
                self._first = found
            else:
                self._keep_difference(_sample(self._first) - _sample(found))
            return found
        rows = len(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))
        first = self._conditional == "first"
        if not self._variant.guidance:
            found = run(*args, **kwargs)
            halves = _sample(found).chunk(2)
            self._keep_difference(halves[0] - halves[1] if first else halves[1] - halves[0])
            return found

        def own(value: Any) -> Any:
            """The conditional rows of an argument."""
            return value.chunk(2)[0 if first else 1] if isinstance(value, Tensor) and len(value) == rows else value

        found = run(*map(own, args), **{name: own(value) for name, value in kwargs.items()})
        conditional = _sample(found)
        other = conditional - self._read_difference()
        return _with_sample(found, torch.cat([conditional, other] if first else [other, conditional]))

    def _keep_difference(self, difference: Tensor) -> None:
        kept = self._kept.get(("guidance",))
        if kept is None:
            self._kept["guidance",] = _Kept(difference)
        else:
            kept.update(difference, None)

    def _read_difference(self) -> Tensor:
        return self._kept["guidance",].read(self._plan.ahead(self._step, "guidance"))


def _sample(found: Any) -> Tensor:
    """The prediction in what a host's forward returns."""
    sample: Tensor = found if isinstance(found, Tensor) else found[0]
    return sample


def _with_sample(found: Any, sample: Tensor) -> Any:
    if isinstance(found, Tensor):
        return sample
    return (sample, *found[1:]) if isinstance(found, tuple) else type(found)(sample=sample)
