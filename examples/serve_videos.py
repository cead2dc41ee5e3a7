"""Videos online with Ray Serve: post a row as JSON, such as {"prompt": "a red star moves up"}, and get its record."""

import asyncio

from ray import serve
from starlette.requests import Request

from pab_kernels.batch import manifest, rows, work
from pab_kernels.pipelines.loading import Source


@serve.deployment(max_ongoing_requests=1)  # on GPUs: ray_actor_options={"num_gpus": 1}, and device and dtype of the job
class Videos:
    def __init__(self, model: str, output: str) -> None:
        self.worker = work.Worker(work.job(Source(model), output, suffix=".gif"))
        self.worker.load()

    async def __call__(self, request: Request) -> dict:
        job, family = self.worker.job, self.worker.job.source.family
        (row,) = rows.plan([await request.json()], family, rows.defaults(family), job.identity())
        if row.error is not None:
            return manifest.record(row, manifest.FAILED, error=row.error)
        return await asyncio.to_thread(self.worker.make, row)


app = Videos.bind("demo", "outputs/served")
