"""Runs a batch: rows go to a worker here, or to many through Ray, and what comes back goes into the manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from typing import Any

from pab_kernels.batch.group import GroupWorker
from pab_kernels.batch.manifest import DONE, FAILED, VIDEOS, Manifest, record
from pab_kernels.batch.rows import Row
from pab_kernels.batch.work import Job, Worker

Records = Generator[Mapping[str, Any], None, None]
SPAN = 3600.0


def here(job: Job, rows: Iterable[Row]) -> Records:
    """The records of `rows`, made one after another in this process, or by its group of ranks."""
    worker = Worker(job) if job.gpus == 1 else GroupWorker(job)
    worker.load()
    try:
        for row in rows:
            yield worker.make(row)
    finally:
        worker.close()


def run(
    manifest: Manifest,
    work: Callable[[list[Row]], Records],
    max_failures: int | None = None,
    on_record: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Do what a manifest waits for, until all is done or more than `max_failures` rows have failed.

    Parameters
    ----------
    manifest : Manifest
        Is complete on disk when this ends, also by an error or Ctrl-C.
    work : callable
        Makes videos: gets rows, gives their records in any order. Closed early, it ends its workers.
    max_failures : int, optional
        By default there is no limit.
    on_record : callable, optional
        Is called with every record as it comes.

    Returns
    -------
    dict
        "made", "failed" and "seconds" of this run, "videos_per_hour", "stopped" (whether too many failed), and
        "counts" of all rows of the manifest.
    """
    start = time.monotonic()
    made = failed = 0
    bad = [row for row in manifest.todo if row.error is not None]
    good = [row for row in manifest.todo if row.error is None]
    manifest.save()
    try:
        with closing(_records(bad, good, work, lambda: max_failures is None or failed <= max_failures)) as records:
            for given in records:
                each = _in_place(manifest, given)
                manifest.put(each)
                made += each["status"] == DONE
                failed += each["status"] == FAILED
                if on_record is not None:
                    on_record(each)
    finally:
        manifest.save()
        manifest.store.clear(VIDEOS)
    seconds = time.monotonic() - start
    return {
        "made": made,
        "failed": failed,
        "seconds": seconds,
        "videos_per_hour": SPAN * made / seconds if made else 0.0,
        "stopped": max_failures is not None and failed > max_failures,
        "counts": manifest.counts(),
    }


def _records(
    bad: list[Row], good: list[Row], work: Callable[[list[Row]], Records], go_on: Callable[[], bool]
) -> Records:
    """Of rows that cannot be made, then of the others, as long as `go_on` says so after each."""
    for row in bad:
        yield record(row, FAILED, error=row.error)
        if not go_on():
            return
    if good:
        with closing(work(good)) as records:
            for each in records:
                yield each
                if not go_on():
                    return


def _in_place(manifest: Manifest, each: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record, failed where its file is not in the store as it is seen from here: a folder that is not shared."""
    if each["status"] != DONE or manifest.store.size(each["file"]) == each["bytes"]:
        return each
    message = f"{each['file']} is not in the output as this machine sees it: it must be a shared folder or a URL"
    return {**each, "status": FAILED, "file": None, "sha256": None, "bytes": None, "error": message}
