"""The slot plan: which slots a run needs, in which memory each lies, and which of them a `StepVariant` uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pab_kernels.blocks.block import Block, BlockStack, Branch
from pab_kernels.config import PABConfig
from pab_kernels.runtime.slots import SlotKey
from pab_kernels.schedule import Schedule, StepVariant


@dataclass(frozen=True)
class Place:
    """A branch in its stack, and what its slot is called, whether or not it has one."""

    key: SlotKey
    block: Block
    branch: Branch


def places(stack: BlockStack) -> Iterator[Place]:
    """All branches, in the order in which a step comes to them."""
    for position, block in enumerate(stack.blocks):
        earlier: Counter[str] = Counter()
        for branch in block.branches:
            yield Place(SlotKey(branch.kind, position, earlier[branch.kind]), block, branch)
            earlier[branch.kind] += 1


def slot_places(stack: BlockStack, config: PABConfig) -> list[Place]:
    """Those that `config` can ever broadcast."""
    return [place for place in places(stack) if place.block.index in config.blocks(place.branch.kind)]


def storage(stack: BlockStack, schedule: Schedule) -> dict[SlotKey, int]:
    """The slots of a run, and for each the number of the tensor that it lies in.

    An attention slot has a tensor of its own, since it is written by every call that computes it. MLP slots that are
    never alive at the same call share one: as soon as a window has ended, its memory serves the blocks of the next.
    Nothing is freed within a run, since graphs know the slots by their addresses, and the peak was before.
    """
    numbers: dict[SlotKey, int] = {}
    in_use: list[set[int]] = []  # for each tensor, the calls at which one of its slots is alive
    for place in slot_places(stack, schedule.config):
        alive = schedule.alive(place.branch.kind, place.block.index)
        if not alive:
            continue  # an MLP that this run never broadcasts
        number = next((i for i, calls in enumerate(in_use) if calls.isdisjoint(alive)), len(in_use))
        if number == len(in_use):
            in_use.append(set())
        in_use[number].update(alive)
        numbers[place.key] = number
    return numbers


@dataclass(frozen=True)
class Traffic:
    """The slots that one `StepVariant` reads and writes."""

    reads: frozenset[SlotKey]
    writes: frozenset[SlotKey]

    @classmethod
    def of(cls, stack: BlockStack, keys: Iterable[SlotKey], variant: StepVariant) -> Traffic:
        """For the slots `keys` that there are."""
        index = {key: stack.blocks[key.position].index for key in keys}
        return cls(
            reads=frozenset(key for key in index if variant.reads(key.kind, index[key])),
            writes=frozenset(key for key in index if variant.writes(key.kind, index[key])),
        )
