"""What ranks do in the tests of the launcher."""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist


def total(number: int) -> tuple[float, str, str]:
    """The sum over ranks of `number` plus the rank, and two variables of the environment."""
    value = torch.tensor(float(number + dist.get_rank()))
    dist.all_reduce(value)
    return value.item(), os.environ["RANK"], os.environ["WORLD_SIZE"]


def fail(how: str, where: int) -> None:
    """One rank fails, and the others wait for it."""
    if dist.get_rank() == where:
        if how == "raise":
            raise ValueError(f"latents: got {where}")
        if how == "a bug":
            raise KeyError("name")
        os.kill(os.getpid(), 9)
    dist.barrier()


def hang(folder: Path) -> None:
    """Write the process's number to a file, and wait for a rank that never comes."""
    (folder / f"{dist.get_rank()}.part").write_text(str(os.getpid()))
    (folder / f"{dist.get_rank()}.part").rename(folder / f"{dist.get_rank()}.pid")
    if dist.get_rank() == 1:
        time.sleep(1000)
    dist.barrier()


def come_late() -> None:
    """Rank 0 waits longer than it is to."""
    if dist.get_rank() == 1:
        time.sleep(100)
    dist.barrier()
