#!/bin/sh
# diffusers 0.42.1, apply_pyramid_attention_broadcast: which range each attention layer gets.
#
# Expected: the spatial range for spatial self-attention, the temporal range for temporal, the cross range for
# cross-attention.
# Seen: LTX-Video's cross-attention (attn2) gets the SPATIAL range, since LTXAttention has no is_cross_attention. Latte's
# temporal self-attention gets the SPATIAL range where both are given, since "transformer_blocks" is found in
# "temporal_transformer_blocks", and spatial is asked for first.
#
# Exit 0 where that is still so, 1 where it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder" diffusers==0.42.1 torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
PYTHONPATH="$folder" python3 - <<'PYTHON'
import sys

from diffusers import (
    LatteTransformer3DModel,
    LTXVideoTransformer3DModel,
    PyramidAttentionBroadcastConfig,
    apply_pyramid_attention_broadcast,
)

ltx = LTXVideoTransformer3DModel(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    cross_attention_dim=16,
    num_layers=1,
    caption_channels=8,
)
latte = LatteTransformer3DModel(
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    out_channels=4,
    num_layers=1,
    cross_attention_dim=16,
    attention_bias=True,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=1000,
    norm_type="ada_norm_single",
    norm_elementwise_affine=False,
    caption_channels=8,
    video_length=2,
)
SPATIAL, TEMPORAL, CROSS = 2, 3, 5


def ranges(model):
    """The range of every layer that has the hook."""
    apply_pyramid_attention_broadcast(
        model,
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=SPATIAL,
            temporal_attention_block_skip_range=TEMPORAL,
            cross_attention_block_skip_range=CROSS,
            current_timestep_callback=lambda: 500,
        ),
    )
    found = {}
    for name, module in model.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        hook = registry and registry.get_hook("pyramid_attention_broadcast")
        if hook:
            found[name] = hook.block_skip_range
    return found


seen = {"LTX-Video": ranges(ltx), "Latte": ranges(latte)}
print("spatial", SPATIAL, "temporal", TEMPORAL, "cross", CROSS)
for name, found in seen.items():
    print(name, found)
if seen["LTX-Video"]["transformer_blocks.0.attn2"] != SPATIAL:
    sys.exit("LTX-Video's cross-attention has changed")
if seen["Latte"]["temporal_transformer_blocks.0.attn1"] != SPATIAL:
    sys.exit("Latte's temporal attention has changed")
PYTHON
