"""The branches of a DiT block, each written straight into the tensor that keeps it, and `fused_pab_attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pab_kernels import ops
from pab_kernels.ops import fp8_linear as fp8_linear
from pab_kernels.ops.checks import check_like, check_quantized, check_shape, check_tensor
from pab_kernels.ops.quantized import Quantized


@dataclass(frozen=True)
class Linear:
    """Weight [out, in] and bias [out] of ``y = x @ weight.T + bias``."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Fp8Linear:
    """The same in fp8, for Quantized input: weight [out, in] e4m3 with a scale for each output channel, bias [out]."""

    weight: Quantized
    bias: Tensor
    weight_sum: float
    """The largest sum of magnitudes of a row of the weight; with `bias_max` it bounds what comes out."""
    bias_max: float

    @classmethod
    def of(cls, linear: Linear) -> Fp8Linear:
        """Quantise the weight. Waits for the GPU."""
        weight = fp8_linear.quantize_weight(linear.weight)
        sums = weight.values.float().abs().sum(1) * weight.row_scale
        return cls(weight, linear.bias, float(sums.max()), float(linear.bias.abs().max()))


Rows = Tensor | Quantized
"""What a linear reads: an `Fp8Linear` takes Quantized e4m3, a `Linear` a tensor."""


Rope = tuple[Tensor, Tensor]
"""Rotary tables (cos, sin), each [positions, D / 2] float32; positions are frames, or all tokens of a video."""


@dataclass(frozen=True)
class SelfAttention:
    """Weights of self-attention along one kind of sequence.

    `sequence` says which tokens see each other: those of a frame, those of a position, or all of them.
    `q_norm` and `k_norm` are RMSNorm weights [D]. With `rotary` queries and keys are rotated by the step's tables;
    `pair_stride` is that of `ops.qk_norm_rope`.
    """

    qkv: Linear | Fp8Linear  # [3C, C], rows ordered q, k, v, then heads
    proj: Linear  # [C, C]
    heads: int
    sequence: Literal["spatial", "temporal", "full"]
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    norm_eps: float = 1e-6
    rotary: bool = False
    pair_stride: int = 1


@dataclass(frozen=True)
class CrossAttention:
    """Weights of attention on the text."""

    q: Linear | Fp8Linear  # [C, C]
    kv: Linear  # [2C, C], rows ordered k, v, then heads
    proj: Linear  # [C, C]
    heads: int


@dataclass(frozen=True)
class TextKV:
    """Keys and values of the text for one block, side by side in `kv` [B, L, 2, H, D].

    `kv_len` (int32 [B], None: all) is how many of each row count.
    """

    kv: Tensor
    kv_len: Tensor | None = None


@dataclass(frozen=True)
class Mlp:
    """Weights of ``down(gelu_tanh(up(x)))``: both in fp8 or neither."""

    up: Linear | Fp8Linear  # [4C, C]
    down: Linear | Fp8Linear  # [C, 4C]

    def __post_init__(self) -> None:
        if isinstance(self.up, Fp8Linear) != isinstance(self.down, Fp8Linear):
            raise TypeError(f"up, down: are {type(self.up).__name__} and {type(self.down).__name__}, must be alike")


@dataclass
class Slot:
    """Where one branch of one block keeps its output between steps.

    `value` [B, T, S, C] is the ungated output, written by the out-projection itself, or, where it is Quantized, by the
    pass that adds it; `gate` [G, C] is the gate of the step that wrote it (None where the branch has no gate). `valid`
    tells whether the current run has written it.
    """

    value: Rows
    gate: Tensor | None = None
    valid: bool = False

    def read(self) -> Rows:
        """`value`, or ValueError if the current run has not written it: never stale data."""
        if not self.valid:
            raise ValueError("slot: not written in this run, a broadcast must follow a compute step")
        return self.value


