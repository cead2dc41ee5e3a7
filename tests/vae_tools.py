"""Tiny video autoencoders with random weights."""

from typing import Any

import torch

from pab_kernels.models import autoencoders

TINY_VAE: dict[str, dict[str, Any]] = {
    "open_sora": {
        "vae_temporal": {"filters": 8, "num_res_blocks": 1, "num_groups": 4},
        "spatial": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
    },
    "open_sora_plan_v110": {"hidden_size": 32, "hidden_size_mult": (1, 1, 1, 1), "num_res_blocks": 1},
    "open_sora_plan_v120": {"hidden_size": 32, "hidden_size_mult": (1, 1, 1, 1), "num_res_blocks": 1},
}
"""What each family's tiny autoencoder differs in from the released one."""


def tiny_vae(family: str, seed: int = 0, **config: Any) -> Any:
    """On the CPU in float32, as wide as its blocks allow."""
    return autoencoders.random_weights(
        family, dtype=torch.float32, device="cpu", seed=seed, **{**TINY_VAE[family], **config}
    )
