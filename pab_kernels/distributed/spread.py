"""Work that is not the transformer's, over all ranks: independent pieces, and what one rank alone finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MOST_DIMS = 7


def spread(run: Callable[[Tensor], Tensor], pieces: Sequence[Tensor]) -> Iterator[Tensor]:
    """As ``map(run, pieces)``, where each rank runs some of the pieces and all ranks get all results, in order.

    In waves of a piece a rank. A rank begins its piece of the next wave before it hands out what this one gave.

    Parameters
    ----------
    run : callable
        Keeps dtype and device.
    pieces : sequence of Tensor
        The same on all ranks of torch's default process group, which all take all results.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    waves = [pieces[i : i + ranks] for i in range(0, len(pieces), ranks)]
    mine = [run(waves[0][rank]) if rank < len(waves[0]) else None] if waves else []
    for i, wave in enumerate(waves):
        results = [_from(source, mine[i], piece) for source, piece in enumerate(wave)]
        if i + 1 < len(waves):
            mine.append(run(waves[i + 1][rank]) if rank < len(waves[i + 1]) else None)
        mine[i] = None
        yield from results


def _from(source: int, mine: Tensor | None, like: Tensor) -> Tensor:
    """The result of rank `source`, which is `mine` there, on all ranks."""
    own = dist.get_rank() == source
    shape = torch.zeros(1 + MOST_DIMS, dtype=torch.int64)
    if own:
        assert mine is not None
        shape[: 1 + mine.ndim] = torch.tensor([mine.ndim, *mine.shape])
    shape = shape.to(like.device)
    dist.broadcast(shape, source)
    dims, *sizes = shape.tolist()
    result = mine.contiguous() if own and mine is not None else like.new_empty(sizes[:dims])
    dist.broadcast(result, source)
    return result


def shared(find: Callable[[], Any] | None, device: torch.device) -> Any:
    """What rank 0 finds, on every rank: only there `find` is called. It is pickled; tensors come on their device."""
    found = [find() if find is not None and dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0, device=device)
    return found[0]
