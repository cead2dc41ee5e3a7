"""The manifest of a batch: one row a video, whole at any moment, from which the next run goes on."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from pab_kernels.batch.rows import Row
from pab_kernels.batch.store import Store
from pab_kernels.files import replaced

NAME = "manifest.jsonl"
DONE, FAILED, WAITING = "done", "failed", "waiting"
VIDEOS = "videos"
"""The folder of what was made."""
EVERY, SHARE = 1.0, 20
"""Seconds between two writes of the manifest: at least one, and so many times what a write took."""


def record(row: Row, status: str, **more: Any) -> dict[str, Any]:
    """A row of the manifest: flat and plain, the same columns in each."""
    columns = {
        "id": row.id,
        "row": row.number,
        "status": status,
        "prompt": row.prompt,
        "negative_prompt": row.negative_prompt,
        "seed": row.seed,
        "steps": row.steps,
        "guidance": row.guidance,
        "size": None if row.size is None else str(row.size),
        "settings": row.settings,
        "mesh": None if row.mesh.size == 1 else str(row.mesh),
        "file": None,
        "sha256": None,
        "bytes": None,
        "seconds": None,
        "text_seconds": None,
        "denoising_seconds": None,
        "decoding_seconds": None,
        "peak_bytes": None,
        "gpu": None,
        "version": None,
        "finished": None,
        "error": None,
    }
    assert more.keys() <= columns.keys()
    return {**columns, **more}


class Manifest:
    """Every row that was ever done or failed in a store, and those that the plan still waits for.

    A row is done only while its file is there with its size. A file goes to its place before its row is written, so
    what a killed run had not yet written down is made again, with the same bits.

    Parameters
    ----------
    store : Store
    rows : iterable of Row
        The plan. Rows of earlier plans stay if they are done.

    Raises
    ------
    ValueError
        The store holds a manifest that cannot be read.
    """

    def __init__(self, store: Store, rows: Iterable[Row]) -> None:
        self.store = store
        sizes = store.sizes(VIDEOS)
        old = {each["id"]: each for each in read(store)}
        done = {
            name: each
            for name, each in old.items()
            if each["status"] == DONE and sizes.get(each["file"]) == each["bytes"] is not None
        }
        self.records: dict[str, Mapping[str, Any]] = {}
        self.todo: list[Row] = []
        """Rows that are not done, in the plan's order."""
        for row in rows:
            self.records[row.id] = done.get(row.id, record(row, WAITING))
            if row.id not in done:
                self.todo.append(row)
        self.records = {**done, **self.records}
        self._lines = {name: json.dumps(each) for name, each in self.records.items()}
        self._next = 0.0

    def put(self, row: Mapping[str, Any]) -> None:
        """Take a row that is done or failed. It is on disk soon, or after `save`."""
        self.records[row["id"]] = row
        self._lines[row["id"]] = json.dumps(row)
        if time.monotonic() >= self._next:
            self.save()

    def save(self) -> None:
        """Write all of it, in place of what is there."""
        start = time.monotonic()
        with self.store.new(NAME) as path, replaced(path) as partial:
            partial.write_text("".join(f"{line}\n" for line in self._lines.values()), encoding="utf-8")
        end = time.monotonic()
        self._next = end + max(EVERY, SHARE * (end - start))

    def counts(self) -> dict[str, int]:
        """How many rows have each status."""
        return counts(self.records.values())


def counts(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many rows have each status."""
    found = Counter(each["status"] for each in records)
    return {status: found[status] for status in (DONE, FAILED, WAITING)}


def read(store: Store) -> list[dict[str, Any]]:
    """The rows of a store's manifest, none where it has no manifest; ValueError naming the line that is no row."""
    rows = []
    for number, line in enumerate((store.read(NAME) or b"").splitlines(), 1):
        try:
            row = json.loads(line)
            if not isinstance(row["id"], str) or row["status"] not in (DONE, FAILED, WAITING):
                raise ValueError("its id or status is none")
            rows.append({**dict.fromkeys(("file", "bytes", "error", "seconds")), "row": 0, **row})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"output: line {number} of its {NAME} is no row of a batch: {error}") from error
    return rows
