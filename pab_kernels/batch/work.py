"""Who makes the videos of a batch: one pipeline on one device, or as one rank of several, which takes row after row."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pab_kernels import figures
from pab_kernels.batch.manifest import DONE, FAILED, VIDEOS, record
from pab_kernels.batch.rows import Row, fingerprint
from pab_kernels.batch.store import Store
from pab_kernels.distributed.mesh import Mesh
from pab_kernels.measure.info import version
from pab_kernels.pipelines import outputs
from pab_kernels.pipelines.generate import Generated, generate
from pab_kernels.pipelines.loading import Pipeline, Source, load_pipeline
from pab_kernels.pipelines.sizes import VideoSize
from pab_kernels.runtime.accelerate import accelerate
from pab_kernels.runtime.handle import PABHandle

PARTS = ("text", "denoising", "decoding")


@dataclass(frozen=True)
class Job:
    """What all rows of a batch have in common: the model, where it runs, and where videos go.

    `size` is the one that Open-Sora-Plan's checkpoint is chosen by. `threads` are torch's on a CPU, where their number
    decides the last bits. `gpus` make a video together, each a rank of torch's default process group.
    """

    source: Source
    output: str
    size: VideoSize | None = None
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    suffix: str = ".mp4"
    decode_memory: int | None = None
    seamless: bool = False
    offload_text: bool = False
    cache_device: str | None = None
    gpus: int = 1

    def identity(self) -> dict[str, Any]:
        """What of it decides the result, as plain values. Reads the weights' files where they lie on this machine."""
        source = self.source
        places = (source.model, source.weights, source.text_encoder, source.vae)
        device = torch.device(self.device).type
        return {
            "version": version("pab-kernels"),
            "family": source.family,
            "weights": [None if place == source.family else fingerprint(place) for place in places],
            "random_weights": source.random_weights,
            "size": str(self.size),
            "dtype": self.dtype,
            "device": device,
            "threads": self.threads if device == "cpu" else None,
            "suffix": self.suffix,
            "decoder": [self.decode_memory, self.seamless],
        }

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raise ValueError if this machine has another version or other weights than `identity` says."""
        if (mine := self.identity()) != identity:
            different = sorted(key for key in mine if mine[key] != identity[key])
            raise ValueError(f"model: a worker has another {', '.join(different)} than the driver")


class Worker:
    """Makes one video after another. Slots and graphs stay from row to row, until the settings change.

    Where the job is of several GPUs it is one rank of them: each makes the same calls, and rank 0 alone writes.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.rank = dist.get_rank() if job.gpus > 1 else 0
        device = torch.device(job.device)
        self.device = torch.device("cuda", self.rank) if job.gpus > 1 and device.type == "cuda" else device
        self.store = Store(job.output)
        self._pipe: Pipeline | None = None
        self._handle: PABHandle | None = None
        self._mesh = Mesh()

    def load(self, identity: Mapping[str, Any] | None = None) -> None:
        """Load the pipeline; errors are those of `Job.check` and `load_pipeline`."""
        job = self.job
        if identity is not None:
            job.check(identity)
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, job.threads // job.gpus))
        self._pipe = load_pipeline(
            job.source,
            job.size,
            dtype=getattr(torch, job.dtype),
            device=self.device,
            decode_memory=job.decode_memory,
            seamless=job.seamless,
            ranks=job.gpus,
        )

    def make(self, row: Row) -> dict[str, Any]:
        """Make the video of a row and put it in its place; the row of the manifest, done or failed.

        Raises
        ------
        Exception
            What leaves the GPU unusable, and is no fault of the row. Of several ranks whatever one of them raises: the
            others may be waiting for it.
        """
        if self.job.gpus > 1:
            return self._make(row)
        try:
            return self._make(row)
        except (torch.OutOfMemoryError, MemoryError) as error:
            message = f"out of memory: {error}"
        except Exception as error:
            if "CUDA error" in str(error):
                raise
            # A user's mistake says so itself; of anything else its kind may help.
            message = str(error) if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: {error}"
        # Only now is what the failed run held out of reach.
        self.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self._record(row, FAILED, error=message)

    def close(self) -> None:
        """Give slots and graphs back; the pipeline stays."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def _make(self, row: Row) -> dict[str, Any]:
        if self._pipe is None:
            self.load()
        pipe = self._pipe
        assert pipe is not None
        if self.rank > 0:
            self._generate(pipe, row, None)
            return {}
        name = f"{VIDEOS}/{row.id}{self._suffix(row)}"
        with self.store.new(name) as path:
            result = self._generate(pipe, row, path)
            data = path.read_bytes()
        parts = {f"{part}_seconds": result.parts.get(part) for part in PARTS}
        return self._record(
            row,
            DONE,
            file=name,
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
            seconds=result.seconds,
            peak_bytes=result.peak_bytes,
            **parts,
        )

    def _generate(self, pipe: Pipeline, row: Row, path: Path | None) -> Generated:
        """Generate into a file, which is there only if all numbers were finite; without a path into none."""
        request = row.request
        with ExitStack() as stack:
            sinks = None
            if path is not None and path.suffix in figures.VIDEO_SUFFIXES:
                sinks = stack.enter_context(outputs.video_writers(pipe, path, 1))
            result = generate(
                pipe,
                request,
                row.config,
                cache_device=self.job.cache_device,
                sinks=sinks,
                offload_text=self.job.offload_text,
                handle=self._runtime(pipe, row),
            )
            if not result.finite:
                raise ValueError("the result is not finite")
        if sinks is None and path is not None:
            outputs.save_one(result, request, pipe, row.config, path)
        return result

    def _runtime(self, pipe: Pipeline, row: Row) -> PABHandle | None:
        """The runtime of the row's settings and mesh: the one that is there, or a new one in its place."""
        if self._handle is None or (self._handle.config, self._mesh) != (row.config, row.mesh):
            self.close()
            if row.config is not None:
                self._handle = accelerate(pipe, row.config, cache_device=self.job.cache_device, mesh=row.mesh)
                self._mesh = row.mesh
        return self._handle

    def _suffix(self, row: Row) -> str:
        if not self.job.source.decodes:
            return ".safetensors"
        return ".png" if row.size is not None and row.size.frames == 1 else self.job.suffix

    def _record(self, row: Row, status: str, **more: Any) -> dict[str, Any]:
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        finished = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        return record(row, status, gpu=gpu, version=version("pab-kernels"), finished=finished, **more)


def job(source: Source, output: str, **settings: Any) -> Job:
    """A job of this process's number of threads, whose paths mean the same in another process's folder."""
    places = {name: getattr(source, name) for name in ("model", "weights", "text_encoder", "vae")}
    there: dict[str, Any] = {
        name: str(Path(place).absolute())
        for name, place in places.items()
        if place is not None and place != source.family and Path(place).exists()
    }
    return Job(dataclasses.replace(source, **there), output, threads=torch.get_num_threads(), **settings)
