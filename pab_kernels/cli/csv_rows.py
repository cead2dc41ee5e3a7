"""Rows of results, in the columns of the microbenchmarks' results.csv."""

from __future__ import annotations

import csv
import io
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pab_kernels.files import append

if TYPE_CHECKING:
    import torch

COLUMNS = ("date", "gpu", "commit", "op", "shape", "dtype", "backend", "ms", "figure", "unit")


def columns_of(path: Path | None) -> tuple[str, ...]:
    """The columns of a file of results, or those that a new one gets.

    Raises
    ------
    ValueError
        It is a file of something else.
    """
    if path is None or not path.is_file() or not path.stat().st_size:
        return COLUMNS
    with path.open(newline="", encoding="utf-8") as file:
        try:
            columns = tuple(next(csv.reader(file)))
        except (csv.Error, UnicodeDecodeError):
            columns = ()
    if not {"backend", "ms"} <= set(columns):
        raise ValueError(f"csv: got {str(path)!r}, which has other columns, must be a new file or one of benchmarks")
    return columns


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    """Append rows, all or none; what `columns` do not name is left out."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="", extrasaction="ignore")
    if not path.is_file() or not path.stat().st_size:
        writer.writeheader()
    writer.writerows(rows)
    append(path, text.getvalue())


def commit() -> str:
    """The commit that this package is at, or "unknown"; PAB_COMMIT names that of a copy without its history."""
    if named := os.environ.get("PAB_COMMIT"):
        return named
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def device_name(device: torch.device) -> str:
    """The GPU's own name, or "CPU"."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
