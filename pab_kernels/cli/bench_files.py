"""The files of `pab bench`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pab_kernels.files import append, replaced

CSV_COLUMNS = ("date", "gpu", "commit", "op", "shape", "dtype", "backend", "ms", "figure", "unit")
"""Those of the microbenchmarks' results.csv."""


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write `result`; an existing file is replaced only once the new one is complete."""
    with replaced(path) as partial:
        partial.write_text(json.dumps(result, indent=1), encoding="utf-8")


def csv_columns(path: Path | None) -> tuple[str, ...]:
    """The columns of a file of results, or those that a new one gets.

    Raises
    ------
    ValueError
        It is a file of something else.
    """
    if path is None or not path.is_file() or not path.stat().st_size:
        return CSV_COLUMNS
    with path.open(newline="", encoding="utf-8") as file:
        try:
            columns = tuple(next(csv.reader(file)))
        except (csv.Error, UnicodeDecodeError):
            columns = ()
    if not {"backend", "ms"} <= set(columns):
        raise ValueError(f"csv: got {str(path)!r}, which has other columns, must be a new file or one of benchmarks")
    return columns


def append_csv(result: dict[str, Any], path: Path, columns: Sequence[str]) -> None:
    """Append a row for each contender that ran, all or none."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="", extrasaction="ignore")
    if not path.is_file() or not path.stat().st_size:
        writer.writeheader()
    for row in result["contenders"]:
        if row["seconds"] is not None:
            writer.writerow(
                {
                    "date": result["date"][:10],
                    "gpu": result["device"],
                    "commit": result["commit"],
                    "op": "denoising run",
                    "shape": result["workload"],
                    "dtype": result["dtype"],
                    "backend": row["name"],
                    "ms": f"{row['seconds'] * 1e3:.2f}",
                    "figure": f"{row['frames_per_second']:.2f}",
                    "unit": "frames/s",
                }
            )
    append(path, text.getvalue())
