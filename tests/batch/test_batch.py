"""`pab batch` in one process: the manifest, failures, going on, and being killed at any moment."""

import json
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from pab_kernels.batch import manifest as manifests
from pab_kernels.batch.store import Store
from pab_kernels.files import LEFT_OVER, alone
from pab_kernels.pipelines.demo import DemoPipeline
from pab_kernels.runtime.handle import PABHandle
from tests.batch_tools import check_whole, manifest, videos
from tests.cli_tools import RUNNER, invoke, pab, refused

KILLS = 10


@pytest.fixture
def batch(demo, tmp_path):
    """A function that runs `pab batch` on the tiny model into a folder."""

    def run(prompts, output=None, *more, code=0):
        output = output or tmp_path / "out"
        arguments = ("batch", prompts, "--output", output, "--model", demo, "--device", "cpu", "--format", "gif")
        return json.loads(pab(*arguments, "--quiet", "--json", *more, code=code).partition("\nerror:")[0])

    return run


def test_every_row_becomes_a_video_and_a_row(batch, prompts, tmp_path):
    summary = batch(prompts())
    assert summary["counts"] == {"done": 24, "failed": 0, "waiting": 0}
    assert (summary["made"], summary["repeated"], summary["stopped"], summary["errors"]) == (24, 0, False, {})
    assert summary["videos_per_hour"] == pytest.approx(24 * 3600 / summary["seconds"])
    check_whole(tmp_path / "out")
    rows = manifest(tmp_path / "out")
    assert [row["row"] for row in rows] == list(range(1, 25))
    assert all(row["seconds"] >= row["denoising_seconds"] > 0 for row in rows)
    assert {(row["version"], row["settings"], row["gpu"]) for row in rows} == {("0.1.0", "latte", None)}


def test_a_video_is_that_of_pab_generate(batch, prompts, demo, tmp_path):
    batch(prompts({"prompt": "a red star", "seed": 5, "steps": 3, "settings": "off"}, {"prompt": "a red circle"}))
    alone_, arguments = tmp_path / "v.gif", ("--prompt", "a red star", "--seed", 5, "--steps", 3, "--pab", "off")
    pab("generate", "--model", demo, "--device", "cpu", "--output", alone_, *arguments, "--quiet")
    (row, _) = manifest(tmp_path / "out")
    assert (tmp_path / "out" / row["file"]).read_bytes() == alone_.read_bytes()


def test_the_second_run_makes_only_what_is_missing(batch, prompts, tmp_path):
    path, out = prompts(), tmp_path / "out"
    batch(path)
    before = videos(out)
    times = {file.name: file.stat().st_mtime_ns for file in (out / "videos").iterdir()}
    assert batch(path)["made"] == 0
    gone, cut = sorted((out / "videos").iterdir())[:2]
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    assert batch(path)["made"] == 2
    assert videos(out) == before
    same = {file.name for file in (out / "videos").iterdir() if file.stat().st_mtime_ns == times[file.name]}
    assert same == set(before) - {gone.name, cut.name}


def test_there_is_a_bar_where_there_is_something_to_do(demo, prompts, tmp_path):
    path, out = prompts({"prompt": "a red star", "steps": 2}), tmp_path / "out"
    first, second = (
        invoke("batch", path, "--output", out, "--model", demo, "--device", "cpu", "--format", "gif") for _ in range(2)
    )
    assert "1/1" in first.stderr
    assert (second.exit_code, second.stderr) == (0, "")
    assert "0 made" in second.stdout


def test_a_bad_row_fails_and_the_rest_goes_on(batch, prompts, tmp_path):
    rows = [{"prompt": "a red star", "steps": 2}, {"prompt": "a red unicorn"}, {"prompt": "a blue star", "steps": -1}]
    summary = batch(prompts(*rows), code=1)
    assert summary["counts"] == {"done": 1, "failed": 2, "waiting": 0}
    good, unknown, steps = manifest(tmp_path / "out")
    assert good["status"] == "done"
    assert "'unicorn'" in unknown["error"]
    assert steps["error"] == "steps: num_inference_steps must be in [1, 1000], got -1"
    assert batch(prompts(*rows), None, code=1)["made"] == 0
    assert batch(prompts(rows[0], {"prompt": "a red square", "steps": 2}))["counts"]["failed"] == 0
    check_whole(tmp_path / "out")
    assert [row["status"] for row in manifest(tmp_path / "out")] == ["done", "done"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("bug"), OSError("disk full")])
