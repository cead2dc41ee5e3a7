"""What ranks do in the tests of the launcher, and of what they share."""

import dataclasses
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pab_kernels import Mesh, PABConfig
from pab_kernels.measure import exchange_times
from pab_kernels.measure.benchmark import Timing
from pab_kernels.measure.contenders import Problem
from pab_kernels.models.hosts.tiles import Tiling
from pab_kernels.pipelines.decoding import VideoDecoder
from pab_kernels.pipelines.text import RandomText, SharedText
from pab_kernels.workloads import WORKLOADS
from tests.vae_tools import tiny_vae


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


def decode(family: str, latents: torch.Tensor, frames: int, seamless: bool) -> tuple[np.ndarray, int, list[int]]:
    """A video decoded by all ranks; how many pieces went through this one, and how many frames came at a time."""
    decoder = VideoDecoder(tiny_vae(family), seamless=seamless, ranks=dist.get_world_size())
    if family != "open_sora" and not seamless:
        decoder.vae.tiling = Tiling(32, 4, 9, 3)
    pieces: list[torch.Tensor] = []
    came: list[int] = []
    run = decoder._spatial if family == "open_sora" else decoder._plan_piece
    name = run.__name__

    def counted(z: torch.Tensor) -> torch.Tensor:
        pieces.append(z)
        return run(z)

    setattr(decoder, name, counted)
    video = decoder.decode(latents, frames, lambda part: came.append(len(part)))
    return video.frames, len(pieces), came


def decode_all(cases: list[tuple[str, torch.Tensor, int, bool]]) -> list[tuple[np.ndarray, int, list[int]]]:
    """`decode` of each, in one launch."""
    torch.set_num_threads(1)
    return [decode(*case) for case in cases]


def encode(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """What every rank gets of a text encoder that rank 0 has, compared there; and whether others were spared it."""
    loaded: list[int] = []

    def load() -> RandomText:
        loaded.append(1)
        return RandomText(6)

    text = SharedText(load, 6, torch.device("cpu"))
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (*text.encode(prompts, 5), len(loaded)))
    embeddings, mask, _ = every[0]
    assert all(torch.equal(embeddings, other) and torch.equal(mask, seen) for other, seen, _ in every)
    return embeddings, mask, [count for _, _, count in every] == [1] + [0] * (len(every) - 1)


def exchange_times_in_fp8(nbytes: int) -> tuple[int, int, dict[str, float]]:
    """Calls and bytes of a temporal attention whose result goes to a projection in fp8, and the time of two of them."""
    workload = WORKLOADS["open_sora-144p-2s"].tiny()
    made = Problem.make(workload, PABConfig(), torch.device("cpu"), torch.bfloat16, 2)
    problem = dataclasses.replace(made, mesh=Mesh(1, 2))
    around, exchange = exchange_times._around(problem, fp8=True)
    around()
    report: Any = SimpleNamespace(fp8={"qkv": 2}, exchanges={"compute": (6, 2 * nbytes), "broadcast temporal": (0, 0)})
    return exchange.calls, exchange.sent, exchange_times.measure(problem, Timing("runtime-fp8", report=report))


class Counts:
    """What stays on a rank from call to call."""

    def __init__(self, start: int) -> None:
        self.total = start

    def add(self, number: int) -> tuple[int, int]:
        """The sum on all ranks of what each has so far, and the number of this one's process."""
        self.total += number + dist.get_rank()
        value = torch.tensor(self.total)
        dist.all_reduce(value)
        return int(value), os.getpid()
