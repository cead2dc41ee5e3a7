"""How an op becomes one of `torch.ops.pab`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def register(
    schema: str,
    mutates: tuple[str, ...],
    implementation: Callable[..., Tensor | None],
    fake: Callable[..., Tensor | None],
) -> None:
    """Make `torch.ops.pab.<name>`."""
    name = schema.partition("(")[0]
    op = torch.library.custom_op(f"pab::{name}", implementation, mutates_args=mutates, schema=schema.removeprefix(name))
    op.register_fake(fake)


def writes_only(*args: object) -> None:
    """Fake of an op that writes into the tensors it is given: nothing to do."""
