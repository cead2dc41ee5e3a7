#!/bin/sh
# diffusers 0.42.1, apply_pyramid_attention_broadcast on a transformer that is called twice a step (Wan: the prompt, then
# the negative prompt, each in a cache_context of its own, as WanPipeline calls it).
#
# Expected: with spatial_attention_block_skip_range=2 every second STEP takes the attention output of the step before,
# each forward its own: of 4 steps, steps 0 and 2 compute, both forwards of each.
# Seen: the hook keeps one state and counts calls. Every negative forward takes the attention output of the SAME step's
# prompt, and no step ever takes one of an earlier step.
#
# Exit 0 where that is still so, 1 where it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder" diffusers==0.42.1 torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
PYTHONPATH="$folder" python3 - <<'PYTHON'
import sys

import torch
from diffusers import PyramidAttentionBroadcastConfig, WanTransformer3DModel, apply_pyramid_attention_broadcast

torch.manual_seed(0)
model = WanTransformer3DModel(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=8,
    freq_dim=16,
    ffn_dim=32,
    num_layers=1,
    rope_max_seq_len=32,
).eval()
config = PyramidAttentionBroadcastConfig(
    spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
)
apply_pyramid_attention_broadcast(model, config)

computed = []
attention = model.blocks[0].attn1
compute = attention.processor


def watched(*args, **kwargs):
    computed.append(now)
    return compute(*args, **kwargs)


attention.processor = watched
latents = torch.randn(1, 4, 1, 8, 8)
texts = {"cond": torch.randn(1, 3, 8), "uncond": torch.randn(1, 3, 8)}
with torch.no_grad():
    for step in range(4):
        for forward, text in texts.items():
            now = (step, forward)
            with model.cache_context(forward):
                model(latents + step, torch.tensor([500]), text, return_dict=False)

print("attention computed at", computed)
expected = [(step, forward) for step in (0, 2) for forward in texts]
seen = [(step, "cond") for step in range(4)]
print("as expected of PAB   ", expected)
if computed != seen:
    sys.exit("this has changed")
PYTHON
