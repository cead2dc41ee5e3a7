"""Slots of one byte an element: what they hold, what they cost, and how little they change."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from pab_kernels import PABConfig, SelfAttention, Slot, accelerate, fused_pab_attention
from pab_kernels.blocks.linears import Linear
from pab_kernels.ops.quantized import Quantized
from pab_kernels.runtime import cache
from pab_kernels.runtime.slots import HostSlots, SlotKey, SlotLayout
from tests.latte_tools import tiny_latte
from tests.quantized_tools import DTYPES, check_rows, poisoned
from tests.runtime.test_slots import CONFIGS, run

NAMES = ["fp8", "int8"]
ALLOWED = {"fp8": 3e-2, "int8": 1e-2}


def small(name: str, dtype: str | None) -> PABConfig:
    return dataclasses.replace(CONFIGS[name], cache_dtype=dtype)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("name", ["all at once", "staggered", "cross", "mlp by timestep"])
def test_nearly_the_same_in_a_quarter_of_float32s_memory(name, dtype, monkeypatch):
    model = tiny_latte()
    with accelerate(model, small(name, None)) as handle:
        expected, wide = run(model, handle.begin), handle.caches[0].slots.nbytes
    with accelerate(model, small(name, None), cache_dtype=dtype) as handle:
        result, narrow = run(model, handle.begin), handle.caches[0].slots.nbytes
        assert torch.equal(run(model, handle.begin), result)
    assert 0 < error(result, expected) < ALLOWED[dtype]
    assert narrow == wide / 4 + wide / 16, "16 channels: 16 bytes and a scale of 4 instead of 64"
    monkeypatch.setattr(cache, "DeviceSlots", HostSlots)
    with accelerate(model, small(name, dtype)) as handle:
        assert torch.equal(run(model, handle.begin), result)


@pytest.mark.parametrize("dtype", NAMES)
def test_a_slot_holds_what_was_computed(dtype):
    """After a first call, which computes everything, all slots hold the outputs, rounded."""
    model, config = tiny_latte(), small("attention", None)
    kept: list[dict[SlotKey, Any]] = []
    for cache_dtype in (None, dtype):
        with accelerate(model, config, cache_dtype=cache_dtype) as handle:
            run(model, handle.begin, [900.0])
            slots = handle.caches[0]
            kept.append({key: slots.slots.read(key) for key in slots})
    assert len(kept[0]) == 6
    for key, wide in kept[0].items():
        narrow = kept[1][key]
        assert isinstance(narrow, Quantized)
        assert isinstance(wide, Tensor)
        check_rows(narrow, wide, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_attention_with_a_small_slot(dtype):
    torch.manual_seed(0)
    qkv, proj = (Linear(torch.randn(rows, 16) * 0.3, torch.randn(rows) * 0.1) for rows in (48, 16))
    weights = SelfAttention(qkv, proj, 2, "temporal")
    modulation: Any = tuple(torch.randn(2, 16) for _ in range(3))
    first, later = torch.randn(2, 2, 3, 5, 16)
    results: list[Any] = []
    for value in (torch.full((2, 3, 5, 16), float("nan")), poisoned((2, 3, 5, 16), dtype)):
        slot = Slot(value, torch.empty(2, 16))
        with pytest.raises(ValueError, match="slot: not written in this run"):
            fused_pab_attention(first.clone(), weights, modulation, slot, kind="temporal", broadcast=True)
        computed = fused_pab_attention(first.clone(), weights, modulation, slot, kind="temporal", broadcast=False)
        kept = fused_pab_attention(later.clone(), weights, modulation, slot, kind="temporal", broadcast=True)
        results.append((computed, kept, slot.value))
    (wide, wide_kept, value), (narrow, narrow_kept, rows) = results
    assert torch.equal(narrow, wide), "the computed step adds what was computed, not its rounded copy"
    check_rows(rows, value, atol=0)
    assert 0 < error(narrow_kept - later, wide_kept - later) < 0.05
    with pytest.raises(ValueError, match=r"slot\.value\.values: shape is \[2, 3, 5, 16\], must be \[2, 3, 4, 16\]"):
        fused_pab_attention(first[:, :, :4].clone(), weights, modulation, Slot(rows), kind="temporal", broadcast=True)


@pytest.mark.parametrize("shape", [(2, 3, 5, 16), (1, 1, 3, 5), (1, 2, 1, 7)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layout(shape, dtype):
    """Elements and scales fill disjoint parts of the memory, scales on a boundary of 16 bytes."""
    layout = SlotLayout(shape, dtype)
    memory = torch.zeros(layout.nbytes, dtype=torch.uint8)
    rows = layout.view(memory)
    assert isinstance(rows, Quantized)
    rows.values.view(torch.uint8).fill_(1)
    rows.row_scale.view(torch.uint8).fill_(2)
    assert (memory == 1).sum() == rows.values.numel()
    assert (memory == 2).sum() == 4 * rows.row_scale.numel()
    assert rows.row_scale.data_ptr() % 16 == memory.data_ptr() % 16


def test_errors():
    with pytest.raises(ValueError, match=r"cache_dtype: got 'fp4', must be null or one of fp8, int8"):
        accelerate(tiny_latte(), PABConfig(), cache_dtype="fp4")
