"""Self-attention with both products in e4m3."""

from __future__ import annotations

import torch
from torch import Tensor

from pab_kernels.ops import backends, reference
from pab_kernels.ops.backends import resolve
from pab_kernels.ops.checks import check_float, check_last_contiguous, check_like, check_shape, check_tensor
from pab_kernels.ops.registration import register

SAMPLES = 512
"""Tokens, spread over all, whose mean is taken out of keys and values. Any row would do: the softmax does not see that
of the keys, and that of the values is added again."""


def fp8_attention(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None, backend: str | None = None
) -> Tensor:
    """Attention of all tokens on all in e4m3: queries, keys, weights and values are rounded to 4 significant bits.

    A query has a scale of its own, 128 keys share one and 1024 values; sums of so many are in float32. Keys are
    centred first: their mean adds the same to all scores of a query (arXiv:2410.02367). So are values, whose mean is
    added to the result. On Gaussian data the result is 5 % off. Scores and weights are float16; where the norms of a
    query and of the longest key, times `softmax_scale`, come to more than 10,000, the query's scores are all divided so
    that they do not.

    Parameters
    ----------
    q, k, v : Tensor
        [B, N, H, D], any strides but 1 for D.
    softmax_scale : float, optional
        Factor on the scores, positive; D**-0.5 by default.
    backend : {"cuda", "attention", "reference"}, optional
        Forces a backend. "attention" is `ops.attention`, without rounding.

    Returns
    -------
    Tensor
        [B, N, H * D] in the dtype of q.

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, shape, stride or device, naming the argument.
    """
    check_float("q", check_tensor("q", q))
    check_shape("q", q, ("B", "N", "H", "D"))
    check_last_contiguous("q", q)
    for name, value in (("k", k), ("v", v)):
        check_shape(name, check_tensor(name, value), tuple(q.shape))
        check_like(name, value, q, "q")
        check_last_contiguous(name, value)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if not scale > 0:
        raise ValueError(f"softmax_scale: got {scale}, must be positive")
    if q.numel() == 0:
        return q.new_zeros(q.shape[0], q.shape[1], q.shape[2] * q.shape[3])
    return torch.ops.pab.fp8_attention(q, k, v, scale, resolve("fp8_attention", backend, q, k, v))


def _fp8_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, backend: str) -> Tensor:
    if backend == "attention":
        name = resolve("attention", None, q, k, v, None)
        return torch.ops.pab.attention(q, k, v, None, softmax_scale, None, None, None, 0.0, None, None, 1, None, name)
    if backend == "reference":
        return reference.fp8_attention_ref(q, k, v, max(1, q.shape[1] // SAMPLES), softmax_scale)
    return attend_quantized(quantize_qkv(q, k, v), q.shape, q.dtype, softmax_scale)


def quantize_qkv(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """What the kernel takes: center_k, center_v, q8, k8, v8, q_scale, k_scale, v_scale, as triton_ops/quantize_qkv.py
    describes them.
    """
    from pab_kernels.triton_ops.quantize_qkv import BLOCK, STEP, quantize_qkv_triton

    batch, tokens, heads, head_dim = q.shape
    steps, blocks = -(-tokens // STEP), -(-tokens // BLOCK)
    columns, pitch = -(-head_dim // 16) * 16, steps * STEP
    centers = [q.new_empty(batch, heads, head_dim, dtype=torch.float32) for _ in "kv"]
    q8, k8 = (q.new_empty(batch, tokens, heads, columns, dtype=torch.float8_e4m3fn) for _ in "qk")
    v8 = q.new_empty(batch, heads, head_dim, pitch, dtype=torch.float8_e4m3fn)
    scales = [q.new_empty(batch, heads, count, dtype=torch.float32) for count in (tokens, steps, blocks)]
    results = (*centers, q8, k8, v8, *scales)
    quantize_qkv_triton(q, k, v, max(1, tokens // SAMPLES), results)
    return results


def attend_quantized(
    quantized: tuple[Tensor, ...], shape: tuple[int, ...], dtype: torch.dtype, softmax_scale: float
) -> Tensor:
    """The kernel on what `quantize_qkv` has made of q, k, v of this shape, [B, N, H, D]: [B, N, H * D]."""
    from pab_kernels.triton_ops.quantize_qkv import BLOCK

    if backends._C is None:
        raise ValueError("backend: cuda was left out of this build")
    _, center_v, q8, k8, v8, q_scale, k_scale, v_scale = quantized
    batch, tokens, heads, head_dim = shape
    out = q8.new_empty(batch, tokens, heads * head_dim, dtype=dtype)
    backends._C.fp8_attention(
        q=q8.data_ptr(),
        k=k8.data_ptr(),
        v=v8.data_ptr(),
        q_scale=q_scale.data_ptr(),
        k_scale=k_scale.data_ptr(),
        v_scale=v_scale.data_ptr(),
        v_center=center_v.data_ptr(),
        shape=(batch, tokens, heads, head_dim),
        columns=q8.shape[-1],
        pitch=v8.shape[-1],
        block=BLOCK,
        dtype=str(dtype).removeprefix("torch."),
        softmax_scale=softmax_scale,
        out=out.data_ptr(),
        device=q8.device.index,
        stream=torch.cuda.current_stream(q8.device).cuda_stream,
    )
    return out


register(
    "fp8_attention(Tensor q, Tensor k, Tensor v, float softmax_scale, str backend) -> Tensor",
    (),
    _fp8_attention,
    lambda q, *_: q.new_empty(q.shape[0], q.shape[1], q.shape[2] * q.shape[3]),
)
