"""Whole runs on a mesh of GPUs against one of them: `torchrun --nproc-per-node 2 -m bench.mesh --seconds 200 CASE...`

A case is ``workload/contenders/meshes[/steps[xruns]]``, such as ``open_sora-480p-2s/fp8+pab,bf16/g2,f2:nccl/30x3``.
Each contender runs on one GPU alone (not where the meshes begin with ``-``) and then on each mesh (guidance, frames,
what exchanges rows), twice if not said otherwise, to see that the runs are bit for bit alike. ``shard`` in the place of
a mesh runs the largest share of the frames on one GPU alone, and ``pair:nccl`` times the exchange around one attention
by itself. Prints a line of JSON a run; with ``--out`` also to a file.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pab_kernels import Mesh, PABConfig, accelerate
from pab_kernels.blocks.branches import SelfAttention
from pab_kernels.blocks.sharded import Shards, near_even
from pab_kernels.distributed.mesh import Ranks
from pab_kernels.measure.benchmark import _timed_run, denoise, relative_error
from pab_kernels.measure.contenders import CONDITIONAL, Problem, Session
from pab_kernels.models import adapter_for
from pab_kernels.schedule import Schedule
from pab_kernels.workloads import WORKLOADS, Workload

PRECISIONS: dict[str, dict[str, Any]] = {"bf16": {}, "fp8": {"linear_precision": "fp8"}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--seconds", type=float, default=300, help="no case begins after so long")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="tiny models, on a CPU")
    options = parser.parse_args()
    start = time.perf_counter()
    if options.tiny:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    else:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    for text in options.cases:
        late = [time.perf_counter() - start > options.seconds]
        dist.broadcast_object_list(late, src=0)
        if late[0]:
            say(options.out, case=text, skipped="no time left")
            continue
        run_case(text, device, options)
    say(options.out, seconds=time.perf_counter() - start)
    dist.destroy_process_group()


def run_case(text: str, device: torch.device, options: argparse.Namespace) -> None:
    name, contenders, meshes, *steps = text.split("/")
    workload = WORKLOADS[name].tiny() if options.tiny else WORKLOADS[name]
    dtype = torch.float32 if options.tiny else torch.bfloat16
    config = PABConfig.preset(workload.family)
    number, _, runs = (steps or [""])[0].partition("x")
    problem = Problem.make(workload, config, device, dtype, int(number) if number else None)
    for contender in contenders.split(","):
        precision, *more = contender.split("+")
        used = dataclasses.replace(config if more else PABConfig(), **({} if options.tiny else PRECISIONS[precision]))
        alone = None
        forms = meshes.split(",")
        for mesh in forms[1:] if forms[0] == "-" else ("alone", *forms):
            label = {"workload": workload.name, "contender": contender, "mesh": mesh, "ranks": dist.get_world_size()}
            if mesh.startswith("pair:"):
                found = time_pair(problem, Mesh(1, dist.get_world_size(), mesh.removeprefix("pair:")))
                say(options.out, **label, **found)
                continue
            shown = shard(problem) if mesh == "shard" else problem
            found = run(shown, used, None if mesh in ("alone", "shard") else mesh_of(mesh), int(runs or 2))
            latents = found.pop("latents")
            if mesh == "alone":
                alone = latents, found["seconds"]
            elif mesh != "shard" and alone is not None:
                found |= {"error": relative_error(latents, alone[0]), "times": alone[1] / found["seconds"]}
            say(options.out, **label, **found)


def mesh_of(text: str) -> Mesh:
    """From "g2f2:symmetric"."""
    axes, _, backend = text.partition(":")
    numbers = {"guidance": 1, "frames": 1}
    for axis, number in zip(axes[::2], axes[1::2], strict=True):
        numbers[{"g": "guidance", "f": "frames"}[axis]] = int(number)
    return Mesh(**numbers, backend=backend or None)


def shard(problem: Problem) -> Problem:
    """The run on as many frames as the rank with most has."""
    workload = problem.workload
    frames = near_even(workload.latent[0], dist.get_world_size())[0]
    part: Workload = dataclasses.replace(workload, latent=(frames, *workload.latent[1:]))
    return dataclasses.replace(problem, workload=part, inputs=part.inputs(problem.device, problem.dtype))


def run(problem: Problem, config: PABConfig, mesh: Mesh | None, runs: int) -> dict[str, Any]:
    """Seconds of the runs, of each variant's steps, and the latents."""
    gc.collect()
    if problem.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(problem.device)
    forwards = problem.workload.forwards_per_step
    with accelerate(problem.host, config, mesh=mesh, forwards_per_step=forwards, conditional=CONDITIONAL) as handle:
        first: dict[Any, int] = {}
        for step, variant in enumerate(Schedule(config, problem.timesteps)):
            first.setdefault(variant, step)
        for _ in range(2):  # eagerly, then captured: as often on every rank
            handle.begin(problem.timesteps)
            denoise(problem.host, problem, 1 + max(first.values()))
        session = Session(problem.host, handle.begin, handle.report)
        timed = []
        for _ in range(runs):
            dist.barrier()
            timed.append(_timed_run(session, problem))
        report = handle.report()
        _, latents, steps = timed[0]
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, (steps, latents.double().sum().item()))
        return {
            "seconds": min(seconds for seconds, *_ in timed),
            "runs": [seconds for seconds, *_ in timed],
            "runs_differ": max(float((other - latents).abs().max()) for _, other, _ in timed),
            "ranks_agree": mesh is None or len({total for _, total in every}) == 1,
            "jitter_ms": 1e3 * max(max(each) - min(each) for each in zip(*(steps for steps, _ in every), strict=True)),
            "variants_ms": {name: [n, 1e3 * total / n] for name, (n, total) in report.seconds.items()},
            "exchanges": report.exchanges,
            "graphs": report.graphs,
            "eager": report.eager,
            "cache_gib": report.cache_bytes / 2**30,
            "peak_gib": torch.cuda.max_memory_allocated(problem.device) / 2**30 if problem.device.type == "cuda" else 0,
            "latents": latents.cpu(),
        }


