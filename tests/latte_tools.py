"""A tiny Latte and its inputs, for the runtime's tests."""

from typing import Any

import torch
from diffusers import LatteTransformer3DModel
from torch import Tensor

FRAMES, SIZE, TEXT = 3, 8, 5


def tiny_latte(seed: int = 0, layers: int = 2, heads: int = 2) -> Any:
    torch.manual_seed(seed)
    model: Any = LatteTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        cross_attention_dim=heads * 8,
        attention_bias=True,
        sample_size=SIZE,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=6,
        video_length=FRAMES,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def inputs(batch: int = 2, seed: int = 0, size: int = SIZE, frames: int = FRAMES) -> tuple[Tensor, Tensor]:
    """Latents [B, 4, T, H, W] and text [B, L, 6]."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 4, frames, size, size, generator=generator),
        torch.randn(batch, TEXT, 6, generator=generator),
    )


def call(model: torch.nn.Module, latents: Tensor, text: Tensor, t: float) -> Tensor:
    timestep = torch.full((latents.shape[0],), t)
    return model(latents, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]
