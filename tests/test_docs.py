"""The documentation: it builds without a warning, links lead somewhere, commands and figures are real."""

import csv
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from markdown_it import MarkdownIt

from pab_kernels.cli import app

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def build(root: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """As `make docs`."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", str(root / "docs")]
    return subprocess.run([*command, str(root), str(target)], capture_output=True, text=True, check=False)


def commands() -> list[str]:
    """Every `pab` command in a block of code."""
    fences = [token for page in PAGES for token in MarkdownIt().parse(page.read_text()) if token.type == "fence"]
    lines = [line for token in fences for line in token.content.splitlines()]
    return sorted({line for line in lines if re.match(r"pab [a-z]+", line)})


def test_the_pages_build_without_a_warning(tmp_path):
    result = build(ROOT, tmp_path)
    assert result.returncode == 0, result.stderr
    assert {f"{page.relative_to(ROOT).with_suffix('')}.html" for page in PAGES} <= {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")
    }


def test_a_broken_link_fails_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "conf.py", tmp_path / "docs")
    (tmp_path / "README.md").write_text("# Title\n\n[index](docs/index.md#title) ![gone](docs/absent.png)\n")
    page = tmp_path / "docs" / "index.md"
    page.write_text("# Title\n\n[gone](absent.md), [moved](../README.md#no-such-heading), [file](../absent.yaml)\n")
    result = build(tmp_path, tmp_path / "out")
    assert result.returncode != 0
    for missing in ("absent.md", "no-such-heading", "absent.yaml", "absent.png"):
        assert missing in result.stderr


def test_commands_are_found():
    assert {command.split()[1] for command in commands()} >= {
        "generate",
        "bench",
        "report",
        "info",
        "schedule",
        "verify",
    }


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command):
    words = shlex.split(command.split(" > ")[0], comments=True)
    parser: Any = typer.main.get_command(app)
    if "--help" not in words:
        parser.commands[words[1]].make_context(words[1], words[2:])


def test_figures_of_kernels_are_measured_rows():
    with (ROOT / "bench" / "results.csv").open(newline="") as file:
        rows = {(row["shape"].split()[0], row["backend"], row["figure"]) for row in csv.DictReader(file)}
    lines = [line.strip("| ").split(" | ") for line in (ROOT / "docs" / "kernels.md").read_text().splitlines()]
    tables = [cells for cells in lines if len(cells) == 5]
    header, _, *body = tables
    assert len(body) >= 5
    for shape, *figures in body:
        for backend, figure in zip(header[1:], figures, strict=True):
            assert (shape.split(":")[0], backend, figure) in rows
