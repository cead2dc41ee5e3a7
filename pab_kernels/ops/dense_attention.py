"""Attention of all queries on all keys: spatial, full 3D and cross."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pab_kernels.ops import backends, reference
from pab_kernels.ops.backends import resolve
from pab_kernels.ops.checks import (
    check_float,
    check_last_contiguous,
    check_like,
    check_scales,
    check_shape,
    check_tensor,
)
from pab_kernels.ops.fp8_attention import fp8_attention
from pab_kernels.ops.quantized import Quantized
from pab_kernels.ops.query_key import across_heads, check_qkv, key_scales, qk_norm_rope
from pab_kernels.ops.registration import register
from pab_kernels.ops.residual import residual_norm_modulate

SDPA_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""SDPA's own backends, best first: at head_dim 72 cuDNN is 1.4 times as fast as flash on an H100."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_len: Tensor | None = None,
    softmax_scale: float | None = None,
    out_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of all queries on all keys: spatial, full 3D and cross.

    Parameters
    ----------
    q : Tensor
        Queries [B, Lq, H, D], any strides but 1 for D.
    k, v : Tensor
        Keys and values [B, Lk, H, D], likewise.
    kv_len : Tensor, optional
        int32 [B] on the device: row b attends to its first ``kv_len[b]`` keys. A length of 0 gives zeros. Keys and
        values beyond must be finite (the Triton backend never reads them).
    softmax_scale : float, optional
        Factor on the scores, D**-0.5 by default.
    out_scale : Tensor, optional
        float32 [B, Lq], contiguous, the same for all tokens of one b: the result is in e4m3, to be multiplied by it. No
        output is larger than the largest value, so where 448 times the scale is at least that, nothing overflows; what
        does becomes 448. A backend that cannot ("sdpa") writes scales of its own there: the exact ones.
    backend : {"cuda", "triton", "sdpa", "reference"}, optional
        Forces a backend.

    Returns
    -------
    Tensor
        [B, Lq, H * D] in the dtype of q, or e4m3.

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, shape, stride or device, naming the argument.
    """
    check_float("q", check_tensor("q", q))
    check_shape("q", q, ("B", "Lq", "H", "D"))
    check_shape("k", check_tensor("k", k), (q.shape[0], "Lk", *q.shape[2:]))
    check_shape("v", check_tensor("v", v), tuple(k.shape))
    for name, value in (("k", k), ("v", v)):
        check_like(name, value, q, "q")
        check_last_contiguous(name, value)
    check_last_contiguous("q", q)
    if kv_len is not None:
        check_shape("kv_len", check_tensor("kv_len", kv_len), (q.shape[0],))
        if kv_len.dtype != torch.int32 or kv_len.device != q.device:
            raise ValueError(f"kv_len: is {kv_len.dtype} on {kv_len.device}, must be torch.int32 on {q.device}")
    if out_scale is not None:
        check_scales("out_scale", out_scale, tuple(q.shape[:2]), q.device)
    if k.shape[1] == 0 or q.numel() == 0:
        return _empty(q, out_scale).zero_()
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    name = resolve("attention", backend, q, k, v, kv_len, out_scale)
    return _run(q, k, v, kv_len, scale, None, None, None, 0.0, None, None, 1, out_scale, name)


