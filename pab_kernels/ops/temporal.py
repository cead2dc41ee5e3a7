"""Self-attention along the frames."""

from __future__ import annotations

import torch
from torch import Tensor

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
from pab_kernels.ops.query_key import check_norm_rope
from pab_kernels.ops.registration import register, writes_only


def temporal_attention(
    qkv: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
    softmax_scale: float | None = None,
    out_scale: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Self-attention along T for every (batch, token, head), straight from the QKV GEMM's output.

    Parameters
    ----------
    qkv : Tensor
        [B, T, S, 3, H, D], any strides but 1 for D. D is even.
    q_weight, k_weight : Tensor, optional
        RMSNorm weights [D] of queries and keys, dtype of qkv; None for no norm.
    rope : (cos, sin), optional
        Rotary tables, each [T, D / 2] float32, applied after the norm to the interleaved pairs (2i, 2i + 1)
        (arXiv:2104.09864).
    eps : float
        Of the RMSNorm.
    softmax_scale : float, optional
        Factor on the scores, D**-0.5 by default.
    out_scale : Tensor, optional
        float32 [B, T, S], contiguous, the same for all frames of one (b, s): the result is in e4m3, to be multiplied by
        it. No output is larger than the largest value, so where 448 times the scale is at least that, nothing
        overflows; what does becomes 448.
    out : Tensor, optional
        Contiguous [B, T, S, H * D], dtype of qkv, or e4m3 with `out_scale`.
    backend : {"cuda", "triton", "reference"}, optional
        Forces a backend.

    Returns
    -------
    Tensor
        [B, T, S, H * D] in the dtype of qkv, or e4m3; softmax and sums are float32.

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, shape, stride or device, naming the argument.
    """
    check_float("qkv", check_tensor("qkv", qkv))
    check_shape("qkv", qkv, ("B", "T", "S", 3, "H", "D"))
    check_last_contiguous("qkv", qkv)
    batch, frames, tokens, _, heads, head_dim = qkv.shape
    if head_dim % 2:
        raise ValueError(f"qkv: head_dim is {head_dim}, must be even")
    check_norm_rope(qkv, q_weight, k_weight, rope, frames)
    cos, sin = (None, None) if rope is None else rope
    shape = (batch, frames, tokens, heads * head_dim)
    if out_scale is not None:
        check_scales("out_scale", out_scale, shape[:-1], qkv.device)
    out = _output(out, shape, qkv, qkv.dtype if out_scale is None else torch.float8_e4m3fn)
    if out.numel() > 0:
        scale = head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
        name = resolve("temporal_attention", backend, qkv, out)
        torch.ops.pab.temporal_attention(qkv, q_weight, k_weight, cos, sin, float(eps), scale, out_scale, out, name)
    return out


def _output(out: Tensor | None, shape: tuple[int, ...], qkv: Tensor, dtype: torch.dtype) -> Tensor:
    """`out` after its checks, or a fresh contiguous tensor."""
    if out is None:
        return qkv.new_empty(shape, dtype=dtype)
    check_shape("out", check_tensor("out", out), shape)
    if dtype == qkv.dtype:
        check_like("out", out, qkv, "qkv")
    elif out.dtype != dtype or out.device != qkv.device:
        raise TypeError(f"out: is {out.dtype} on {out.device}, must be {dtype} on {qkv.device} with out_scale")
    if not out.is_contiguous():
        raise ValueError(f"out: strides are {out.stride()}, must be contiguous")
    return out


def _temporal_attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    softmax_scale: float,
    out_scale: Tensor | None,
    out: Tensor,
    backend: str,
) -> None:
    if backend == "cuda":
        backends._C.temporal_attention(
            qkv=qkv.data_ptr(),
            qkv_strides=qkv.stride()[:5],
            shape=tuple(qkv.shape),
            dtype=str(qkv.dtype).removeprefix("torch."),
            q_weight=0 if q_weight is None else q_weight.data_ptr(),
            k_weight=0 if k_weight is None else k_weight.data_ptr(),
            cos=0 if cos is None else cos.data_ptr(),
            sin=0 if sin is None else sin.data_ptr(),
            eps=eps,
            softmax_scale=softmax_scale,
            out=out.data_ptr(),
            device=qkv.device.index,
            stream=torch.cuda.current_stream(qkv.device).cuda_stream,
            out_scale=0 if out_scale is None else out_scale.data_ptr(),
        )
    elif backend == "triton":
        from pab_kernels.triton_ops.temporal_attention import temporal_attention_triton

        temporal_attention_triton(qkv, q_weight, k_weight, cos, sin, eps, softmax_scale, out_scale, out)
    else:
        reference.temporal_attention_ref(
            qkv,
            q_weight=q_weight,
            k_weight=k_weight,
            rope=None if cos is None or sin is None else (cos, sin),
            eps=eps,
            softmax_scale=softmax_scale,
            out_scale=out_scale,
            out=out,
        )


register(
    "temporal_attention(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, float eps, "
    "float softmax_scale, Tensor? out_scale, Tensor(a!) out, str backend) -> ()",
    ("out",),
    _temporal_attention,
    writes_only,
)
