"""Plain PyTorch versions of every op: eager, obvious, and the truth that the kernels are tested against.

All of them compute in at least float32 and round once, to the dtype of their output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels.ops.quantized import LIMITS, TINY, Quantized


def _wide(x: Tensor) -> Tensor:
    """Float64 stays float64, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def quantize_ref(x: Tensor, out: Quantized) -> Quantized:
    """Rows [..., C] to one byte an element: the largest magnitude of a row becomes the dtype's largest.

    A NaN anywhere makes its row's scale NaN, and so the whole row: int8 alone would hide it.
    """
    wide, limit = _wide(x), LIMITS[out.values.dtype]
    largest = wide.abs().amax(-1).clamp(min=TINY)
    scaled = wide * (limit / largest)[..., None]
    if out.values.dtype == torch.int8:
        scaled = scaled.nan_to_num(0.0).round()
    out.values.copy_(scaled)
    out.row_scale.copy_(largest / limit)
    return out


def dequantize_ref(x: Quantized) -> Tensor:
    """The rows that `x` stands for, float32."""
    return x.values.float() * x.row_scale[..., None]


def to_e4m3_ref(x: Tensor, scale: Tensor) -> Tensor:
    """Rows [..., C] over given scales [...] in e4m3; what is too large becomes the largest."""
    limit = LIMITS[torch.float8_e4m3fn]
    return (_wide(x) / scale[..., None]).clamp(-limit, limit).to(torch.float8_e4m3fn)


def gelu_quantize_ref(x: Tensor, factors: Tensor | None, out: Quantized) -> Quantized:
    """GELU (tanh form), then one byte an element. See `pab_kernels.ops.fp8_linear.gelu_quantize`."""
    y = F.gelu(_wide(x), approximate="tanh")
    return quantize_ref(y if factors is None else y * factors, out)


def scaled_linear_gelu_ref(
    x: Quantized,
    weight: Quantized,
    bias: Tensor,
    factors: Tensor | None,
    weight_sum: float,
    bias_max: float,
    out: Quantized,
) -> Quantized:
    """A linear in fp8, GELU, and fp8 again. See `pab_kernels.ops.fp8_linear.scaled_linear_gelu`."""
    y = F.gelu(F.linear(dequantize_ref(x), dequantize_ref(weight), bias.float()), approximate="tanh")
    out.row_scale.copy_(x.row_scale * weight_sum + bias_max / LIMITS[out.values.dtype])
    out.values.copy_((y if factors is None else y * factors) / out.row_scale[..., None])
    return out


def scaled_linear_ref(x: Quantized, weight: Quantized, bias: Tensor, out: Tensor) -> Tensor:
    """A linear whose input and weight have one byte an element. See `pab_kernels.ops.fp8_linear.scaled_linear`."""
    return out.copy_(F.linear(dequantize_ref(x), dequantize_ref(weight), bias.float()))