def test_a_run_that_fails_is_a_failed_row_and_the_next_is_right(error, batch, prompts, tmp_path, monkeypatch):
    path = prompts()
    batch(path, tmp_path / "right")
    original, calls = DemoPipeline.__call__, []

    def fail_once(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DemoPipeline, "__call__", fail_once)
    summary = batch(path, code=1)
    assert summary["counts"] == {"done": 23, "failed": 1, "waiting": 0}
    assert str(error) in next(iter(summary["errors"]))
    check_whole(tmp_path / "out")
    assert batch(path)["made"] == 1
    assert videos(tmp_path / "out") == videos(tmp_path / "right")


def test_a_gpu_that_is_lost_ends_the_run_and_fails_no_row(batch, prompts, tmp_path, monkeypatch):
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(DemoPipeline, "__call__", lambda *args, **kwargs: (_ for _ in ()).throw(lost))
    with pytest.raises(RuntimeError, match="CUDA error"):
        batch(prompts())
    assert {row["status"] for row in manifest(tmp_path / "out")} == {"waiting"}


def test_what_is_not_finite_is_no_video(batch, prompts, tmp_path, monkeypatch):
    original = DemoPipeline.__call__
    monkeypatch.setattr(DemoPipeline, "__call__", lambda *args, **kwargs: original(*args, **kwargs) * float("nan"))
    summary = batch(prompts({"prompt": "a red star", "steps": 2}), code=1)
    assert summary["errors"] == {"the result is not finite": 1}
    check_whole(tmp_path / "out")


def test_too_many_failures_stop_it(batch, prompts, tmp_path):
    bad = [{"prompt": f"a {word} star", "steps": 2} for word in ("pink", "grey", "black", "brown")]
    rows = [*bad, *({"prompt": "a red star", "steps": 3, "seed": i} for i in range(3))]
    summary = batch(prompts(*rows), None, "--max-failures", 2, code=1)
    assert summary["stopped"]
    assert summary["counts"] == {"done": 0, "failed": 3, "waiting": 4}
    assert batch(prompts(*rows), None, "--max-failures", 4, code=1)["counts"] == {"done": 3, "failed": 4, "waiting": 0}


def test_a_runtime_serves_all_rows_of_its_settings(batch, prompts, monkeypatch):
    made, original = [], PABHandle.__init__

    def counted(*args, **kwargs):
        made.append(1)
        original(*args, **kwargs)

    monkeypatch.setattr(PABHandle, "__init__", counted)
    batch(prompts(*({"prompt": "a red star", "seed": i, "steps": 2, "settings": ("latte", "fast")[i % 2]}
                    for i in range(6))), None, "--pab", "off", code=1)  # fmt: skip
    assert len(made) == 1  # "fast" is no preset: those rows fail before
    batch(prompts())
    assert len(made) == 2


def test_ctrl_c_leaves_a_manifest_that_goes_on(batch, prompts, demo, tmp_path, monkeypatch):
    path, original, calls = prompts(), DemoPipeline.__call__, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DemoPipeline, "__call__", interrupted)
    arguments = ("batch", path, "--output", tmp_path / "out", "--model", demo, "--device", "cpu", "--format", "gif")
    assert invoke(*arguments).exit_code == 130
    check_whole(tmp_path / "out")
    assert [row["status"] for row in manifest(tmp_path / "out")].count("done") == 4
    assert batch(path)["made"] == 20


def _driver(arguments):
    torch.set_num_threads(1)
    result = RUNNER.invoke(__import__("pab_kernels.cli", fromlist=["app"]).app, arguments)
    assert result.exit_code == 0, result.output


def test_kill_9_at_any_moment_leaves_a_batch_that_goes_on(batch, prompts, demo, tmp_path):
    """Ten drivers are killed while they work, the next one ends it; no file differs from those of a run in peace."""
    path, out = prompts(), tmp_path / "killed"
    start = time.monotonic()
    batch(path, tmp_path / "peace")
    whole = time.monotonic() - start
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pab_kernels.cli", "pab_kernels.batch.on_ray", "tests.batch.test_batch"])
    arguments = [str(word) for word in (
        "batch", path, "--output", out, "--model", demo, "--device", "cpu", "--format", "gif", "--quiet",
    )]  # fmt: skip
    chance, states = random.Random(0), [0]

    def made() -> int:
        return len(list((out / "videos").glob("[!.]*")))

    for _ in range(KILLS):
        driver = context.Process(target=_driver, args=(arguments,))
        driver.start()
        while driver.is_alive() and made() == states[-1]:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 2 * whole / 24))
        driver.kill()
        driver.join()
        assert driver.exitcode in (-signal.SIGKILL, 0)
        states.append(made())
        for row in manifest(out):  # what it says is so, at any moment
            assert row["status"] != "done" or (out / row["file"]).stat().st_size == row["bytes"]
    assert batch(path, out)["counts"] == {"done": 24, "failed": 0, "waiting": 0}
    check_whole(out)
    assert videos(out) == videos(tmp_path / "peace")
    assert len({state for state in states if 0 < state < 24}) >= 3  # killed in the middle, again and again


