"""Requests of mixed sizes, prompts and seeds to one handle, as a server sees them; memory after each.

On a GPU: ``python -m tests.runtime.requests_tools 500``.
"""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from pab_kernels import PABConfig, accelerate
from pab_kernels.models.checkpoints import random_weights
from pab_kernels.runtime.report import Report

SIZES = ((8, 8), (8, 12), (12, 12))
"""Of latents; as many shapes as are kept."""
TEXTS = (20, 64, 100)
"""Lengths of prompts: padded to 64, 64 without padding (the same graphs: the length is data), padded to 128."""
SEEDS = 4
PAB = PABConfig(
    spatial_broadcast=True, spatial_threshold=(100, 900), spatial_range=2,
    temporal_broadcast=True, temporal_threshold=(100, 900), temporal_range=3,
    cross_broadcast=True, cross_threshold=(100, 900), cross_range=3,
)  # fmt: skip
STEPS = (940.0, 820.0, 700.0, 580.0, 460.0)


@dataclass(frozen=True)
class Memory:
    """Bytes after a request: resident on the host; on a GPU allocated and reserved by torch."""

    resident: int
    allocated: int = 0
    reserved: int = 0


def transformer(device: torch.device) -> Any:
    """A Latte of two layers; on a GPU with the head_dim that the kernels are for."""
    width = {"num_attention_heads": 2, "attention_head_dim": 72 if device.type == "cuda" else 12}
    sizes: dict[str, Any] = {"num_layers": 2, "video_length": 4, "sample_size": 8, "caption_channels": 64}
    sizes |= width | {"cross_attention_dim": width["num_attention_heads"] * width["attention_head_dim"]}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return random_weights("latte", dtype=dtype, device=device, **sizes)


def request(model: Any, handle: Any, number: int, device: torch.device) -> tuple[tuple[int, ...], Tensor]:
    """What the request was, and its latents."""
    what = (number % len(SIZES), number // 3 % len(TEXTS), number // 5 % SEEDS)
    generator = torch.Generator().manual_seed(what[2])
    dtype = next(model.parameters()).dtype
    latents = torch.randn(2, 4, 4, *SIZES[what[0]], generator=generator).to(device, dtype)
    text = torch.randn(2, TEXTS[what[1]], 64, generator=generator).to(device, dtype)
    handle.begin(STEPS)
    timesteps = torch.tensor(STEPS, device=device)
    with torch.inference_mode(number % 3 == 0):
        for t in timesteps:
            output = model(latents, timestep=t.expand(2), encoder_hidden_states=text, return_dict=False)[0]
            latents = latents - 0.1 * output[:, :4]
    return what, latents.cpu()


def serve(count: int, device: torch.device) -> tuple[list[Memory], Report, int]:
    """Memory after each of `count` requests, the report, and how many came again; those must give the same bits.

    Raises
    ------
    AssertionError
        A request did not give what it gave before.
    """
    model, first, memory, again = transformer(device), dict[tuple[int, ...], Tensor](), [], 0
    process = psutil.Process()
    with accelerate(model, PAB) as handle:
        for number in range(count):
            what, latents = request(model, handle, number, device)
            assert latents.isfinite().all()
            # A variant is captured when it comes up the second time: until then other kernels may run.
            if device.type == "cpu" or number >= 100:
                known = first.setdefault(what, latents)
                again += known is not latents
                assert torch.equal(known, latents), f"request {number}, {what}, is not what it was"
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                now = Memory(
                    process.memory_info().rss,
                    torch.cuda.memory_allocated(device),
                    torch.cuda.memory_reserved(device),
                )
            else:
                now = Memory(process.memory_info().rss)
            memory.append(now)
        gc.collect()
        report = handle.report()
    return memory, report, again


def main() -> None:
    """Serve, and print a line for every tenth of the requests."""
    count = int(sys.argv[1])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    memory, report, again = serve(count, device)
    for number in range(0, count, max(count // 10, 1)):
        now = memory[number]
        print(f"request {number}: {now.resident} resident, {now.allocated} allocated, {now.reserved} reserved")
    last, settled = memory[-1], memory[min(50, count - 1)]
    print(f"last against the 50th: {last.resident - settled.resident} resident, ", end="")
    print(f"{last.allocated - settled.allocated} allocated, {last.reserved - settled.reserved} reserved")
    print(f"{count} requests in {time.perf_counter() - start:.1f} s, {again} came again with the same bits")
    print(report)


if __name__ == "__main__":
    main()
