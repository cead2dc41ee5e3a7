"""The workspaces of a handle: a bounded number of shapes of call is kept, with slots and graphs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

from pab_kernels.runtime.run import Forward
from pab_kernels.runtime.workspace import Workspace

T = TypeVar("T")


class Shapes:
    """Workspaces by shape of call and by forward. The shape that was not used for longest goes first.

    Parameters
    ----------
    keep : int
        How many shapes are kept.

    Attributes
    ----------
    captured : int
        How many graphs were captured, also of shapes that are gone.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._kept: OrderedDict[Hashable, dict[Forward, Workspace]] = OrderedDict()
        self._gone = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def latest(self) -> list[Workspace]:
        """Those of the shape that came last, one a forward."""
        return list(next(reversed(self._kept.values()), {}).values())

    @property
    def captured(self) -> int:
        """How many graphs were captured, also of shapes that are gone."""
        return self._gone + sum(each.captured for shape in self._kept.values() for each in shape.values())

    def use(self, key: Hashable, forward: Forward, usable: Callable[[Workspace], bool]) -> Workspace | None:
        """The workspace of a shape and a forward, if there is one that is `usable`; that shape is the latest now."""
        shape = self._kept.setdefault(key, {})
        self._kept.move_to_end(key)
        # Slots of other shapes are freed before new ones are made.
        while len(self._kept) > self._keep:
            self.drop_oldest()
        found = shape.get(forward)
        if found is not None and not usable(found):
            self._gone += found.captured
            found = None
            del shape[forward]
        return found

    def add(self, key: Hashable, forward: Forward, workspace: Workspace) -> None:
        """Keep a new one, after `use` had none."""
        self._kept[key][forward] = workspace

    def drop_oldest(self) -> bool:
        """Free the slots and graphs of the shape that was not used for longest, unless it is the latest."""
        if len(self._kept) < 2:
            return False
        _, shape = self._kept.popitem(last=False)
        self._gone += sum(each.captured for each in shape.values())
        return True

    def clear(self) -> None:
        """Free all."""
        self._gone = self.captured
        self._kept.clear()

    def with_memory(self, work: Callable[[], T]) -> T:
        """What `work` gives; as long as it has not enough memory, free another shape and call it again."""
        while True:
            try:
                return work()
            except (torch.cuda.OutOfMemoryError, MemoryError):
                if not self.drop_oldest():
                    raise
