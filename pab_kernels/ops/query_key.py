"""RMSNorm and rotary embedding of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from pab_kernels.ops import reference
from pab_kernels.ops.backends import resolve
from pab_kernels.ops.checks import check_float, check_last_contiguous, check_like, check_shape, check_tensor
from pab_kernels.ops.registration import register, writes_only


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
        [B, N, P, H, D], any strides but 1 for D: queries, then keys, then what is left alone. P is 3 for the QKV GEMM's
        output, or 1 for queries by themselves.
    q_weight, k_weight : Tensor, optional
        RMSNorm weights, dtype of qkv: [D] norms each head by itself, [H * D] a token's heads together (Wan,
        LTX-Video), which must then lie side by side. None for no norm.
    rope : (cos, sin), optional
        Rotary tables, each [N, D / 2] float32 and the same for every head, or [N, H * D / 2] (arXiv:2104.09864).
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
    check_qkv(qkv, q_weight, k_weight, rope, pair_stride)
    if qkv.numel() > 0 and not ((q_weight is None or not queries) and k_weight is None and rope is None):
        cos, sin = (None, None) if rope is None else rope
        name = resolve("qk_norm_rope", backend, qkv)
        # Heads that are normed or rotated together are one wide head.
        rows = qkv.flatten(3).unsqueeze(3) if across_heads(qkv, q_weight, k_weight, rope) else qkv
        torch.ops.pab.qk_norm_rope(rows, q_weight, k_weight, cos, sin, int(pair_stride), float(eps), queries, name)
    return qkv


def across_heads(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, rope: tuple[Tensor, Tensor] | None
) -> bool:
    """Whether a norm or a rotation goes across the heads of qkv [..., H, D]."""
    heads, head_dim = qkv.shape[-2:]
    wide = [weight is not None and weight.shape == (heads * head_dim,) for weight in (q_weight, k_weight)]
    return heads > 1 and (any(wide) or (rope is not None and rope[0].shape[-1] == heads * head_dim // 2))


def check_qkv(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    pair_stride: int,
) -> None:
    """Raise TypeError or ValueError for what `qk_norm_rope` does not take."""
    check_float("qkv", check_tensor("qkv", qkv))
    check_shape("qkv", qkv, ("B", "N", "P", "H", "D"))
    check_last_contiguous("qkv", qkv)
    head_dim = qkv.shape[-1]
    if k_weight is not None and qkv.shape[2] < 2:
        raise ValueError(
            f"k_weight: given, but qkv {list(qkv.shape)} has no keys: its third dimension must be 2 or more"
        )
    if across_heads(qkv, q_weight, k_weight, rope):
        if qkv.stride(3) != head_dim:
            raise ValueError(f"qkv: stride of heads is {qkv.stride(3)}, must be {head_dim} for a norm across heads")
        if pair_stride >= 1 and head_dim % (2 * pair_stride) == 0:  # else refused below
            qkv = qkv.flatten(3).unsqueeze(3)
    tables = qkv.shape[-1] // 2
    if rope is not None and rope[0].ndim == 2 and rope[0].shape[1] == head_dim // 2:
        tables = head_dim // 2
    check_norm_rope(qkv, q_weight, k_weight, rope, qkv.shape[1], pair_stride, tables)


def check_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    positions: int,
    pair_stride: int = 1,
    pairs: int | None = None,
) -> None:
    """Raise TypeError or ValueError for weights or tables that do not fit qkv [..., D] with so many positions.

    `pairs` is the width of the tables, D / 2 by default.
    """
    head_dim = qkv.shape[-1]
    pairs = head_dim // 2 if pairs is None else pairs
    if pair_stride < 1 or head_dim % (2 * pair_stride):
        raise ValueError(f"pair_stride: got {pair_stride}, twice of it must divide the head_dim {head_dim}")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_shape(name, check_tensor(name, weight), (head_dim,))
            check_like(name, weight, qkv, "qkv")
            check_last_contiguous(name, weight)
    for i, table in enumerate(rope or ()):
        name = f"rope[{i}]"
        check_shape(name, check_tensor(name, table), (positions, pairs))
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


register(
    "qk_norm_rope(Tensor(a!) qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, int pair_stride, "
    "float eps, bool queries, str backend) -> ()",
    ("qkv",),
    _qk_norm_rope,
    writes_only,
)
register("key_scales(Tensor k, float eps, str backend) -> Tensor", (), _key_scales, lambda k, *_: _empty_scales(k))
