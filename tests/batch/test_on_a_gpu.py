"""`pab batch` on a GPU: one process makes many videos of a shape at the cost of the first one's memory and graphs."""

from __future__ import annotations

import json

import pytest
import torch

from pab_kernels.batch.rows import defaults, plan
from pab_kernels.batch.work import Worker, job
from pab_kernels.pipelines.loading import Source
from pab_kernels.pipelines.sizes import family_size
from tests.batch_tools import manifest
from tests.cli_tools import invoke

PROMPTS = [{"prompt": f"a hill, seen for the {i}th time" + " and again" * (i % 7), "seed": i} for i in range(20)]


@pytest.mark.gpu
def test_memory_is_flat_and_graphs_are_captured_once(device: str, tmp_path) -> None:
    """20 prompts of Open-Sora at 144p, at full size with random weights."""
    source = Source("open_sora", random_weights=True, latents_only=True)
    size = family_size("open_sora", resolution="144p")
    work = job(source, str(tmp_path / "out"), size=size, dtype="bfloat16", device=device)
    worker = Worker(work)
    worker.load()
    memory = []
    for row in plan(PROMPTS, "open_sora", defaults("open_sora", resolution="144p"), work.identity()):
        assert worker.make(row)["status"] == "done"
        torch.cuda.synchronize()
        memory.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), torch.cuda.max_memory_allocated()))
        assert worker._handle is not None
        captured = worker._handle.report().captured
        variants = len(set(worker._handle.schedule or ()))
        assert captured <= variants
    assert captured == variants, "once for each variant, whatever the prompts"
    print(f"allocated, reserved, peak of the 3rd and the 20th: {memory[2]}, {memory[-1]}; {captured} graphs")
    for kind in range(3):
        assert max(after[kind] for after in memory[3:]) <= memory[2][kind] + 2**20
    worker.close()


@pytest.mark.gpu
def test_the_command_makes_20_latents(device: str, tmp_path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    model = ("--model", "open_sora", "--random-weights", "--latents-only", "--resolution", "144p")
    result = invoke("batch", prompts, "--output", out, *model, "--device", device, "--quiet", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["counts"] == {"done": 20, "failed": 0, "waiting": 0}
    rows = manifest(out)
    seconds = [row["seconds"] for row in rows]
    print(f"{summary['videos_per_hour']:.0f} videos an hour; seconds of each: {', '.join(f'{s:.2f}' for s in seconds)}")
    assert max(row["peak_bytes"] for row in rows[3:]) <= rows[2]["peak_bytes"] + 2**20
    assert sorted(seconds[1:])[9] < seconds[0], "a video in the middle is warmer than the first"
