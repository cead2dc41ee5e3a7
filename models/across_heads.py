"""What the adapters of Wan and LTX-Video share: attention whose queries and keys are normed across all heads."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from pab_kernels.blocks.branches import CrossAttention, Mlp
from pab_kernels.blocks.self_attention import SelfAttention
from pab_kernels.models.adapter import Adapter, WeightFuser, check_value, linear_of, plain, rms_norms_of

INDEX_PADDING = 8
"""Where tokens have timesteps of their own, their number is padded to a multiple of this: so graphs fit all steps."""


class AcrossHeadsAdapter(Adapter):
    """Base of the adapters for hosts whose blocks are `attn1`, `attn2` and an MLP, with RMSNorm across heads.

    Q, K and V (K and V of cross-attention) become views of one fused weight each; `restore` undoes it.

    Parameters
    ----------
    host : nn.Module
    attention, processor : type
        The classes that its attention must be of.
    """

    whole_steps = False  # their velocity is from data to noise

    def __init__(self, host: Any, attention: type, processor: type) -> None:
        self.host = host
        self._attention, self._processor = attention, processor
        self._signature = inspect.signature(type(host).forward)
        self._fuser = WeightFuser()

    def _self_attention(self, path: str) -> SelfAttention:
        heads, (q_norm, k_norm), eps = self._check_attention(path)
        return SelfAttention(
            qkv=self._fuser.fuse(self.host, [f"{path}.to_{name}" for name in "qkv"]),
            proj=linear_of(self.host, f"{path}.to_out.0"),
            heads=heads,
            sequence="full",
            q_norm=q_norm,
            k_norm=k_norm,
            norm_eps=eps,
            rotary=True,
        )

    def _cross_attention(self, path: str) -> CrossAttention:
        heads, (q_norm, k_norm), eps = self._check_attention(path)
        return CrossAttention(
            q=linear_of(self.host, f"{path}.to_q"),
            kv=self._fuser.fuse(self.host, [f"{path}.to_k", f"{path}.to_v"]),
            proj=linear_of(self.host, f"{path}.to_out.0"),
            heads=heads,
            q_norm=q_norm,
            k_norm=k_norm,
            norm_eps=eps,
        )

    def _mlp(self, path: str) -> Mlp:
        plain(self.host, path, FeedForward)
        check_value(f"{path}.net.0.approximate", plain(self.host, f"{path}.net.0", GELU).approximate, "tanh")
        return Mlp(linear_of(self.host, f"{path}.net.0.proj"), linear_of(self.host, f"{path}.net.2"))

    def _check_attention(self, path: str) -> tuple[int, list[Tensor | None], float]:
        """Heads, and weights and eps of the norms of queries and keys."""
        module = plain(self.host, path, self._attention)
        processor = plain(self.host, f"{path}.processor", self._processor)
        for name in ("_attention_backend", "_parallel_config"):
            check_value(f"{path}.processor.{name}", getattr(processor, name, None), None)
        check_value(f"{path}.fused_projections", getattr(module, "fused_projections", False), False)
        plain(self.host, f"{path}.to_out.1", nn.Dropout)
        paths = [f"{path}.{name}" for name in ("norm_q", "norm_k")]
        return module.heads, *rms_norms_of(paths, [plain(self.host, each, nn.RMSNorm) for each in paths])

    def _norm(self, path: str) -> Tensor:
        """The weight [C] of a plain RMSNorm."""
        module = plain(self.host, path, nn.RMSNorm)
        if module.weight is None:
            raise TypeError(f"{type(self.host).__name__}.{path}: has no weight, must have one")
        return module.weight.detach()

    def _arguments(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The forward's arguments by name; ValueError for attention_kwargs, which nothing here would read."""
        bound = self._signature.bind(self.host, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if given["attention_kwargs"] and given["attention_kwargs"] != {"scale": 1.0}:
            raise ValueError(
                f"attention_kwargs: got {given['attention_kwargs']!r}, must be None: there are no LoRA layers to "
                "scale, and attention takes no arguments of its own"
            )
        return given

    def restore(self) -> None:
        """Give the host its separate parameters back."""
        self._fuser.restore()


def distinct_timesteps(timestep: Tensor) -> tuple[Tensor, Tensor]:
    """The timesteps that occur in [B, N], one a token, ascending; and int32 [B, N], which of them each token has.

    The last is repeated up to a multiple of `INDEX_PADDING`. How many there are decides the shapes of what follows, so
    a GPU is waited for.
    """
    values, index = torch.unique(timestep, return_inverse=True)
    missing = -len(values) % INDEX_PADDING
    return torch.cat([values, values[-1:].expand(missing)]), index.to(torch.int32)
