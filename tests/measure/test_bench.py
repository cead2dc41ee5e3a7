"""`pab bench` at tiny scale, and the floor against the project's table."""

import csv
import dataclasses
import functools
import json
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn
from typer.testing import CliRunner

from pab_kernels import PABConfig, Schedule, StepVariant
from pab_kernels.blocks.block import BlockStack
from pab_kernels.cli.bench import bench
from pab_kernels.measure import benchmark
from pab_kernels.measure.benchmark import check, denoise, measure, measure_floor, relative_error
from pab_kernels.measure.contenders import CONTENDERS, Problem, Session
from pab_kernels.measure.floor import Ceilings, Work, measure_copy, measure_gemms, run_work, step_work
from pab_kernels.models import adapter_for
from pab_kernels.models.checkpoints import build
from pab_kernels.plain import PlainPAB
from pab_kernels.workloads import WORKLOADS, workload
from tests.problem_tools import WORKLOADS_OF_FAMILIES, problem

H100 = Ceilings(690e12, 2.94e12)
FLOORS = {  # seconds without PAB and with the preset, at those ceilings
    "open_sora-144p-2s": (0.47, 0.39),
    "open_sora-240p-2s": (1.35, 1.09),
    "open_sora-360p-2s": (3.15, 2.54),
    "open_sora-480p-2s": (5.63, 4.54),
    "open_sora-720p-2s": (13.96, 11.39),
    "open_sora-480p-8s": (22.55, 18.58),
    "latte-16x512": (5.75, 4.68),
    "open_sora_plan_v110-65x512-150": (18.36, 14.41),
    "open_sora_plan_v120-29x480p": (6.68, 4.97),
    "open_sora_plan_v120-93x480p": (114.0, 79.3),
}

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(bench)


@functools.cache
def full_stack(family: str) -> BlockStack:
    """The blocks of a released model without its weights."""
    return adapter_for(nn.Module.to(build(family), dtype=torch.bfloat16)).stack


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["--scale", "tiny", "--device", "cpu", *map(str, arguments)])


@pytest.mark.parametrize("name", FLOORS)
def test_floors_are_those_of_the_table(name: str) -> None:
    run = WORKLOADS[name]
    stack = full_stack(run.family)
    shape = (2, *run.grid, stack.channels)
    for config, expected in zip((PABConfig(), PABConfig.preset(run.family)), FLOORS[name], strict=True):
        seconds = run_work(stack, Schedule(config, run.timesteps()), shape, run.text_used).seconds(H100)
        assert seconds == pytest.approx(expected, rel=0.01)


def test_work_of_one_step_counted_by_hand() -> None:
    stack = full_stack("latte")
    pair = BlockStack(stack.blocks[:2])
    rows, c, tensor = 2 * 3 * 5, 1152, 2 * 3 * 5 * 1152 * 2
    schedule = Schedule(PABConfig.preset("latte"), [500.0])

    def work(**broadcast: Any) -> tuple[float, float]:
        found = step_work(pair, schedule, StepVariant(**broadcast), (2, 3, 5, c), text=7)
        return found.flops, found.nbytes

    mlp, attention, cross = 2 * rows * 8 * c * c, 2 * rows * 4 * c * c, 2 * rows * 2 * c * c + 4 * rows * 7 * c
    spatial, temporal = attention + 4 * rows * 5 * c, attention + 4 * rows * 3 * c
    # A branch's output is read once; a pass before one that is computed reads and writes the stream, and writes the
    # GEMM's input unless that is the stream itself. Temporal attention moves four tensors more.
    assert work() == (2 * mlp + spatial + temporal + cross, tensor * ((4 + 3 + 4) + (4 + 4 + 4)))
    assert work(spatial=True, cross=True) == (2 * mlp + temporal, tensor * ((1 + 1 + 4) + (4 + 4 + 4)))
    assert work(spatial=True, temporal=True, cross=True) == (2 * mlp, tensor * ((1 + 1 + 4) + (1 + 4)))


