"""`pab batch --gpus`: ranks that stay from row to row, here two that share a CPU; alone, and as an actor of Ray."""

import json
import signal

import psutil
import pytest

from pab_kernels.batch import group, on_ray, rows, work
from pab_kernels.batch.manifest import record
from pab_kernels.distributed.launch import RankError
from pab_kernels.distributed.mesh import Mesh
from pab_kernels.pipelines.loading import Source
from tests.batch_tools import check_whole, manifest, of_actors
from tests.cli_tools import pab, refused

ROWS = [{"prompt": f"a {word} star", "steps": 3, "seed": i} for i, word in enumerate(("red", "blue"))]


@pytest.fixture(scope="module")
def made(demo, tmp_path_factory):
    """A folder with a batch of two videos."""
    folder = tmp_path_factory.mktemp("group")
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    job = ("batch", folder / "prompts.jsonl", "--output", folder / "out", "--format", "gif", "--gpus", 2, "--json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        printed = pab(*job, "--model", demo, "--device", "cpu", "--quiet")
    assert json.loads(printed)["counts"] == {"done": 2, "failed": 0, "waiting": 0}
    return folder / "out"


def test_a_group_makes_the_videos_of_pab_generate(made, demo, tmp_path):
    """Bit for bit, the second one too, whose ranks have made one before."""
    check_whole(made)
    found = manifest(made)
    assert {row["mesh"] for row in found} == {"guidance=2,frames=1"}
    alone, last = tmp_path / "alone.gif", ("--prompt", ROWS[1]["prompt"], "--steps", 3, "--seed", 1)
    pab("generate", "--model", demo, "--device", "cpu", "--gpus", 2, "--quiet", "--output", alone, *last)
    assert (made / found[1]["file"]).read_bytes() == alone.read_bytes()


def test_a_row_that_fails_on_a_rank_ends_the_ranks_and_the_next_starts_them_anew(demo, tmp_path, monkeypatch):
    """But for what is no fault of the row: that ends the batch, or the actor."""
    errors = iter([
        RankError(1, "ValueError: prompt: got 'a unicorn'"), None,
        RankError(0, "RuntimeError: CUDA error: an illegal memory access"), RankError(1, "was killed", died=True),
        KeyboardInterrupt(),
    ])  # fmt: skip
    started = []

    class Ranks:
        def __init__(self, *args, **options):
            started.append(options)

        def call(self, name, row):
            if (error := next(errors)) is not None:
                raise error
            return record(row, "done")

    monkeypatch.setattr(group, "Group", Ranks)
    (row, _) = rows.plan(ROWS, "demo", rows.defaults("demo"), {})
    worker = group.GroupWorker(work.job(Source(str(demo)), str(tmp_path), gpus=2))
    assert worker.make(row)["error"] == "rank 1: ValueError: prompt: got 'a unicorn'"
    assert worker.make(row)["status"] == "done"
    for message in ("CUDA error", "was killed"):
        with pytest.raises(RankError, match=message):
            worker.make(row)
    with pytest.raises(KeyboardInterrupt):
        worker.make(row)
    worker.close()  # of nothing: it would hide what ended them
    assert started == [{"ranks": 2, "device": "cpu"}] * 4


def test_the_ranks_of_an_actor_that_is_killed_die_with_it(made, demo, tmp_path):
    """Its row fails, as often as it may be done again; the other is that of a group without Ray."""
    pytest.importorskip("ray")
    job = work.job(Source(str(demo)), str(tmp_path / "ray"), suffix=".gif", gpus=2)
    planned = rows.plan(ROWS, "demo", rows.defaults("demo"), {}, lambda _: Mesh(2, 1))
    before = set(psutil.Process().children(recursive=True))
    with on_ray.cluster():
        records = on_ray.on_ray(job, planned, workers=1, retries=0)
        found = [next(records)]
        (actor,) = of_actors("GroupWorker")
        ranks = [each for each in actor.children(recursive=True) if "spawn_main" in " ".join(each.cmdline())]
        assert len(ranks) == 2
        actor.send_signal(signal.SIGKILL)
        assert not psutil.wait_procs(ranks, timeout=20)[1]
        found += records
    assert found[0]["sha256"] == manifest(made)[0]["sha256"], found
    assert found[1]["error"].startswith("its worker died 1 times: ")
    left = [process for process in psutil.Process().children(recursive=True) if process not in before]
    assert not psutil.wait_procs(left, timeout=20)[1]


@pytest.mark.parametrize(
    ("error", "ends_all"),
    [
        (RankError(0, "FileNotFoundError: weights: x is not there"), True),
        (RankError(1, "RuntimeError: a bug", trace="where"), False),
        (RankError(1, "was killed by SIGKILL", died=True), False),
        (FileNotFoundError("weights: x is not there"), True),
        (OSError("a disk that is slow"), False),
    ],
    ids=str,
)
def test_what_every_actor_would_say_ends_the_batch(error, ends_all):
    assert on_ray._is_of_all(error) == ends_all


def test_a_row_of_another_mesh_is_another_video_and_one_without_a_mesh_fails():
    def mesh_of(row):
        if row.steps == 2:
            raise ValueError("gpus: got 2")
        return Mesh(2, 1)

    defaults = rows.defaults("demo", steps=3)
    (one,) = rows.plan(ROWS[:1], "demo", defaults, {})
    (two,) = rows.plan(ROWS[:1], "demo", {**defaults, "settings": "off"}, {}, mesh_of)
    assert one.id != two.id
    assert two.config is not None  # the model's own code knows no ranks
    (bad,) = rows.plan([{**ROWS[0], "steps": 2}], "demo", defaults, {}, mesh_of)
    assert bad.error == "gpus: got 2"


def test_groups_that_cannot_be_are_refused(prompts, demo, tmp_path):
    end = ("--model", demo, "--device", "cpu", "--output", tmp_path / "out")
    assert "which are 2 ranks, must be 1" in refused("batch", prompts(), *end, "--mesh", "frames=2")
    assert "of 24 rows can be made; row 1: gpus: got 64, over" in refused("batch", prompts(), *end, "--gpus", 64)
