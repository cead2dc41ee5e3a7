"""Wan's two forwards of a step, one after the other, against one batch of 2: seconds of a computed step each.

    python -m bench.bench_two_forwards [WORKLOAD]

Both through the runtime, with graphs, on the same weights. What joining the two could gain at most, were the second's
text known when the first is called.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from pab_kernels import PABConfig, accelerate, clock
from pab_kernels.workloads import WORKLOADS, Inputs

ROUNDS = 2
"""Timed steps of each form, in turn; two more come before, the second of which captures."""


def seconds(host: nn.Module, inputs: Inputs, dtype: torch.dtype, *, joined: bool) -> list[float]:
    """Seconds of each timed step."""
    times, latents = [], inputs.latents.to(dtype)
    (_, first), (_, second) = inputs.forwards
    both = {"encoder_hidden_states": torch.cat([each["encoder_hidden_states"] for each in (first, second)])}
    calls: list[tuple[Tensor, dict[str, Tensor]]] = [(latents.repeat(2, 1, 1, 1, 1), both)]
    if not joined:
        calls = [(latents, {"encoder_hidden_states": each["encoder_hidden_states"]}) for each in (first, second)]
    with accelerate(host, PABConfig(), forwards_per_step=len(calls)) as handle:
        handle.begin([900.0 - i for i in range(ROUNDS + 2)])
        for step in range(ROUNDS + 2):
            start = clock.mark(latents.device)
            for given, text in calls:
                timestep = torch.full((len(given),), 900.0 - step, device=given.device)
                host(given, timestep=timestep, **text, return_dict=False)
            times.append(clock.seconds(start, clock.mark(latents.device)))
    return times[2:]


@torch.no_grad()
def main() -> None:
    """Print a line a form."""
    name = sys.argv[1] if len(sys.argv) > 1 else "wan_2_1-1.3b-480p-5s"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workload, dtype = WORKLOADS[name], torch.bfloat16
    if device.type == "cpu":  # to try it
        workload, dtype = workload.tiny(), torch.float32
    host, inputs = workload.host(device, dtype), workload.inputs(device, dtype)
    for joined in (False, True, False, True):
        times = seconds(host, inputs, dtype, joined=joined)
        what = "one batch of 2" if joined else "two forwards"
        print(f"{workload.name}, {what}: {', '.join(f'{time:.4f}' for time in times)} s a step", flush=True)


if __name__ == "__main__":
    main()