def test_blocks_outside_the_range_and_broadcast_mlps_are_counted() -> None:
    stack, shape = full_stack("latte"), (2, 16, 64, 1152)
    timesteps = [float(t) for t in range(700, 300, -40)]
    settings: dict[str, Any] = {"spatial_broadcast": True, "spatial_threshold": (100, 800), "spatial_range": 2}

    def flops(**more: Any) -> float:
        return run_work(stack, Schedule(PABConfig(**settings, **more), timesteps), shape, 60).flops

    everywhere, half = flops(), flops(spatial_block=(0, 14))
    nowhere = run_work(stack, Schedule(PABConfig(), timesteps), shape, 60).flops
    assert nowhere - half == pytest.approx((nowhere - everywhere) / 2)
    rows = 2 * 16 * 64
    saved = everywhere - flops(mlp_broadcast=True, mlp_threshold=(100, 800), mlp_range=2, mlp_block=(0, 2))
    assert saved == pytest.approx(5 * 4 * 2 * rows * 8 * 1152**2)  # 5 calls, 2 blocks of both kinds


def test_ceilings_are_measured() -> None:
    adapter = adapter_for(problem("latte-16x512").host)
    assert 1e6 < measure_gemms(adapter.stack, 64, seconds=0.001) < 1e15
    assert 1e6 < measure_gemms(adapter.stack, 64, seconds=0.001, fp8=True) < 1e15
    adapter.restore()  # the problem is other tests', too
    assert 1e6 < measure_copy(torch.device("cpu"), 2**16, seconds=0.001) < 1e13
    floor = measure_floor(problem("open_sora-144p-2s"))
    assert floor.shape == (2, 5, 12, 24)
    assert 0 < floor.seconds(True) < floor.seconds(False)
    with pytest.raises(ValueError, match=r"ceilings\.fp8_flops: is None, must be measured"):
        floor.seconds(True, fp8=True)


def test_only_gemms_of_blocks_gain_from_fp8() -> None:
    work = Work(gemms=6.0, attention=2.0, nbytes=10.0)
    assert work.seconds(Ceilings(2.0, 5.0, 3.0)) == 6 / 2 + 2 / 2 + 10 / 5
    assert work.seconds(Ceilings(2.0, 5.0, 3.0), fp8=True) == 6 / 3 + 2 / 2 + 10 / 5


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_fit_together(name: str) -> None:
    run = workload(name)
    assert len(run.timesteps()) == run.steps
    assert all(now > after for now, after in zip(run.timesteps(), run.timesteps()[1:], strict=False))
    frames, height, width = run.latent
    compression = {"ltx": 32, "wan_2_2": 16}.get(run.family, 8)
    assert (height, width) == (run.pixels[1] // compression, run.pixels[2] // compression)
    patch = 1 if run.family == "ltx" else 2
    assert run.grid == (frames, math.ceil(height / patch) * math.ceil(width / patch))
    assert run.text_used <= run.text


def test_an_unknown_workload_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'open_sora-480-2s', did you mean open_sora-480p-2s\?"):
        workload("open_sora-480-2s")


@pytest.mark.parametrize("name", [*WORKLOADS_OF_FAMILIES, "wan_2_1-14b-480p-5s", "wan_2_2-5b-720p-5s", "ltx-480p-6s"])
def test_contenders_agree_and_leave_the_host_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kwargs: compile_module(self, backend="eager", **kwargs))
    made = dataclasses.replace(problem(name), compile_scope="blocks")
    expected = denoise(made.host, made)
    latents: dict[str, Tensor] = {}
    for contender in (name for name, contender in CONTENDERS.items() if not contender.fp8):
        if contender == "hook" and made.workload.family != "latte":
            continue
        timing = measure(contender, made, repeats=2, budget=600)  # a busy machine takes long
        assert timing.error is None
        assert len(timing.runs) == 2
        assert timing.latents is not None
        latents[contender] = timing.latents
        assert torch.equal(denoise(made.host, made), expected), f"{contender} changed the host"
        assert not any("forward" in module.__dict__ for module in made.host.modules())
    effect = relative_error(latents["plain"], latents["eager"])
    assert effect > 1e-3
    for contender, result in latents.items():
        near = {"hook": effect, "runtime+pab8": 5e-2}.get(contender, 1e-5)  # the hook gates anew what it broadcasts
        assert relative_error(result, latents[CONTENDERS[contender].like]) < near
    assert max(check(made)) < 1e-5