def self_attention(
    qkv: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    pair_stride: int = 1,
    eps: float = 1e-6,
    softmax_scale: float | None = None,
    precision: str | None = None,
    out_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of all tokens on all, straight from the QKV GEMM's output: `qk_norm_rope`, then `attention`.

    The CUDA kernel norms or rotates the queries as it loads them. Of the keys' norm it wants `key_scales` alone: a pass
    that reads them and writes next to nothing.

    Parameters
    ----------
    qkv : Tensor
        [B, N, 3, H, D], any strides but 1 for D. It is used up: its queries and keys may be overwritten.
    q_weight, k_weight, rope, pair_stride, eps
        As for `qk_norm_rope`.
    softmax_scale, backend
        As for `attention`.
    precision : {"fp8"}, optional
        In e4m3 where the table of backends says so: then it is `qk_norm_rope` and `fp8_attention`, and `backend` is
        one of that.
    out_scale : Tensor, optional
        float32 [B, N], contiguous, the same for all tokens of one b: the result is in e4m3, to be multiplied by it. No
        output is larger than the largest value, so where 448 times the scale is at least that, nothing overflows; what
        does becomes 448. A backend that cannot ("sdpa", or attention that is in e4m3 itself) writes scales of its own
        there: the exact ones.

    Returns
    -------
    Tensor
        [B, N, H * D] in the dtype of qkv, or e4m3.

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, shape, stride or device, naming the argument.
    """
    check_qkv(qkv, q_weight, k_weight, rope, pair_stride)
    check_shape("qkv", qkv, ("B", "N", 3, "H", "D"))
    q, k, v = qkv.unbind(2)
    if out_scale is not None:
        check_scales("out_scale", out_scale, tuple(q.shape[:2]), q.device)
    if qkv.numel() == 0:
        return _empty(q, out_scale)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if precision not in (None, "fp8"):
        raise ValueError(f"precision: got {precision!r}, must be 'fp8' or None")
    if precision == "fp8" and resolve("fp8_attention", backend, q, k, v) != "attention":
        qk_norm_rope(qkv, q_weight=q_weight, k_weight=k_weight, rope=rope, pair_stride=pair_stride, eps=eps)
        return _as_asked(fp8_attention(q, k, v, softmax_scale=scale, backend=backend), out_scale)
    name = resolve("attention", None if precision else backend, q, k, v, None, out_scale)
    form = backends.choose_preparation(
        name,
        backends.Preparation(
            head_dim=q.shape[-1],
            across_heads=across_heads(qkv, q_weight, k_weight, rope),
            q_norm=q_weight is not None,
            k_norm=k_weight is not None,
            pair_stride=None if rope is None else pair_stride,
        ),
    )
    if form == "norm on load":
        scales = key_scales(k, eps=eps)
        norm = (q_weight, k_weight, scales, float(eps))
        return _run(q, k, v, None, scale, *norm, None, None, 1, out_scale, name)
    if form == "rotate on load":
        assert rope is not None
        qk_norm_rope(qkv, k_weight=k_weight, rope=rope, pair_stride=pair_stride, eps=eps, queries=False)
        return _run(q, k, v, None, scale, None, None, None, 0.0, *rope, int(pair_stride), out_scale, name)
    qk_norm_rope(qkv, q_weight=q_weight, k_weight=k_weight, rope=rope, pair_stride=pair_stride, eps=eps)
    return attention(q, k, v, softmax_scale=scale, out_scale=out_scale, backend=name)


def _run(*arguments: Any) -> Tensor:
    """The op; its last two arguments are `out_scale` and the backend."""
    *inputs, out_scale, name = arguments
    if name == "sdpa":
        return _as_asked(torch.ops.pab.attention(*inputs, None, name), out_scale)
    return torch.ops.pab.attention(*inputs, out_scale, name)


def _as_asked(y: Tensor, out_scale: Tensor | None) -> Tensor:
    """y [B, N, C] itself, or in e4m3 with its own scales in `out_scale`."""
    if out_scale is None:
        return y
    out = Quantized(torch.empty_like(y, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format), out_scale)
    residual_norm_modulate(y, out=out)
    return out.values


def _empty(q: Tensor, out_scale: Tensor | None) -> Tensor:
    """Room for the result."""
    dtype = q.dtype if out_scale is None else torch.float8_e4m3fn
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2] * q.shape[3], dtype=dtype)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    softmax_scale: float,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    scales: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    pair_stride: int,
    out_scale: Tensor | None,
    backend: str,
) -> Tensor:
    if backend == "cuda":
        norm = (q_weight, k_weight, scales, eps)
        return _attention_cuda(q, k, v, kv_len, softmax_scale, *norm, cos, sin, pair_stride, out_scale)
    if any(x is not None for x in (q_weight, k_weight, scales, cos, sin)):
        raise ValueError(f"backend: got {backend!r}, must be 'cuda' to norm or rotate on load")
    if backend == "reference":
        return reference.attention_ref(q, k, v, kv_len=kv_len, softmax_scale=softmax_scale, out_scale=out_scale)
    if backend == "triton":
        from pab_kernels.triton_ops.attention import attention_triton

        return attention_triton(q, k, v, kv_len, softmax_scale, out_scale=out_scale)
    mask = None
    if kv_len is not None:
        # SDPA gives NaN to a row without keys: let it see one key, whose value is zero.
        mask = torch.arange(k.shape[1], device=k.device) < kv_len[:, None].clamp(min=1)
        mask = mask[:, None, None, :]
        v = v * (kv_len > 0)[:, None, None, None].to(v.dtype)
    q_heads, k_heads, v_heads = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    with sdpa_kernel(SDPA_ORDER, set_priority=True) if q.is_cuda else nullcontext():
        y = F.scaled_dot_product_attention(q_heads, k_heads, v_heads, attn_mask=mask, scale=softmax_scale)
    # The fused backends lay their output out like q, so that this is a view.
    return y.transpose(1, 2).reshape(q.shape[0], q.shape[1], -1)


def _attention_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    softmax_scale: float,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    scales: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    pair_stride: int,
    out_scale: Tensor | None,
) -> Tensor:
    if backends._C is None:
        raise ValueError("backend: cuda was left out of this build")
    if q.device.type != "cuda":
        raise ValueError(f"backend: cuda got a tensor on {q.device}, must be on a CUDA device")
    batch, queries, heads, head_dim = q.shape
    out = _empty(q, out_scale)
    lengths = None if kv_len is None else kv_len.contiguous()
    backends._C.attention(
        q=q.data_ptr(),
        q_strides=q.stride()[:3],
        k=k.data_ptr(),
        k_strides=k.stride()[:3],
        v=v.data_ptr(),
        v_strides=v.stride()[:3],
        shape=(batch, queries, k.shape[1], heads, head_dim),
        dtype=str(q.dtype).removeprefix("torch."),
        kv_len=0 if lengths is None else lengths.data_ptr(),
        softmax_scale=softmax_scale,
        q_weight=0 if q_weight is None else q_weight.data_ptr(),
        k_weight=0 if k_weight is None else k_weight.data_ptr(),
        key_scales=0 if scales is None else scales.data_ptr(),
        key_scales_pitch=0 if scales is None else scales.shape[-1],
        eps=eps,
        cos=0 if cos is None else cos.data_ptr(),
        sin=0 if sin is None else sin.data_ptr(),
        pair_stride=pair_stride,
        out=out.data_ptr(),
        device=q.device.index,
        stream=torch.cuda.current_stream(q.device).cuda_stream,
        out_scale=0 if out_scale is None else out_scale.data_ptr(),
    )
    return out


register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? kv_len, float softmax_scale, Tensor? q_weight, Tensor? k_weight, "
    "Tensor? scales, float eps, Tensor? cos, Tensor? sin, int pair_stride, "
    "Tensor? out_scale, str backend) -> Tensor",
    (),
    _attention,
    lambda q, *rest: _empty(q, rest[-2]),
)
