"""The public ops: checks, choice of backend, and a fake for each, so that torch.compile can trace them.

The first backend of `backends.BACKENDS` that supports a call serves it. `backend=` forces one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pab_kernels import backends, reference
from pab_kernels.backends import resolve
from pab_kernels.checks import (
    check_float,
    check_last_contiguous,
    check_like,
    check_quantized,
    check_shape,
    check_tensor,
)
from pab_kernels.quantized import Quantized

MAX_BRANCHES = 4
"""Most branch outputs that one pass adds."""
SDPA_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""SDPA's own backends, best first: at head_dim 72 cuDNN is 1.4 times as fast as flash on an H100."""


# The pass between two GEMMs


@overload
def residual_norm_modulate(
    x: Tensor,
    branches: Sequence[Tensor | Quantized] = (),
    gates: Sequence[Tensor | None] | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    embed: Tensor | None = None,
    eps: float = 1e-6,
    out: Tensor | None = None,
    saved: Quantized | None = None,
    backend: str | None = None,
) -> Tensor: ...


@overload
def residual_norm_modulate(
    x: Tensor,
    branches: Sequence[Tensor | Quantized] = (),
    gates: Sequence[Tensor | None] | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    embed: Tensor | None = None,
    eps: float = 1e-6,
    out: Quantized,
    saved: Quantized | None = None,
    backend: str | None = None,
) -> Quantized: ...


def residual_norm_modulate(
    x: Tensor,
    branches: Sequence[Tensor | Quantized] = (),
    gates: Sequence[Tensor | None] | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    embed: Tensor | None = None,
    eps: float = 1e-6,
    out: Tensor | Quantized | None = None,
    saved: Quantized | None = None,
    backend: str | None = None,
) -> Tensor | Quantized:
    """Add branch outputs to the residual stream in place, then normalise and modulate it.

    ``x += sum(gate * branch) + embed``; where `shift` and `scale` are given, also
    ``out = layer_norm(x) * (1 + scale) + shift`` without affine weights (adaLN of DiT, arXiv:2212.09748).
    Sums and norm are float32 (float64 for float64 input on the reference), and the norm sees the sum before it is
    rounded to the dtype of x. So does what is quantised: rows of one byte an element are rounded once, and their scale
    comes from the same registers.

    Parameters
    ----------
    x : Tensor
        Residual stream [G, N, C]; any strides for G and N, stride 1 for C. Written in place where there is
        something to add.
    branches : sequence of (Tensor or Quantized)
        At most 4 of [G, N, C], dtype of x or one byte an element: outputs just computed, or slots. None may overlap x
        or `out`.
    gates : sequence of (Tensor or None), optional
        For each branch its gate [G, C], or None for none. All None by default.
    shift, scale : Tensor, optional
        Modulation [G, C]: every row of group g uses row g. Both or neither.
    embed : Tensor, optional
        Position embedding [P, C], P dividing N: row n of each group adds ``embed[n // (N // P)]``.
    eps : float
        Added to the variance.
    out : Tensor or Quantized, optional
        Where the modulated rows go, [G, N, C]. Without `shift` and `scale` only a Quantized: a copy of the new x. Must
        not overlap x.
    saved : Quantized, optional
        Where a copy of ``branches[0]``, not gated, goes: how a slot of one byte an element is written.
    backend : {"triton", "reference"}, optional
        Forces a backend.

    Returns
    -------
    Tensor or Quantized
        `out` [G, N, C], or x itself where there is neither modulation nor `out`.

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, shape, stride or device, naming the argument.
    """
    check_float("x", check_tensor("x", x))
    check_shape("x", x, ("G", "N", "C"))
    check_last_contiguous("x", x)
    groups, rows, channels = x.shape
    gates = [None] * len(branches) if gates is None else list(gates)
    if len(branches) > MAX_BRANCHES:
        raise ValueError(f"branches: got {len(branches)}, must be at most {MAX_BRANCHES}")
    if len(gates) != len(branches):
        raise ValueError(f"gates: got {len(gates)} for {len(branches)} branches, must be one each")
    if (shift is None) != (scale is None):
        raise ValueError("shift, scale: got one of them, must be both or neither")
    if isinstance(out, Tensor) and shift is None:
        raise ValueError("out: got a tensor without shift and scale, must be None where nothing is modulated")
    if saved is not None and not branches:
        raise ValueError("saved: got a Quantized without branches, must be None where there is nothing to save")
    named: list[tuple[str, Tensor | Quantized | None, tuple[int | str, ...]]] = [
        *((f"branches[{i}]", branch, (groups, rows, channels)) for i, branch in enumerate(branches)),
        *((f"gates[{i}]", gate, (groups, channels)) for i, gate in enumerate(gates)),
        ("shift", shift, (groups, channels)),
        ("scale", scale, (groups, channels)),
        ("embed", embed, ("P", channels)),
        ("out", out, (groups, rows, channels)),
        ("saved", saved, (groups, rows, channels)),
    ]
    for name, value, shape in named:
        if isinstance(value, Quantized):
            check_quantized(name, value, shape, x.device)
        elif value is not None:
            check_shape(name, check_tensor(name, value), shape)
            check_like(name, value, x, "x")
            check_last_contiguous(name, value)
    if embed is not None and (embed.shape[0] == 0 or rows % embed.shape[0]):
        raise ValueError(f"embed: has {embed.shape[0]} rows, must divide the {rows} rows of x")
    if shift is not None and out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() > 0:
        parts = [split(branch) for branch in branches]
        values, row_scales = [value for value, _ in parts], [row_scale for _, row_scale in parts]
        name = resolve("residual_norm_modulate", backend, x)
        torch.ops.pab.residual_norm_modulate(
            x, values, row_scales, gates, shift, scale, embed, float(eps), *split(out), *split(saved), name
        )
    return x if out is None else out


