"""A worker of several GPUs: it starts a rank on each, which load the pipeline once and take one row after another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pab_kernels.batch.manifest import FAILED, record
from pab_kernels.batch.rows import Row
from pab_kernels.batch.work import Job, Worker
from pab_kernels.distributed.launch import Group, RankError
from pab_kernels.measure.info import version


class GroupWorker:
    """As a `Worker`, of the GPUs of a job together. What fails on one of them ends all; the next row starts them anew.

    The ranks are processes of this one, and die with it.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._group: Group | None = None

    def load(self, identity: Mapping[str, Any] | None = None) -> None:
        """Start the ranks, and load the pipeline on each.

        Raises
        ------
        ValueError
            As `Job.check`, or there are too few GPUs.
        RankError
            One could not load it.
        """
        if identity is not None:
            self.job.check(identity)
        self._ranks()

    def make(self, row: Row) -> dict[str, Any]:
        """Make the video of a row and put it in its place; the row of the manifest, done or failed.

        Raises
        ------
        RankError
            A rank died, or its GPU is unusable, or the ranks could not be started anew: no fault of the row.
        """
        group = self._ranks()
        self._group = None  # whatever leaves the call has ended them
        try:
            made = group.call("make", row)
        except RankError as error:
            if error.died or "CUDA error" in str(error):
                raise
            return record(row, FAILED, version=version("pab-kernels"), error=str(error))
        self._group = group
        return made

    def close(self) -> None:
        """End the ranks."""
        if self._group is not None:
            with self._group as group:
                group.call("close")
            self._group = None

    def _ranks(self) -> Group:
        if self._group is None:
            device = torch.device(self.job.device).type
            self._group = Group(_loaded, self.job, ranks=self.job.gpus, device=device)
        return self._group


def _loaded(job: Job) -> Worker:
    """One rank's worker."""
    worker = Worker(job)
    worker.load()
    return worker