def time_pair(problem: Problem, mesh: Mesh) -> dict[str, Any]:
    """Milliseconds of both exchanges around one attention, of a step of both halves and of one, from a graph."""
    ranks = mesh.join(problem.device)
    assert isinstance(ranks, Ranks)
    adapter = adapter_for(problem.host)
    channels, attentions = (
        adapter.stack.channels,
        [
            branch.weights
            for block in adapter.stack.blocks
            for branch in block.branches
            if isinstance(branch.weights, SelfAttention) and branch.weights.sequence != "spatial"
        ],
    )
    adapter.restore()
    weights, (total, tokens) = attentions[0], problem.workload.grid
    found: dict[str, Any] = {"backend": mesh.backend, "pairs_a_step": len(attentions)}
    for batch in (1, 2):
        exchange = ranks.exchange("frames")
        shards = Shards(near_even(total, mesh.frames), ranks.frames, exchange)
        frames = shards.sizes[shards.rank]
        like = torch.empty(1, dtype=problem.dtype, device=problem.device)
        made = torch.randn(batch, frames, tokens, 3 * channels, dtype=problem.dtype, device=problem.device)
        place = shards.buffer("qkv", made.shape, like)
        rows = (made if place is None else place.copy_(made)).unflatten(-1, (3, weights.heads, -1))
        full = weights.sequence == "full"
        rows = rows.flatten(1, 2) if full else rows
        output = None

        def pair(rows: torch.Tensor = rows, shards: Shards = shards, full: bool = full) -> None:
            def attend(qkv: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
                nonlocal output
                if out is not None:
                    return out
                if output is None:
                    output = qkv.select(-3, 0).contiguous() if full else qkv.select(-3, 0).flatten(-2).contiguous()
                return output

            shards.around(rows, 3 if full else 2, channels // (weights.heads if full else 1), attend)

        found[f"ms_batch_{batch}"] = _time(pair, problem.device)
        found[f"sent_mib_batch_{batch}"] = exchange.sent / exchange.calls * 2 / 2**20
    return found


def _time(run: Any, device: torch.device, times: int = 20) -> float:
    run()
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(times):
                run()
        dist.barrier()
        graph.replay()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record(stream)
        for _ in range(3):
            graph.replay()
        marks[1].record(stream)
        marks[1].synchronize()
    return marks[0].elapsed_time(marks[1]) / (3 * times)


def say(out: Path | None, **found: Any) -> None:
    """A line, by rank 0."""
    if dist.get_rank() == 0:
        line = json.dumps(
            {name: round(value, 5) if isinstance(value, float) else value for name, value in found.items()}
        )
        print(line, flush=True)
        if out is not None:
            with out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
