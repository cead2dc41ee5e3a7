"""fused_pab_attention: one branch on its own, computed and broadcast."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pab_kernels import CrossAttention, Linear, SelfAttention, Slot, fused_pab_attention, text_kv

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
B, T, S, H, D = 2, 3, 5, 2, 8
C = H * D


def linear(outputs: int) -> Linear:
    return Linear(torch.randn(outputs, C) * 0.3, torch.randn(outputs) * 0.1)


def self_weights(sequence) -> SelfAttention:
    return SelfAttention(linear(3 * C), linear(C), H, sequence)


def slot(groups: int | None) -> Slot:
    gate = None if groups is None else torch.full((groups, C), float("nan"))
    return Slot(torch.full((B, T, S, C), float("nan")), gate)


def modulation(groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(groups, C) * 0.5 for _ in range(3))  # type: ignore[return-value]


def expected_self(x, weights, shift, scale):
    per_row = [v.repeat_interleave(B * T // v.shape[0], 0).view(B, T, 1, C) for v in (shift, scale)]
    h = F.layer_norm(x, (C,), eps=1e-6) * (1 + per_row[1]) + per_row[0]
    q, k, v = F.linear(h, weights.qkv.weight, weights.qkv.bias).view(B, T, S, 3, H, D).unbind(3)
    if weights.sequence == "temporal":
        q, k, v = (t.permute(0, 2, 3, 1, 4) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).permute(0, 3, 1, 2, 4)
    elif weights.sequence == "spatial":
        q, k, v = (t.transpose(2, 3) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
    else:
        q, k, v = (t.reshape(B, T * S, H, D).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return F.linear(y.reshape(B, T, S, C), weights.proj.weight, weights.proj.bias)


@pytest.mark.parametrize("groups", [B, B * T])
@pytest.mark.parametrize("sequence", ["spatial", "temporal", "full"])
def test_self_attention(sequence: Any, groups: int):
    torch.manual_seed(0)
    kind: Any = "temporal" if sequence == "temporal" else "spatial"
    weights, (shift, scale, gate), cache = self_weights(sequence), modulation(groups), slot(groups)
    x = torch.randn(B, T, S, C)
    y = expected_self(x, weights, shift, scale)
    wide_gate = gate.repeat_interleave(B * T // groups, 0).view(B, T, 1, C)
    result = fused_pab_attention(x.clone(), weights, (shift, scale, gate), cache, kind=kind, broadcast=False)
    torch.testing.assert_close(result, x + wide_gate * y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache.value, y, atol=1e-5, rtol=1e-5)

    later = modulation(groups)
    x2 = torch.randn(B, T, S, C)
    kept = fused_pab_attention(x2.clone(), weights, later, cache, kind=kind, broadcast=True)
    torch.testing.assert_close(kept, x2 + wide_gate * y, atol=1e-5, rtol=1e-5)
    again = fused_pab_attention(x2.clone(), weights, later, cache, kind=kind, broadcast=True, regate=True)
    later_gate = later[2].repeat_interleave(B * T // groups, 0).view(B, T, 1, C)
    torch.testing.assert_close(again, x2 + later_gate * y, atol=1e-5, rtol=1e-5)


def test_cross_attention():
    torch.manual_seed(0)
    weights, cache = CrossAttention(linear(C), linear(2 * C), linear(C), H), slot(None)
    text, x = torch.randn(B, 4, C), torch.randn(B, T, S, C)
    kv_len = torch.tensor([4, 2], dtype=torch.int32)
    kv = text_kv(text, weights, kv_len)
    result = fused_pab_attention(x.clone(), weights, None, cache, kind="cross", broadcast=False, text=kv)
    assert isinstance(weights.q, Linear)
    q = F.linear(x, weights.q.weight, weights.q.bias).view(B, T * S, H, D).transpose(1, 2)
    k, v = F.linear(text, weights.kv.weight, weights.kv.bias).view(B, 4, 2, H, D).permute(2, 0, 3, 1, 4)
    mask = (torch.arange(4) < kv_len[:, None])[:, None, None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(B, T, S, C)
    y = F.linear(y, weights.proj.weight, weights.proj.bias)
    torch.testing.assert_close(result, x + y, atol=1e-5, rtol=1e-5)
    x2 = torch.randn(B, T, S, C)
    result = fused_pab_attention(x2.clone(), weights, None, cache, kind="cross", broadcast=True)
    torch.testing.assert_close(result, x2 + y, atol=1e-5, rtol=1e-5)


def test_a_slot_that_was_not_written_is_an_error():
    x = torch.randn(B, T, S, C)
    with pytest.raises(ValueError, match="not written"):
        fused_pab_attention(x, self_weights("spatial"), modulation(B), slot(B), kind="spatial", broadcast=True)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.randn(B, T, C)}, ValueError, "x: shape"),
        ({"x": torch.randn(B, T, C, S).transpose(2, 3)}, ValueError, "contiguous"),
        ({"kind": "mlp"}, ValueError, "kind: got 'mlp'"),
        ({"kind": "cross"}, TypeError, "weights"),
        ({"kind": "temporal"}, ValueError, "sequence"),
        ({"slot": slot(None)}, ValueError, "slot.gate"),
        ({"modulation": modulation(5)}, ValueError, "modulation"),
    ],
    ids=["rank", "strides", "kind", "cross", "temporal", "gate", "groups"],
)
def test_bad_arguments(change, error, match):
    arguments = {
        "x": torch.randn(B, T, S, C),
        "weights": self_weights("spatial"),
        "modulation": modulation(B),
        "slot": slot(B),
        "kind": "spatial",
        "broadcast": False,
    } | change
    with pytest.raises(error, match=match):
        fused_pab_attention(**arguments)


def test_the_example_of_the_page_runs():
    code = re.search(r"## fused_pab_attention.*?```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    assert names["slot"].valid
    assert names["x"].isfinite().all()
