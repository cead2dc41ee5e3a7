"""`pab batch --ray` on real Ray: three nodes on this machine, of which one goes, an actor that is killed, a bad row."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest

from pab_kernels.batch import on_ray, rows, work
from pab_kernels.pipelines.loading import Source
from tests.batch_tools import check_whole, manifest, of_actors, videos
from tests.cli_tools import pab

ray = pytest.importorskip("ray")
pytest.importorskip("ray.cluster_utils")
NODE: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20, "include_dashboard": False}
DONE_BEFORE = 4
"""Videos after which the actor is killed; after as many more, the node is taken away."""


def wait_for(what, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


@pytest.fixture
def nodes(monkeypatch):
    """A cluster of three nodes with a CPU each, and its address; all of its processes end with the test."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    before = set(psutil.Process().children(recursive=True))
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        others = [cluster.add_node(**NODE) for _ in range(2)]
        yield cluster, others
    finally:
        cluster.shutdown()
        left = [process for process in psutil.Process().children(recursive=True) if process not in before]
        _, alive = psutil.wait_procs(left, timeout=20)
        for process in alive:
            process.kill()
        assert not alive


def test_a_lost_node_a_killed_actor_and_a_bad_row_cost_one_video(nodes, prompts, demo, tmp_path):
    """23 files that equal those of a run without Ray, one failed row, nothing twice, nothing half written."""
    cluster, others = nodes
    path, out, alone = prompts(), tmp_path / "ray", tmp_path / "alone"
    lines = path.read_text().splitlines()
    lines[7] = json.dumps({"prompt": "a red unicorn", "steps": 2})
    path.write_text("\n".join(lines))
    common = ("--model", str(demo), "--device", "cpu", "--format", "gif", "--quiet", "--json")
    command = [sys.executable, "-m", "pab_kernels.cli", "batch", str(path), "--output", str(out), *common]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    driver = subprocess.Popen(
        [*command, "--workers", "3"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

    def made() -> int:
        assert driver.poll() is None, driver.communicate()
        return len(list((out / "videos").glob("[!.]*")))

    try:
        wait_for(lambda: made() >= DONE_BEFORE)
        victim = of_actors("Worker")[0]
        victim.send_signal(signal.SIGKILL)
        wait_for(lambda: made() >= 2 * DONE_BEFORE)
        cluster.remove_node(others[0], allow_graceful=False)
        printed, errors = driver.communicate(timeout=200)
    finally:
        driver.kill()
        driver.wait()
    assert driver.returncode == 1, errors
    summary = json.loads(printed)
    assert summary["counts"] == {"done": 23, "failed": 1, "waiting": 0}
    assert "'unicorn'" in next(iter(summary["errors"]))
    check_whole(out)
    pab("batch", path, "--output", alone, *common, code=1)
    assert videos(out) == videos(alone)
    assert len(videos(out)) == 23
    decided = [(row["id"], row["status"], row["sha256"]) for row in manifest(out)]
    assert decided == [(row["id"], row["status"], row["sha256"]) for row in manifest(alone)]


def test_what_dies_again_and_again_is_given_up(prompts, demo, tmp_path, monkeypatch):
    """A row that kills its workers fails, the others are made; a model that cannot be loaded ends it at once."""
    job = work.job(Source(str(demo)), str(tmp_path / "out"), suffix=".gif")
    defaults = rows.defaults("demo", steps=2)
    planned = rows.plan([{"prompt": f"a {word} star"} for word in ("red", "blue", "white")], "demo", defaults, {})

    class Dies(work.Worker):
        def make(self, row):
            return super().make(row) if "blue" not in row.prompt else os._exit(1)

    class Hangs(work.Worker):
        def make(self, row):
            return super().make(row) if "blue" not in row.prompt else time.sleep(600)

    class NeverLoads(work.Worker):
        def load(self, identity=None):
            os._exit(1)

    before, handler = set(psutil.Process().children(recursive=True)), signal.getsignal(signal.SIGTERM)
    with on_ray.cluster():
        monkeypatch.setattr(on_ray, "Worker", Dies)
        records = list(on_ray.on_ray(job, planned, workers=2, retries=1))
        assert sorted((each["row"], each["status"]) for each in records) == [(1, "done"), (2, "failed"), (3, "done")]
        (failed,) = (each for each in records if each["status"] == "failed")
        assert failed["error"].startswith("its worker died 2 times: ")
        monkeypatch.setattr(on_ray, "Worker", Hangs)
        records = list(on_ray.on_ray(job, planned, workers=2, retries=0, timeout=60))
        assert {each["row"]: each["error"] for each in records} == {
            1: None, 3: None, 2: "its worker died 1 times: TimeoutError: it was not done after 60 s"
        }  # fmt: skip
        monkeypatch.setattr(on_ray, "Worker", NeverLoads)
        with pytest.raises(ChildProcessError, match="2 workers died while they loaded the model"):
            list(on_ray.on_ray(job, planned, workers=1, retries=1))
        monkeypatch.setattr(on_ray, "Worker", work.Worker)
        elsewhere = dataclasses.replace(job, source=Source("latte", weights=str(tmp_path / "none")))
        with pytest.raises(FileNotFoundError, match="none"):
            list(on_ray.on_ray(elsewhere, planned, workers=1))
    assert signal.getsignal(signal.SIGTERM) is handler
    left = [process for process in psutil.Process().children(recursive=True) if process not in before]
    assert not psutil.wait_procs(left, timeout=20)[1]


def test_other_weights_than_the_drivers_are_refused(demo, tmp_path):
    job = work.job(Source(str(demo)), str(tmp_path))
    with pytest.raises(ValueError, match="a worker has another weights than the driver"):
        work.Worker(job).load({**job.identity(), "weights": []})
