"""The report of a benchmark: one result as Markdown with pictures, and as a page that needs nothing else."""

import copy
import json
import re
from typing import Any

import pytest
from typer.testing import CliRunner

from pab_kernels.cli import app
from pab_kernels.config import PABConfig
from pab_kernels.measure import report, result_files
from pab_kernels.measure.figures import memory_bars, speed_bars, timeline
from pab_kernels.schedule import Schedule

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny benchmark's JSON, the folder of its report, and what the command printed."""
    folder = tmp_path_factory.mktemp("bench")
    outcome = RUNNER.invoke(
        app,
        [
            *("bench", "--workload", "latte-16x512", "--scale", "tiny", "--device", "cpu", "--repeats", "1"),
            *("--runs", "eager,plain,runtime,runtime+pab", "--pab", "latte:347"),
            *("--json", str(folder / "a.json"), "--report", str(folder / "report")),
        ],
    )
    assert outcome.exit_code == 0, outcome.output
    return result_files.load(folder / "a.json"), folder / "report", outcome.output


@pytest.fixture
def result(made) -> dict[str, Any]:
    return copy.deepcopy(made[0])


def widths(axes: Any) -> list[float]:
    return [bar.get_width() for bar in axes.patches]


def test_steps_are_timed_one_by_one(result):
    for row in result["contenders"]:
        assert len(row["step_seconds"]) == len(result["timesteps"])
        assert all(seconds > 0 for seconds in row["step_seconds"])
        assert sum(row["step_seconds"]) <= row["runs"][-1]


def test_the_command_repeats_the_run_and_nothing_more(result):
    assert result["command"] == (
        "pab bench --workload latte-16x512 --runs eager,plain,runtime,runtime+pab --repeats 1 --pab latte:347 "
        "--scale tiny --device cpu"
    )


def test_the_report_holds_what_was_measured(made):
    result, folder, output = made
    assert f"wrote {folder / 'report.html'}" in output
    text = (folder / "report.md").read_text()
    for row in result["contenders"]:
        line = next(line for line in text.splitlines() if line.startswith(f"| {row['label']} | {row['seconds']:.3f}"))
        assert f"| {row['floor_share']:.3f} |" in line
    for words in (result["command"], result["machine"]["cpu"], result["versions"]["torch"], "cross_range: 7"):
        assert words in text
    plan = Schedule(PABConfig.preset("latte", "347"), result["timesteps"])
    assert f"in 12 steps: spatial {plan.broadcast_count('spatial')}, temporal " in text
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert [name.rsplit("-", 1)[1] for name in pictures] == ["speed.svg", "floor.svg", "steps.svg", "schedule.svg"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(["report.html", "report.md", *pictures])


def test_the_page_needs_no_other_file(made):
    page = (made[1] / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert len(sources) == 4
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert page.count("<table>") == 4
    assert "runtime, PAB</td>" in page


def test_several_results_make_one_page_and_the_same_bytes_again(result, tmp_path):
    other = result | {"workload": "open_sora-144p-2s"}
    for name, each in (("a.json", result), ("b.json", other)):
        (tmp_path / name).write_text(json.dumps(each))
    pages = []
    for _ in range(2):
        files = [str(tmp_path / name) for name in ("a.json", "b.json")]
        outcome = RUNNER.invoke(app, ["report", *files, "--output", str(tmp_path / "out")])
        assert outcome.exit_code == 0, outcome.output
        pages.append((tmp_path / "out" / "report.html").read_bytes())
    assert pages[0] == pages[1]
    assert pages[0].count(b"<h2>") == 2
    assert (tmp_path / "out" / "open_sora-144p-2s-steps.svg").is_file()


def test_bars_show_ratios_and_only_measured_memory(result):
    contenders = result["contenders"]
    assert widths(speed_bars(contenders).axes[0]) == pytest.approx(
        [contenders[0]["seconds"] / row["seconds"] for row in contenders]
    )
    assert memory_bars(contenders) is None
    contenders[-1] |= {"peak_bytes": 3 * 2**30, "cache_bytes": 2**30}
    figure = memory_bars(contenders)
    assert figure is not None
    assert widths(figure.axes[0]) == [3, 1]


def test_the_timeline_has_every_step_in_its_place(result):
    config = PABConfig.from_dict(result["pab"])
    plans = {pab: Schedule(config if pab else PABConfig(), result["timesteps"]) for pab in (False, True)}
    ours = result["contenders"][-1]
    above, below = timeline([ours], plans).axes
    mark: Any = above.collections[0]
    assert mark.get_segments()[0][0][0] == pytest.approx(ours["floor_share"] * ours["seconds"])
    assert widths(above) == pytest.approx(ours["step_seconds"])
    assert above.patches[-1].get_extents().x1 > above.patches[-2].get_extents().x1
    assert len({bar.get_facecolor() for bar in below.patches}) == len(set(plans[True]))


def test_what_failed_is_in_the_report(result, tmp_path):
    result["contenders"][1] |= {"seconds": None, "runs": [], "step_seconds": [], "error": "RuntimeError: a | b <c>"}
    report.write([result], tmp_path)
    assert "| PAB, plain form | failed |" in (tmp_path / "report.md").read_text()
    assert "PAB, plain form failed: RuntimeError: a | b &lt;c&gt;" in (tmp_path / "report.html").read_text()
    for row in result["contenders"]:
        row["seconds"] = None
    report.write([result], tmp_path / "none")
    assert not list((tmp_path / "none").glob("*-speed.svg"))


@pytest.mark.parametrize("content", ["nonsense", "[]", '{"workload": "latte-16x512", "contenders": []}'])
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    outcome = RUNNER.invoke(app, ["report", str(tmp_path / "a.json"), "--output", str(tmp_path / "out")])
    assert outcome.exit_code == 2
    assert re.search(r"a\.json(: not| cannot be read as JSON)", outcome.output)
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("mine")
    outcome = RUNNER.invoke(app, ["bench", "--workload", "latte-16x512", "--report", str(tmp_path / "out")])
    assert outcome.exit_code == 2
    assert "report: got" in outcome.output
    assert "must be in a folder that can be written" in outcome.output
    assert (tmp_path / "out").read_text() == "mine"
