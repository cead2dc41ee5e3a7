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


def stack_span(stack: BlockStack, config: PABConfig) -> range:
    """Positions of the blocks that do not run where the stack is broadcast; empty where it never is.

    Raises
    ------
    ValueError
        They do not follow one another in this model.
    """
    inside = [position for position, block in enumerate(stack.blocks) if block.index in config.blocks("stack")]
    span = range(inside[0], inside[-1] + 1) if inside else range(0)
    if len(span) != len(inside):
        raise ValueError(
            f"stack_block: got {config.stack_block}, must be blocks that follow one another in the model: there are "
            f"others between positions {inside[0]} and {inside[-1]}"
        )
    return span


def slot_keys(stack: BlockStack, config: PABConfig) -> list[SlotKey]:
    """All slots that `config` can ever read, in the order in which a step comes to them."""
    keys: list[SlotKey] = []
    span = stack_span(stack, config)
    added = SlotKey("stack", span.stop - 1) if span else None

    def add(key: SlotKey) -> None:
        keys.extend((key, key.changed) if config.order(key.kind) else (key,))

    for place in slot_places(stack, config):
        if added is not None and place.key.position > added.position:
            add(added)
            added = None
        add(place.key)
    if added is not None:
        add(added)
    return keys


def storage(stack: BlockStack, schedule: Schedule) -> dict[SlotKey, int]:
    """The slots of a run, and for each the number of the tensor that it lies in.

    An attention slot has a tensor of its own, since it is written by every call that computes it. MLP slots that are
    never alive at the same call share one: as soon as a window has ended, its memory serves the blocks of the next.
    Nothing is freed within a run, since graphs know the slots by their addresses, and the peak was before.
    """
    numbers: dict[SlotKey, int] = {}
    in_use: list[set[int]] = []  # for each tensor, the calls at which one of its slots is alive
    for key in slot_keys(stack, schedule.config):
        index = stack.blocks[key.position].index
        for lane in range(schedule.lanes(key.kind, index)):
            alive = schedule.alive(key.kind, index, lane)
            if not alive:
                continue  # an MLP that this run never broadcasts
            number = next((i for i, calls in enumerate(in_use) if calls.isdisjoint(alive)), len(in_use))
            if number == len(in_use):
                in_use.append(set())
            in_use[number].update(alive)
            numbers[key.at(lane)] = number
    return numbers


@dataclass(frozen=True)
class Traffic:
    """The slots that one `StepVariant` reads and writes. With those in `updates` it also writes their changes."""

    reads: frozenset[SlotKey]
    writes: frozenset[SlotKey]

    @property
    def updates(self) -> frozenset[SlotKey]:
        """Slots that are written together with the change of what they held."""
        return frozenset(key for key in self.writes if key.changed in self.writes and not key.change)

    @classmethod
    def of(cls, stack: BlockStack, keys: Iterable[SlotKey], variant: StepVariant, span: range) -> Traffic:
        """For the slots `keys` that there are; `span` is the stack's."""
        reads, writes = set(), set()
        for key in keys:
            index = stack.blocks[key.position].index
            if key.kind == "stack":
                broadcast, computed = variant.stack, not variant.stack
            elif (variant.stack and key.position in span) or variant.lane(key.kind, index) != key.lane:
                continue
            else:
                broadcast, computed = variant.reads(key.kind, index), variant.writes(key.kind, index)
            if broadcast and (not key.change or variant.forecasts(key.kind)):
                reads.add(key)
            if computed:
                writes.add(key)
        return cls(frozenset(reads), frozenset(writes))