def test_diffusers_hook_takes_every_kind_at_its_own_range() -> None:
    made = problem("latte-16x512")
    calls: Counter[str] = Counter()

    def count(kind: str, module: nn.Module, args: Any) -> None:
        calls[kind] += 1

    hooks = []
    for name, module in made.host.named_modules():
        if name.endswith(("attn1.to_q", "attn2.to_q")):  # runs only when the attention is computed
            kind = "cross" if "attn2" in name else "temporal" if "temporal" in name else "spatial"
            hooks.append(module.register_forward_pre_hook(functools.partial(count, kind)))
    plan = Schedule(made.config, made.timesteps)
    with CONTENDERS["hook"].open(made, made.config) as session:
        for _ in range(2):
            calls.clear()
            session.begin(made.timesteps)
            denoise(session.model, made)
            for kind in ("spatial", "temporal", "cross"):
                assert calls[kind] == 2 * (len(plan) - plan.broadcast_count(kind)), kind
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", ["latte-16x512", "wan_2_1-1.3b-480p-5s"])
def test_a_runtime_is_warm_once_all_forwards_of_all_variants_are_captured(name: str, monkeypatch) -> None:
    """With a stand-in that captures as the runtime does on a GPU: what comes up the second time, for each forward."""
    made = problem(name)
    plan, forwards = Schedule(made.config, made.timesteps), made.workload.forwards_per_step
    seen: Counter[StepVariant] = Counter()

    def run(model: nn.Module, problem: Problem, steps: int) -> None:
        seen.update(Schedule(made.config, problem.timesteps)[:steps])

    monkeypatch.setattr(benchmark, "denoise", run)
    graphs: Any = lambda: SimpleNamespace(graphs=forwards * sum(count > 1 for count in seen.values()))  # noqa: E731
    session: Any = Session(made.host, report=graphs)
    benchmark._warm_up(session, made, made.config)
    assert min(seen[variant] for variant in set(plan)) >= 2
    assert seen.total() < len(plan)  # of a run of fewer steps
    assert graphs().graphs == forwards * len(set(plan))
    seen.clear()
    benchmark._warm_up(Session(made.host), made, made.config)
    assert seen.total() == 2 // forwards


@pytest.mark.gpu
def test_graphs_and_memory_are_reported(device: str) -> None:
    short = dataclasses.replace(WORKLOADS["open_sora-144p-2s"], model={"depth": 2})
    made = Problem.make(short, PABConfig.preset("open_sora"), torch.device(device), torch.bfloat16)
    plain, ours = (measure(name, made, repeats=2, budget=10) for name in ("plain", "runtime+pab"))
    assert plain.error is None
    assert ours.error is None
    assert ours.report is not None
    assert ours.report.graphs == len(set(Schedule(made.config, made.timesteps)))
    assert plain.latents is not None
    assert ours.latents is not None
    assert relative_error(ours.latents, plain.latents) < 3e-2
    assert plain.peak_bytes is not None
    assert plain.peak_bytes > 2**20
    floor = measure_floor(made)
    assert floor.gemm_filled is not None
    assert 0 < floor.seconds(True) < floor.seconds(False)
    assert max(check(made)) < 3e-2


def test_a_budget_limits_the_runs_but_one_is_made() -> None:
    assert len(measure("eager", problem("latte-16x512"), repeats=5, budget=0).runs) == 1


def test_what_is_not_finite_is_not_timed() -> None:
    made = problem("latte-16x512")
    broken = dataclasses.replace(made, timesteps=[math.nan] * len(made.timesteps))
    timing = measure("eager", broken, repeats=1, budget=0)
    assert timing.seconds is None
    assert timing.error is not None
    assert "finite" in timing.error
    assert relative_error(torch.tensor([math.nan]), torch.ones(1)) == math.inf