def split(rows: Tensor | Quantized | None) -> tuple[Tensor | None, Tensor | None]:
    """Values and row scales, as an op's schema takes them."""
    return (rows.values, rows.row_scale) if isinstance(rows, Quantized) else (rows, None)


def join(values: Tensor | None, row_scale: Tensor | None) -> Tensor | Quantized | None:
    """What `split` took apart."""
    return values if values is None or row_scale is None else Quantized(values, row_scale)


def _residual_norm_modulate(
    x: Tensor,
    values: list[Tensor],
    row_scales: list[Tensor | None],
    gates: list[Tensor | None],
    shift: Tensor | None,
    scale: Tensor | None,
    embed: Tensor | None,
    eps: float,
    out: Tensor | None,
    out_scale: Tensor | None,
    saved: Tensor | None,
    saved_scale: Tensor | None,
    backend: str,
) -> None:
    branches: Any = [join(*parts) for parts in zip(values, row_scales, strict=True)]
    written = join(out, out_scale)
    copy = None if saved is None or saved_scale is None else Quantized(saved, saved_scale)
    if backend == "triton":
        from pab_kernels.triton_ops.residual_norm_modulate import residual_norm_modulate_triton

        residual_norm_modulate_triton(x, branches, gates, shift, scale, embed, eps, written, copy)
    else:
        reference.residual_norm_modulate_ref(
            x, branches, gates, shift, scale, embed=embed, eps=eps, out=written, saved=copy
        )


# Temporal attention


def temporal_attention(
    qkv: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
    softmax_scale: float | None = None,
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
    out : Tensor, optional
        Contiguous [B, T, S, H * D], dtype of qkv.
    backend : {"cuda", "triton", "reference"}, optional
        Forces a backend.

    Returns
    -------
    Tensor
        [B, T, S, H * D] in the dtype of qkv; softmax and sums are float32.

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
    _check_norm_rope(qkv, q_weight, k_weight, rope, frames)
    cos, sin = (None, None) if rope is None else rope
    shape = (batch, frames, tokens, heads * head_dim)
    out = _output("out", out, shape, qkv, "qkv")
    if out.numel() > 0:
        scale = head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
        name = resolve("temporal_attention", backend, qkv)
        torch.ops.pab.temporal_attention(qkv, q_weight, k_weight, cos, sin, float(eps), scale, out, name)
    return out


def _output(name: str, out: Tensor | None, shape: tuple[int, ...], model: Tensor, model_name: str) -> Tensor:
    """`out` after its checks, or a fresh contiguous tensor."""
    if out is None:
        return model.new_empty(shape)
    check_shape(name, check_tensor(name, out), shape)
    check_like(name, out, model, model_name)
    if not out.is_contiguous():
        raise ValueError(f"{name}: strides are {out.stride()}, must be contiguous")
    return out


def _temporal_attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    softmax_scale: float,
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
        )
    elif backend == "triton":
        from pab_kernels.triton_ops.temporal_attention import temporal_attention_triton

        temporal_attention_triton(qkv, q_weight, k_weight, cos, sin, eps, softmax_scale, out)
    else:
        reference.temporal_attention_ref(
            qkv,
            q_weight=q_weight,
            k_weight=k_weight,
            rope=None if cos is None or sin is None else (cos, sin),
            eps=eps,
            softmax_scale=softmax_scale,
            out=out,
        )


# Norm and rotary embedding of queries and keys