def test_two_drivers_do_not_share_a_folder(batch, prompts, demo, tmp_path):
    with alone(tmp_path / "out" / ".pab-batch.lock"):
        arguments = ("batch", prompts(), "--output", tmp_path / "out", "--model", demo, "--device", "cpu", "--quiet")
        assert "another process is at work" in refused(*arguments)
        assert "offload_text: got it for demo" in refused(*arguments, "--offload-text")
    assert batch(prompts())["made"] == 24


def test_a_store_of_fsspec_holds_the_same_files(batch, prompts, tmp_path):
    import fsspec

    path = prompts()
    batch(path)
    summary = batch(path, "memory://bucket/batch")
    assert summary["counts"]["done"] == 24
    memory = fsspec.filesystem("memory")
    names = {Path(name).name for name in memory.find("/bucket/batch/videos")}
    assert names == set(videos(tmp_path / "out"))
    for name, data in memory.cat("/bucket/batch/videos/*").items():
        assert data == (tmp_path / "out" / "videos" / Path(name).name).read_bytes()
    memory.rm(f"/bucket/batch/videos/{min(names)}")
    assert batch(path, "memory://bucket/batch")["made"] == 1
    assert json.loads(pab("batch", "--status", "memory://bucket/batch", "--json"))["counts"]["done"] == 24
    assert batch(path, f"file://{tmp_path}/out")["made"] == 0
    assert "fsspec cannot open" in refused("batch", path, "--output", "nowhere://bucket", "--device", "cpu")
    memory.rm("/bucket", recursive=True)


def test_nothing_is_left_of_a_file_that_fails(tmp_path):
    for store in (Store(str(tmp_path)), Store("memory://fails")):
        with pytest.raises(OSError, match="no"), store.new("videos/a.gif") as path:
            raise OSError("no")
        assert store.sizes("videos") == {}
        assert not path.exists()
    assert not list(tmp_path.rglob(LEFT_OVER))


def test_status_is_what_the_manifest_says(batch, prompts, tmp_path):
    batch(prompts({"prompt": "a red star", "steps": 2}, {"prompt": "a red unicorn"}), code=1)
    out = tmp_path / "out"
    output = pab("batch", "--status", out)
    assert "1 done, 1 failed, 0 waiting" in output
    assert "'unicorn'" in output
    assert "rows of the file that failed: 2" in output
    found = json.loads(pab("batch", "--status", out, "--json"))
    assert found["failed_rows"] == [2]
    assert found["counts"] == {"done": 1, "failed": 1, "waiting": 0}
    assert found["median_seconds"] > 0
    assert "has no manifest.jsonl" in refused("batch", "--status", tmp_path / "none")
    (out / manifests.NAME).write_text('{"id": 3}\n')
    assert "line 1 of its manifest.jsonl is no row" in refused("batch", "--status", out)


def test_wrong_options_end_before_the_model_is_loaded(prompts, demo, tmp_path, monkeypatch):
    monkeypatch.setattr(DemoPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    path = prompts({"prompt": "a red star"})
    end = ("--model", demo, "--device", "cpu", "--output", tmp_path / "out")
    assert "got both or neither" in refused("batch")
    assert "must end in .jsonl" in refused("batch", tmp_path / "a.txt", *end)
    assert "format: got 'avi', must be mp4 or gif" in refused("batch", path, "--format", "avi", *end)
    assert "pab: got 'none'" in refused("batch", path, "--pab", "none", *end)
    assert "pab: got 'latte:fsat': variant: got 'fsat', must" in refused("batch", path, "--pab", "latte:fsat", *end)
    for option in ("workers", "timeout"):
        assert f"{option}: got 3, must be left out without --ray" in refused("batch", path, f"--{option}", 3, *end)
    assert "must be a folder" in refused("batch", "--status", path)
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    assert f"prompts: got {folder}, must be a file" in refused("batch", folder, *end)
    assert "none of 1 rows can be made; row 1: seed" in refused("batch", prompts({"prompt": "a", "seed": "x"}), *end)
    (tmp_path / "file").write_text("")
    assert "output" in refused("batch", prompts(), "--model", demo, "--device", "cpu", "--output", tmp_path / "file")
    assert not (tmp_path / "out").exists()
