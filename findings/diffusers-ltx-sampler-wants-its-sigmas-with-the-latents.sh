#!/bin/sh
# diffusers 0.42.1, LTXEulerAncestralRFScheduler.set_timesteps(steps) without a device, then a step with latents on one.
#
# Expected: as with every other sampler of rectified flow (FlowMatchEulerDiscreteScheduler, from whose settings it makes
# its own), the step works: tables on the CPU, of which single numbers are used, serve latents on any device.
# Seen: the numbers are made tensors of one dimension, which torch does not mix with another device's: RuntimeError.
# With set_timesteps(steps, device=...) it works, and waits for the device at every step (sigma_next.abs().item()).
#
# The device "meta" stands for a GPU: torch refuses the same mixtures. Seen on an NVIDIA H200 too (torch 2.11.0).
# Exit 0 where that is still so, 1 where it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder" diffusers==0.42.1 torch==2.13.0 transformers==5.24.0
PYTHONPATH="$folder" python3 - <<'PYTHON'
import sys

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, LTXEulerAncestralRFScheduler

seen = {}
for cls in (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, LTXEulerAncestralRFScheduler):
    scheduler = cls()
    scheduler.set_timesteps(5)
    latents = torch.empty(1, 4, 2, 2, device="meta")
    try:
        scheduler.step(torch.empty_like(latents), scheduler.timesteps[0], latents)
        seen[cls.__name__] = "works"
    except RuntimeError as error:
        seen[cls.__name__] = f"RuntimeError: {error}"
    print(f"{cls.__name__}: {seen[cls.__name__]}")
works = [text == "works" for text in seen.values()]
if works != [True, True, False]:
    sys.exit("this has changed")
PYTHON
