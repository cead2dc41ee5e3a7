"""What the tests of batches look at."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import psutil

from pab_kernels.files import LEFT_OVER


def manifest(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder's manifest, by number."""
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    return sorted(rows, key=lambda row: row["row"])


def videos(folder: Path) -> dict[str, str]:
    """Names and checksums of all that lies among a folder's videos."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "videos").iterdir()}


def of_actors(cls: str) -> list[psutil.Process]:
    """Ray's worker processes that have an actor of this class, by the title that Ray gives them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{cls}"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def check_whole(folder: Path) -> None:
    """Every file is a row that is done and every such row a file, with its checksum; no temporary file, no id twice."""
    rows = manifest(folder)
    assert len({row["id"] for row in rows}) == len(rows)
    done = {Path(row["file"]).name: row["sha256"] for row in rows if row["status"] == "done"}
    assert videos(folder) == done
    assert not list(folder.rglob(LEFT_OVER))