def qk_norm_rope(
    qkv: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    pair_stride: int = 1,
    eps: float = 1e-6,
    queries: bool = True,
    backend: str | None = None,
) -> Tensor:
    """RMSNorm, then rotary embedding, of the queries and keys in the QKV GEMM's output, in place.

    Parameters
    ----------
    qkv : Tensor
        [B, N, 3, H, D], any strides but 1 for D; q and k are overwritten, v is left alone.
    q_weight, k_weight : Tensor, optional
        RMSNorm weights [D], dtype of qkv; None for no norm.
    rope : (cos, sin), optional
        Rotary tables, each [N, D / 2] float32 (arXiv:2104.09864).
    pair_stride : int
        Distance s between the channels of a pair: they lie in groups of 2s, channel i < s of a group pairs with
        i + s, and the tables run over groups, then i. 1 is interleaved pairs, D / 2 is half against half.
    eps : float
        Of the RMSNorm.
    queries : bool
        False leaves the queries alone.
    backend : {"triton", "reference"}, optional
        Forces a backend.

    Returns
    -------
    Tensor
        qkv.

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, shape, stride or device, naming the argument.
    """
    check_float("qkv", check_tensor("qkv", qkv))
    check_shape("qkv", qkv, ("B", "N", 3, "H", "D"))
    check_last_contiguous("qkv", qkv)
    _check_norm_rope(qkv, q_weight, k_weight, rope, qkv.shape[1], pair_stride)
    if qkv.numel() > 0 and not ((q_weight is None or not queries) and k_weight is None and rope is None):
        cos, sin = (None, None) if rope is None else rope
        name = resolve("qk_norm_rope", backend, qkv)
        torch.ops.pab.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, int(pair_stride), float(eps), queries, name)
    return qkv