def residual_norm_modulate_ref(
    x: Tensor,
    branches: Sequence[Tensor | Quantized] = (),
    gates: Sequence[Tensor | None] = (),
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    embed: Tensor | None = None,
    norm: str | None = None,
    index: Tensor | None = None,
    eps: float = 1e-6,
    out: Tensor | Quantized | None = None,
    saved: Tensor | Quantized | None = None,
    change: Tensor | Quantized | None = None,
) -> Tensor | Quantized:
    """The pass between two GEMMs. See `pab_kernels.ops.residual_norm_modulate`; here `norm` must be said."""

    def of_rows(vectors: Tensor) -> Tensor:
        return _wide(vectors)[:, None, :] if index is None else _wide(vectors)[index]

    total = _wide(x)
    for i, (branch, gate) in enumerate(zip(branches, gates, strict=True)):
        value = dequantize_ref(branch) if isinstance(branch, Quantized) else _wide(branch)
        if i == 0 and saved is not None:
            if change is not None:
                _put(value - (dequantize_ref(saved) if isinstance(saved, Quantized) else _wide(saved)), change)
            _put(value, saved)
        total = total + (value if gate is None else of_rows(gate) * value)
    if embed is not None:
        total = total + _wide(embed).repeat_interleave(x.shape[1] // embed.shape[0], dim=0)
    if branches or embed is not None:
        x.copy_(total)
    if norm is None:
        return quantize_ref(total, out) if isinstance(out, Quantized) else x
    if norm == "layer":
        total = total - total.mean(-1, keepdim=True)
    y = rms_norm_ref(total, None, eps)
    if scale is not None:
        y = y * (1 + of_rows(scale))
    if shift is not None:
        y = y + of_rows(shift)
    if out is None:
        return y.to(x.dtype)
    return quantize_ref(y, out) if isinstance(out, Quantized) else out.copy_(y)


def _put(value: Tensor, target: Tensor | Quantized) -> None:
    if isinstance(target, Quantized):
        quantize_ref(value, target)
    else:
        target.copy_(value)


def rms_norm_ref(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last dimension: x / sqrt(mean(x^2) + eps) * weight, in float32 or wider."""
    x = _wide(x)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if weight is None else x * _wide(weight)


def rotate_pairs_ref(x: Tensor, cos: Tensor, sin: Tensor, pair_stride: int = 1) -> Tensor:
    """Rotary embedding on the pairs (i, i + pair_stride) of the last dimension D; cos, sin end in D / 2.

    With `pair_stride` s the channels lie in groups of 2s, and channel i < s of a group pairs with channel i + s.
    """
    groups = (-1, 2, pair_stride)
    first, second = x.unflatten(-1, groups).unbind(-2)
    cos, sin = (table.unflatten(-1, (-1, pair_stride)) for table in (cos, sin))
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2).flatten(-3)


def qk_norm_rope_ref(
    qkv: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    *,
    pair_stride: int = 1,
    eps: float = 1e-6,
    queries: bool = True,
) -> Tensor:
    """RMSNorm and rotary embedding of queries and keys, in place. See `pab_kernels.ops.qk_norm_rope`.

    Heads across which is normed are one here; tables narrower than half of a head repeat along it.
    """
    parts = list(zip(qkv.unbind(2)[:2], (q_weight, k_weight), strict=False))
    for part, weight in parts[0 if queries else 1 :]:
        wide = _wide(part)
        if weight is not None:
            wide = rms_norm_ref(wide, weight, eps)
        if rope is not None:
            repeats = qkv.shape[-1] // 2 // rope[0].shape[-1]
            cos, sin = (_wide(table).repeat(1, repeats)[:, None] for table in rope)
            wide = rotate_pairs_ref(wide, cos, sin, pair_stride)
        part.copy_(wide)
    return qkv


def key_scales_ref(k: Tensor, eps: float, out: Tensor) -> None:
    """1 / rms of keys. See `pab_kernels.ops.key_scales`."""
    scales = torch.rsqrt(_wide(k).square().mean(-1) + eps)
    out[..., : k.shape[1]] = scales.transpose(1, 2)


def temporal_attention_ref(
    qkv: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
    softmax_scale: float | None = None,
    out_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Self-attention along T. See `pab_kernels.ops.temporal_attention`."""
    batch, frames, tokens, _, heads, head_dim = qkv.shape
    q, k, v = _wide(qkv).permute(3, 0, 2, 4, 1, 5)  # each [B, S, H, T, D]
    if q_weight is not None:
        q = rms_norm_ref(q, q_weight, eps)
    if k_weight is not None:
        k = rms_norm_ref(k, k_weight, eps)
    if rope is not None:
        cos, sin = (_wide(table) for table in rope)
        q, k = rotate_pairs_ref(q, cos, sin), rotate_pairs_ref(k, cos, sin)
    weights = torch.softmax(q @ k.mT * (head_dim**-0.5 if softmax_scale is None else softmax_scale), dim=-1)
    y = (weights @ v).permute(0, 3, 1, 2, 4).reshape(batch, frames, tokens, heads * head_dim)
    if out_scale is not None:
        y = to_e4m3_ref(y, out_scale)
    elif out is None:
        y = y.to(qkv.dtype)
    return y if out is None else out.copy_(y)


def fp8_attention_ref(q: Tensor, k: Tensor, v: Tensor, every: int, softmax_scale: float) -> Tensor:
    """`fp8_attention` of q, k, v [B, N, H, D]; the mean of every so many-th token is taken out of keys and values.

    Rounds where the kernel does; all sums are wide.
    """
    e4m3 = torch.float8_e4m3fn

    def rounded(x: Tensor, tokens: int, size: Callable[[Tensor], Tensor], limit: float) -> Tensor:
        """[B, H, N, D] with a scale for so many tokens, by which the largest size of a row becomes `limit` at most."""
        padded = F.pad(x, (0, 0, 0, -x.shape[2] % tokens)).unflatten(2, (-1, tokens))
        scale = size(padded).amax(-1)[..., None, None].clamp(min=TINY) / limit
        return ((padded / scale).to(e4m3).to(x.dtype) * scale).flatten(2, 3)[:, :, : x.shape[2]]

    def norms(x: Tensor) -> Tensor:
        return x.norm(dim=-1)

    def magnitudes(x: Tensor) -> Tensor:
        return x.abs().amax(-1)

    def mean_magnitudes(x: Tensor, tokens: int) -> Tensor:
        """Of the columns of so many tokens, the least that an eighth of them says, [B, H, N, D]."""
        found = []
        for block in x.abs().split(tokens, 2):
            sums = torch.stack([block[:, :, i::8].sum(2, keepdim=True) for i in range(8)])
            found.append((8 * sums.amin(0) / block.shape[2]).expand_as(block))
        return torch.cat(found, 2)

    q, k, v = (_wide(x).transpose(1, 2) for x in (q, k, v))
    middle_k, middle_v = (x[:, :, ::every].mean(2, keepdim=True) for x in (k, v))
    scores = rounded(q, 1, norms, 240) @ rounded(k - middle_k, 128, norms, 240).mT * softmax_scale
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    values = rounded(v - middle_v, 1024, magnitudes, LIMITS[e4m3])
    sums = (8 * weights).to(e4m3).to(v.dtype) / 8 @ values
    # What rounding took on average is given back; a value far larger than the others has no part in that.
    taken, limit = v - middle_v - values, mean_magnitudes(v - middle_v, 1024) / 3
    added = middle_v + torch.clamp(taken, -limit, limit).mean(2, keepdim=True)
    return (sums / weights.sum(-1, keepdim=True) + added).transpose(1, 2).flatten(2)


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_len: Tensor | None = None,
    softmax_scale: float | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """Attention of any queries on any keys. See `pab_kernels.ops.attention`."""
    wide_q, wide_k, wide_v = (_wide(t).transpose(1, 2) for t in (q, k, v))  # [B, H, L, D]
    scores = wide_q @ wide_k.mT * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if kv_len is not None:
        beyond = torch.arange(k.shape[1], device=k.device) >= kv_len[:, None]
        scores = scores.masked_fill(beyond[:, None, None, :], float("-inf"))
    # A row without any key gives zeros, not NaN.
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0) if kv_len is not None else scores.softmax(-1)
    y = (weights @ wide_v).transpose(1, 2).reshape(q.shape[0], q.shape[1], -1)
    return y.to(q.dtype) if out_scale is None else to_e4m3_ref(y, out_scale)
