"""Rows of results, in the columns of the microbenchmarks' results.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pab_kernels.files import append

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
