"""What the tests of the Hopper attention kernel share: inputs, the truth in float64, one call of the module."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pab_kernels import ops
from pab_kernels.ops import backends

HALVES = [
    pytest.param(torch.float16, 2e-3, 2e-3, id="float16"),
    pytest.param(torch.bfloat16, 1.6e-2, 1.6e-2, id="bfloat16"),
]
HEAD_DIMS = [72, 96, 128]
EPS = 1e-6


def draw(batch, queries, keys, heads, head_dim, dtype, device, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh inputs, cut out of one fused tensor where lengths agree, keys and values out of one where they do not."""
    torch.manual_seed(seed + queries + 7 * keys + head_dim)
    if queries == keys:
        q, k, v = torch.randn(batch, queries, 3, heads, head_dim, device=device).to(dtype).unbind(2)
        return q, k, v
    k, v = torch.randn(batch, keys, 2, heads, head_dim, device=device).to(dtype).unbind(2)
    return torch.randn(batch, queries, heads, head_dim, device=device).to(dtype), k, v


def expected(q: Tensor, k: Tensor, v: Tensor, lengths: list[int] | None = None, scale: float | None = None) -> Tensor:
    """Float64, one row of the batch after the other, keys beyond its length cut off."""
    rows = []
    for b, (queries, keys, values) in enumerate(zip(q.double(), k.double(), v.double(), strict=True)):
        length = keys.shape[0] if lengths is None else min(lengths[b], keys.shape[0])
        scores = torch.einsum("qhd,khd->hqk", queries, keys[:length])
        weights = torch.softmax(scores * (q.shape[-1] ** -0.5 if scale is None else scale), dim=-1)
        rows.append(torch.einsum("hqk,khd->qhd", weights, values[:length]).flatten(1))
    return torch.stack(rows)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lengths: Tensor | None = None,
    scale: float | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """One call of the compiled module, into an output of the caller's."""
    assert backends._C is not None
    scales = None if weights is None else ops.key_scales(k, eps=EPS)
    backends._C.attention(
        q=q.data_ptr(),
        q_strides=q.stride()[:3],
        k=k.data_ptr(),
        k_strides=k.stride()[:3],
        v=v.data_ptr(),
        v_strides=v.stride()[:3],
        shape=(q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.shape[3]),
        dtype=str(q.dtype).removeprefix("torch."),
        kv_len=0 if lengths is None else lengths.data_ptr(),
        softmax_scale=q.shape[-1] ** -0.5 if scale is None else scale,
        q_weight=0 if weights is None else weights[0].data_ptr(),
        k_weight=0 if weights is None else weights[1].data_ptr(),
        key_scales=0 if scales is None else scales.data_ptr(),
        key_scales_pitch=0 if scales is None else scales.shape[-1],
        eps=EPS,
        cos=0 if rope is None else rope[0].data_ptr(),
        sin=0 if rope is None else rope[1].data_ptr(),
        pair_stride=16,
        out=out.data_ptr(),
        device=q.device.index,
        stream=torch.cuda.current_stream().cuda_stream,
    )
    return out


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return y.transpose(1, 2).flatten(2)


def int32(values: list[int], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm in float64."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