@pytest.mark.parametrize("name", WORKLOADS_OF_FAMILIES)
def test_the_command_prints_and_writes(name: str, tmp_path) -> None:
    json_file, csv_file = tmp_path / "new" / "bench.json", tmp_path / "results.csv"
    for _ in range(2):
        outcome = invoke("--workload", name, "--steps", 8, "--repeats", 2, "--json", json_file, "--csv", csv_file)
        assert outcome.exit_code == 0, outcome.output
    for words in ("this runtime, PAB", "of floor", "ceilings", "first step against the eager host", "broadcast"):
        assert words in outcome.output
    assert not list(tmp_path.rglob("*.partial"))
    found = json.loads(json_file.read_text())
    rows = {row["name"]: row for row in found["contenders"]}
    hook = {"hook"} if name.startswith("latte") else set()
    assert set(rows) == {"eager", "plain", "runtime", "runtime+pab", "runtime+pab8"} | hook
    assert len(found["timesteps"]) == 8
    assert found["check"]["within"]
    eager, ours = rows["eager"], rows["runtime+pab"]
    assert eager["against_eager"] == 1
    assert ours["against_eager"] == pytest.approx(eager["seconds"] / ours["seconds"])
    assert ours["floor_share"] == pytest.approx(found["floor"]["with PAB"]["seconds"] / ours["seconds"])
    assert ours["frames_per_second"] == pytest.approx(found["video"][0] / ours["seconds"])
    assert sum(count for count, _ in ours["variants"].values()) == 8
    assert ours["difference"] < 1e-4
    with csv_file.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["backend"] for line in lines] == 2 * list(rows)
    (line,) = [line for line in lines[len(rows) :] if line["backend"] == "runtime+pab"]
    assert float(line["ms"]) == pytest.approx(ours["seconds"] * 1e3, abs=0.01)


def test_rows_go_under_the_columns_that_the_file_has(tmp_path) -> None:
    csv_file = tmp_path / "results.csv"
    csv_file.write_text("gpu,backend,note,ms\n")
    assert invoke("--workload", "latte-16x512", "--runs", "eager", "--csv", csv_file).exit_code == 0
    gpu, backend, note, ms = csv_file.read_text().splitlines()[1].split(",")
    assert (gpu, backend, note) == ("CPU", "eager", "")
    assert float(ms) > 0


def test_one_contender_that_fails_does_not_cost_the_others(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlainPAB, "begin", lambda *args: 1 / 0)
    outcome = invoke("--workload", "latte-16x512", "--steps", 4, "--json", tmp_path / "a.json")
    assert outcome.exit_code == 1
    rows = {row["name"]: row for row in json.loads((tmp_path / "a.json").read_text())["contenders"]}
    assert "ZeroDivisionError" in rows["plain"]["error"]
    assert rows["plain"]["seconds"] is None
    assert rows["runtime+pab"]["against_plain"] is None
    assert rows["runtime+pab"]["seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--workload", "latte"), "latte-16x512"),
        (("--workload", "open_sora-144p-2s", "--runs", "eager,hook"), "only fits latte"),
        (("--workload", "latte-16x512", "--runs", "eager,fast"), "fast"),
        (("--workload", "latte-16x512", "--pab", "off"), "off"),
        (("--workload", "latte-16x512", "--runs", "runtime-fp8"), "must be without fp8: fp8 linears need bfloat16"),
        (("--workload", "latte-16x512", "--runs", "runtime-fp8", "--dtype", "bfloat16"), "fp8 GEMMs need a CUDA GPU"),
        (("--workload", "latte-16x512", "--pab", "latte:999"), "999"),
        (("--workload", "latte-16x512", "--dtype", "int8"), "int8"),
        (("--workload", "latte-16x512", "--compile-scope", "all"), "all"),
    ],
)
def test_wrong_options_are_named(arguments: tuple[str, ...], words: str) -> None:
    outcome = invoke(*arguments)
    assert outcome.exit_code == 2
    assert words in outcome.output