def linear(x: Rows, weights: Linear | Fp8Linear, out: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` for x [..., in]; into `out` [..., features] (contiguous) where given."""
    flat = None if out is None else out.view(-1, out.shape[-1])
    if isinstance(weights, Fp8Linear):
        if not isinstance(x, Quantized):
            raise TypeError(f"x: got {type(x).__name__}, must be Quantized because the weight is")
        y = fp8_linear.scaled_linear(x.flatten(), weights.weight, weights.bias, flat)
        return y.view(*x.shape[:-1], -1) if out is None else out
    if isinstance(x, Quantized):
        raise TypeError("x: got Quantized, must be a tensor because the weight is")
    if out is None:
        return F.linear(x, weights.weight, weights.bias)
    torch.addmm(weights.bias, x.reshape(-1, x.shape[-1]), weights.weight.t(), out=flat)
    return out


def self_attention(h: Rows, weights: SelfAttention, out: Tensor, rope: Rope | None = None) -> Tensor:
    """QKV, attention and out-projection of h [B, T, S, C], into `out` [B, T, S, C]."""
    batch, frames, tokens, channels = h.shape
    qkv = linear(h, weights.qkv).view(batch, frames, tokens, 3, weights.heads, channels // weights.heads)
    if weights.rotary and rope is None:
        raise ValueError("rope: got None, must be (cos, sin) because the weights are rotary")
    rope = rope if weights.rotary else None
    q_norm, k_norm, eps = weights.q_norm, weights.k_norm, weights.norm_eps
    if weights.sequence == "temporal":
        y = ops.temporal_attention(qkv, q_weight=q_norm, k_weight=k_norm, rope=rope, eps=eps)
    else:
        qkv = qkv.flatten(0, 1) if weights.sequence == "spatial" else qkv.flatten(1, 2)
        stride = weights.pair_stride
        y = ops.self_attention(qkv, q_weight=q_norm, k_weight=k_norm, rope=rope, pair_stride=stride, eps=eps)
    return linear(y, weights.proj, out)


def text_kv(text: Tensor, weights: CrossAttention, kv_len: Tensor | None = None, out: Tensor | None = None) -> TextKV:
    """Keys and values of the projected text [B, L, C] for one block; `out` [B, L, 2C] holds them where given."""
    return TextKV(linear(text, weights.kv, out).unflatten(-1, (2, weights.heads, -1)), kv_len)


def cross_attention(x: Rows, weights: CrossAttention, text: TextKV, out: Tensor) -> Tensor:
    """Query GEMM, attention on the text and out-projection of x [B, T, S, C], into `out` [B, T, S, C]."""
    batch, channels = x.shape[0], x.shape[-1]
    q = linear(x, weights.q).view(batch, -1, weights.heads, channels // weights.heads)
    k, v = text.kv.unbind(2)
    y = ops.attention(q, k, v, kv_len=text.kv_len)
    return linear(y, weights.proj, out)


def mlp(h: Rows, weights: Mlp, out: Tensor) -> Tensor:
    """``down(gelu_tanh(up(h)))`` of h [..., C], into `out` [..., C]."""
    if isinstance(weights.up, Fp8Linear):
        if not isinstance(h, Quantized):
            raise TypeError(f"h: got {type(h).__name__}, must be Quantized because the weights are")
        up = weights.up
        hidden = fp8_linear.scaled_linear_gelu(
            h.flatten(), up.weight, up.bias, weight_sum=up.weight_sum, bias_max=up.bias_max
        )
        return linear(hidden, weights.down, out)
    if isinstance(h, Tensor) and h.device.type == "cuda":
        # cuBLASLt applies the bias and tanh-GELU in the GEMM's epilogue.
        rows = h.reshape(-1, h.shape[-1])
        wide = torch._addmm_activation(weights.up.bias, rows, weights.up.weight.t(), use_gelu=True)
    else:
        wide = F.gelu(linear(h, weights.up), approximate="tanh")
    return linear(wide, weights.down, out)


def fused_pab_attention(
    x: Tensor,
    weights: SelfAttention | CrossAttention,
    modulation: tuple[Tensor, Tensor, Tensor] | None,
    slot: Slot,
    *,
    kind: Literal["spatial", "temporal", "cross"],
    broadcast: bool,
    text: TextKV | None = None,
    rope: Rope | None = None,
    regate: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """One attention branch of a DiT block with Pyramid Attention Broadcast, added to the residual stream in place.

    On a compute call: norm and modulate, QKV (or query) GEMM, attention, projection straight into the slot, gate and
    residual. On a broadcast call: only the gated slot is added, in one kernel.

    Parameters
    ----------
    x : Tensor
        Residual stream [B, T, S, C], contiguous; written in place.
    weights : SelfAttention or CrossAttention
        The block's weights, dtype of x; `Fp8Linear` where they are quantised.
    modulation : (shift, scale, gate) or None
        Each [G, C], where G is B or B * T. None for no norm and no gate, as cross-attention of these models has.
    slot : Slot
        Keeps the branch's output: `value` [B, T, S, C], also Quantized, and `gate` [G, C] where there is modulation.
    kind : {"spatial", "temporal", "cross"}
    broadcast : bool
        False computes and writes the slot, True reads it.
    text : TextKV, optional
        Keys and values of the text, needed to compute cross-attention; see `text_kv`.
    rope : (cos, sin), optional
        Rotary tables, each [T, D / 2] float32 ([T * S, D / 2] for full attention), needed where weights are rotary.
    regate : bool
        Broadcast with the gate of this call instead of the one of the call that wrote the slot (Open-Sora-Plan 1.2).
    eps : float
        Of the LayerNorm.

    Returns
    -------
    Tensor
        x.

    Raises
    ------
    TypeError, ValueError
        A wrong argument, named; or a broadcast from a slot that has not been written.
    """
    check_shape("x", check_tensor("x", x), ("B", "T", "S", "C"))
    if not x.is_contiguous():
        raise ValueError(f"x: strides are {x.stride()}, must be contiguous")
    if isinstance(slot.value, Quantized):
        check_quantized("slot.value", slot.value, tuple(x.shape), x.device)
    else:
        check_shape("slot.value", slot.value, tuple(x.shape))
        check_like("slot.value", slot.value, x, "x")
    if kind not in ("spatial", "temporal", "cross"):
        raise ValueError(f"kind: got {kind!r}, must be spatial, temporal or cross")
    if (kind == "cross") != isinstance(weights, CrossAttention):
        raise TypeError(f"weights: got {type(weights).__name__}, does not fit kind {kind!r}")
    if isinstance(weights, SelfAttention) and (kind == "temporal") != (weights.sequence == "temporal"):
        raise ValueError(f"weights.sequence: got {weights.sequence!r}, does not fit kind {kind!r}")
    shift, scale, gate = modulation or (None, None, None)
    if gate is not None and slot.gate is None:
        raise ValueError("slot.gate: got None, must be a tensor [G, C] because modulation has a gate")
    if gate is not None and gate.shape[0] not in (x.shape[0], x.shape[0] * x.shape[1]):
        raise ValueError(f"modulation: has {gate.shape[0]} rows, must be B or B * T of x {list(x.shape)}")
    rows = x.view(1 if gate is None else gate.shape[0], -1, x.shape[-1])

    value: Rows
    saved: Quantized | None = None
    if broadcast:
        value = slot.read()
        applied = gate if regate else slot.gate
    else:
        saved = slot.value.view(*rows.shape) if isinstance(slot.value, Quantized) else None
        out = torch.empty_like(x) if isinstance(slot.value, Quantized) else slot.value
        h: Rows
        if isinstance(weights.q if isinstance(weights, CrossAttention) else weights.qkv, Fp8Linear):
            quantized = Quantized.empty(tuple(rows.shape), fp8_linear.E4M3, x.device)
            h = ops.residual_norm_modulate(rows, shift=shift, scale=scale, eps=eps, out=quantized).view(*x.shape)
        else:
            h = ops.residual_norm_modulate(rows, shift=shift, scale=scale, eps=eps).view(x.shape)
        if isinstance(weights, CrossAttention):
            if text is None:
                raise ValueError("text: got None, must be a TextKV to compute cross-attention")
            value = cross_attention(h, weights, text, out)
        else:
            value = self_attention(h, weights, out, rope)
        if gate is not None and slot.gate is not None:
            slot.gate.copy_(gate)
        slot.valid = True
        applied = gate
    ops.residual_norm_modulate(rows, [value.view(*rows.shape)], [applied], saved=saved)
    return x