def _check_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    positions: int,
    pair_stride: int = 1,
) -> None:
    head_dim = qkv.shape[-1]
    if pair_stride < 1 or head_dim % (2 * pair_stride):
        raise ValueError(f"pair_stride: got {pair_stride}, twice of it must divide the head_dim {head_dim}")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_shape(name, check_tensor(name, weight), (head_dim,))
            check_like(name, weight, qkv, "qkv")
            check_last_contiguous(name, weight)
    for i, table in enumerate(rope or ()):
        name = f"rope[{i}]"
        check_shape(name, check_tensor(name, table), (positions, head_dim // 2))
        if table.dtype != torch.float32 or table.device != qkv.device or not table.is_contiguous():
            raise ValueError(f"{name}: is {table.dtype} on {table.device}, must be contiguous float32 on {qkv.device}")


def _qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    pair_stride: int,
    eps: float,
    queries: bool,
    backend: str,
) -> None:
    if backend == "triton":
        from pab_kernels.triton_ops.qk_norm_rope import qk_norm_rope_triton

        qk_norm_rope_triton(qkv, q_weight, k_weight, cos, sin, pair_stride, eps, queries)
    else:
        rope = None if cos is None or sin is None else (cos, sin)
        reference.qk_norm_rope_ref(qkv, q_weight, k_weight, rope, pair_stride=pair_stride, eps=eps, queries=queries)


def key_scales(k: Tensor, *, eps: float = 1e-6, backend: str | None = None) -> Tensor:
    """``1 / sqrt(mean(k**2) + eps)`` of every key: RMSNorm without its weight, as a factor of the scores.

    Parameters
    ----------
    k : Tensor
        Keys [B, N, H, D], any strides but 1 for D.
    eps : float
        Of the RMSNorm.
    backend : {"triton", "reference"}, optional
        Forces a backend.

    Returns
    -------
    Tensor
        float32 [B, H, P], P being N up to a multiple of 4; those from N on are not set.

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, shape or stride, naming the argument.
    """
    check_float("k", check_tensor("k", k))
    check_shape("k", k, ("B", "N", "H", "D"))
    check_last_contiguous("k", k)
    return torch.ops.pab.key_scales(k, float(eps), resolve("key_scales", backend, k))


def _key_scales(k: Tensor, eps: float, backend: str) -> Tensor:
    out = _empty_scales(k)
    if out.numel() > 0:
        if backend == "triton":
            from pab_kernels.triton_ops.key_scales import key_scales_triton

            key_scales_triton(k, eps, out)
        else:
            reference.key_scales_ref(k, eps, out)
    return out


def _empty_scales(k: Tensor) -> Tensor:
    batch, length, heads, _ = k.shape
    return k.new_empty(batch, heads, -(-length // 4) * 4, dtype=torch.float32)


# Attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_len: Tensor | None = None,
    softmax_scale: float | None = None,
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
    backend : {"cuda", "triton", "sdpa", "reference"}, optional
        Forces a backend.

    Returns
    -------
    Tensor
        [B, Lq, H * D] in the dtype of q.

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
    if k.shape[1] == 0 or q.numel() == 0:
        return q.new_zeros(q.shape[0], q.shape[1], q.shape[2] * q.shape[3])
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    name = resolve("attention", backend, q, k, v, kv_len)
    return torch.ops.pab.attention(q, k, v, kv_len, scale, None, None, None, 0.0, None, None, 1, name)


def self_attention(
    qkv: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    pair_stride: int = 1,
    eps: float = 1e-6,
    softmax_scale: float | None = None,
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

    Returns
    -------
    Tensor
        [B, N, H * D] in the dtype of qkv.

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, shape, stride or device, naming the argument.
    """
    check_float("qkv", check_tensor("qkv", qkv))
    check_shape("qkv", qkv, ("B", "N", 3, "H", "D"))
    check_last_contiguous("qkv", qkv)
    _check_norm_rope(qkv, q_weight, k_weight, rope, qkv.shape[1], pair_stride)
    q, k, v = qkv.unbind(2)
    if qkv.numel() == 0:
        return qkv.new_zeros(*q.shape[:2], q.shape[2] * q.shape[3])
    name = resolve("attention", backend, q, k, v, None)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if name == "cuda" and rope is None and q_weight is not None and k_weight is not None:
        scales = key_scales(k, eps=eps)
        return torch.ops.pab.attention(
            q, k, v, None, scale, q_weight, k_weight, scales, float(eps), None, None, 1, name
        )
    if name == "cuda" and rope is not None and q_weight is None and (q.shape[-1], pair_stride) == backends.HOPPER_ROPE:
        qk_norm_rope(qkv, k_weight=k_weight, rope=rope, pair_stride=pair_stride, eps=eps, queries=False)
        return torch.ops.pab.attention(q, k, v, None, scale, None, None, None, 0.0, *rope, int(pair_stride), name)
    qk_norm_rope(qkv, q_weight=q_weight, k_weight=k_weight, rope=rope, pair_stride=pair_stride, eps=eps)
    return attention(q, k, v, softmax_scale=scale, backend=name)


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
    backend: str,
) -> Tensor:
    if backend == "cuda":
        norm = (q_weight, k_weight, scales, eps)
        return _attention_cuda(q, k, v, kv_len, softmax_scale, *norm, cos, sin, pair_stride)
    if any(x is not None for x in (q_weight, k_weight, scales, cos, sin)):
        raise ValueError(f"backend: got {backend!r}, must be 'cuda' to norm or rotate on load")
    if backend == "reference":
        return reference.attention_ref(q, k, v, kv_len=kv_len, softmax_scale=softmax_scale)
    if backend == "triton":
        from pab_kernels.triton_ops.attention import attention_triton

        return attention_triton(q, k, v, kv_len, softmax_scale)
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
) -> Tensor:
    if backends._C is None:
        raise ValueError("backend: cuda was left out of this build")
    if q.device.type != "cuda":
        raise ValueError(f"backend: cuda got a tensor on {q.device}, must be on a CUDA device")
    batch, queries, heads, head_dim = q.shape
    out = q.new_empty(batch, queries, heads * head_dim)
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
    )
    return out


# Registration


def register(
    schema: str,
    mutates: tuple[str, ...],
    implementation: Callable[..., Tensor | None],
    fake: Callable[..., Tensor | None],
) -> None:
    """Make `torch.ops.pab.<name>`."""
    name = schema.partition("(")[0]
    op = torch.library.custom_op(f"pab::{name}", implementation, mutates_args=mutates, schema=schema.removeprefix(name))
    op.register_fake(fake)


def writes_only(*args: object) -> None:
    """Fake of an op that writes into the tensors it is given: nothing to do."""


register(
    "residual_norm_modulate(Tensor(a!) x, Tensor[] values, Tensor?[] row_scales, Tensor?[] gates, Tensor? shift, "
    "Tensor? scale, Tensor? embed, float eps, Tensor(b!)? out, Tensor(c!)? out_scale, Tensor(d!)? saved, "
    "Tensor(e!)? saved_scale, str backend) -> ()",
    ("x", "out", "out_scale", "saved", "saved_scale"),
    _residual_norm_modulate,
    writes_only,
)
register(
    "temporal_attention(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, float eps, "
    "float softmax_scale, Tensor(a!) out, str backend) -> ()",
    ("out",),
    _temporal_attention,
    writes_only,
)
register(
    "qk_norm_rope(Tensor(a!) qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, int pair_stride, "
    "float eps, bool queries, str backend) -> ()",
    ("qkv",),
    _qk_norm_rope,
    writes_only,
)
register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? kv_len, float softmax_scale, Tensor? q_weight, Tensor? k_weight, "
    "Tensor? scales, float eps, Tensor? cos, Tensor? sin, int pair_stride, str backend) -> Tensor",
    (),
    _attention,
    lambda q, *_: q.new_empty(q.shape[0], q.shape[1], q.shape[2] * q.shape[3]),
)
register("key_scales(Tensor k, float eps, str backend) -> Tensor", (), _key_scales, lambda k, *_: _empty_scales(k))
