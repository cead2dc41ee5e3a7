"""Meshes of GPUs against one of them: numbers of bf16, the same bit for bit from run to run, in graphs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from pab_kernels import Mesh, PABConfig, accelerate
from pab_kernels.blocks import sharded
from pab_kernels.distributed.exchange import BACKENDS
from pab_kernels.measure.benchmark import denoise, relative_error
from pab_kernels.measure.contenders import CONDITIONAL, Problem
from pab_kernels.workloads import WORKLOADS
from tests.distributed.rank_tools import on_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

SMALL: dict[str, dict[str, Any]] = {
    "open_sora-144p-2s": {"latent": (7, 18, 32), "model": {"depth": 2}},
    "open_sora-360p-2s": {"model": {"depth": 3}},
    "latte-16x512": {"latent": (16, 32, 32), "model": {"num_layers": 2}},
    "open_sora_plan_v120-29x480p": {"latent": (5, 30, 40), "model": {"num_layers": 2}},
    "wan_2_1-1.3b-480p-5s": {"latent": (5, 30, 40), "model": {"num_layers": 2}},
}
FP8 = ("open_sora-360p-2s",)
MESHES = (Mesh(2, 1), *(Mesh(1, 2, backend) for backend in BACKENDS if backend != "gloo"))
CASES = [(name, mesh) for name in SMALL for mesh in MESHES]


@torch.no_grad()
def denoised(name: str, mesh: Mesh | None) -> dict[str, Any]:
    """Latents of a run, of the same run from graphs, and after one that was aborted."""
    device = torch.device("cuda", torch.cuda.current_device())
    workload = dataclasses.replace(WORKLOADS[name], **SMALL[name])
    config = dataclasses.replace(PABConfig.preset(workload.family), linear_precision="fp8-all" if name in FP8 else None)
    problem = Problem.make(workload, config, device, torch.bfloat16, 12)
    forwards = workload.forwards_per_step
    with accelerate(problem.host, config, mesh=mesh, forwards_per_step=forwards, conditional=CONDITIONAL) as handle:
        runs = []
        for calls in (None, None, 4, None):
            handle.begin(problem.timesteps)
            latents = denoise(problem.host, problem, calls)
            if calls is None:
                runs.append(latents.cpu())
        report = handle.report()
        return {"runs": runs, "eager": report.eager, "graphs": report.graphs, "exchanges": report.exchanges}


def all_cases() -> dict[str, Any]:
    sharded.PIECE = 1  # what is as small as this moves in pieces too
    return {f"{name}, {mesh}, {mesh.backend}": denoised(name, mesh) for name, mesh in CASES}


alone = functools.cache(functools.partial(denoised, mesh=None))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than two GPUs")
    return on_ranks(2, all_cases, tmp_path_factory.mktemp("ranks"), gpus=True)


@pytest.mark.parametrize("name", SMALL)
def test_one_gpu_repeats_itself(name, device):
    _, second, third = alone(name)["runs"]
    assert torch.equal(second, third), f"differ by up to {float((second - third).abs().max())}"


@pytest.mark.parametrize(("name", "mesh"), CASES, ids=[f"{name}, {mesh}, {mesh.backend}" for name, mesh in CASES])
def test_two_gpus_give_what_one_gives(name, mesh, ranks):
    expected = alone(name)["runs"][-1]
    for rank in ranks:
        found = rank[f"{name}, {mesh}, {mesh.backend}"]
        assert found["eager"] is None
        assert found["graphs"] > 0
        _, second, third = found["runs"]
        assert torch.equal(second, third), f"differ by up to {float((second - third).abs().max())}"
        assert relative_error(second, expected) < 2e-2
        assert torch.equal(second, ranks[0][f"{name}, {mesh}, {mesh.backend}"]["runs"][1])
        if mesh.frames > 1:
            sent = [bytes_ for _, bytes_ in found["exchanges"].values()]
            assert 0 in sent
            assert max(sent) > 0
