"""`fused_pab_attention`: one attention branch with its slot, for a runtime of one's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pab_kernels import ops
from pab_kernels.blocks.branches import CrossAttention, Rope, TextKV, cross_attention
from pab_kernels.blocks.linears import Fp8Linear, Rows
from pab_kernels.blocks.self_attention import SelfAttention, self_attention
from pab_kernels.ops import fp8_linear as fp8_linear
from pab_kernels.ops.checks import check_like, check_quantized, check_shape, check_tensor
from pab_kernels.ops.quantized import Quantized


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
