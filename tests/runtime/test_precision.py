"""Which linears run in fp8, and a whole model with them on the reference backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pab_kernels import Fp8Linear, Mlp, PABConfig, SelfAttention, Slot, accelerate, fused_pab_attention
from pab_kernels.blocks.block import BlockStack
from pab_kernels.blocks.branches import mlp
from pab_kernels.blocks.linears import Linear
from pab_kernels.models import adapter_for
from pab_kernels.runtime import precision
from pab_kernels.runtime.precision import Fp8Linears, Shape, Trial
from tests.latte_tools import call, inputs, tiny_latte
from tests.runtime.test_slots import CONFIGS, gpu_latte, gpu_run

TIMESTEPS = [900.0, 700.0, 600.0]
PAB: dict[str, Any] = {"spatial_broadcast": True, "spatial_threshold": (100, 800), "spatial_range": 2}


def has_fp8() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


@pytest.fixture
def model() -> Any:
    return tiny_latte().bfloat16()


@pytest.fixture
def _any_device(monkeypatch):
    """As if this device had fp8 tensor cores: the ops then run on their reference."""
    monkeypatch.setattr(precision, "no_fp8", lambda device: None)


def run(model: nn.Module, config: PABConfig, **options: Any) -> Tensor:
    latents, text = (tensor.bfloat16() for tensor in inputs())
    with accelerate(model, config, **options) as handle:
        handle.begin(TIMESTEPS)
        return torch.stack([call(model, latents, text, t) for t in TIMESTEPS])


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.usefixtures("_any_device")
def test_all_linears(model):
    """Near the same in bfloat16, but not the same, and the host stays what it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = run(model, PABConfig(**PAB))
    result = run(model, PABConfig(**PAB, linear_precision="fp8-all"))
    assert 3e-3 < error(result, expected) < 0.1
    assert torch.equal(run(model, PABConfig(**PAB), linear_precision="fp8-all"), result)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@torch.no_grad()
def test_changed_weights_are_quantised_anew(monkeypatch):
    """Whatever torch does not count: other values, or the same ones in another order."""
    monkeypatch.setattr(precision, "no_fp8", lambda device: None)
    model = tiny_latte().bfloat16()
    stack = adapter_for(model).stack
    linears = Fp8Linears(stack, measure=False)
    weights = [branch.weights for block in stack.blocks for branch in block.branches]
    for linear in (part for each in weights for part in precision.layer_linears(each).values()):
        assert isinstance(linear, Linear)
        for change in (lambda x: x.mul_(2), lambda x: x.copy_(x.flip(-1)), lambda x: x.copy_(x.flip(0))):
            linears.at(4)
            assert not linears.refresh()
            change(linear.weight.data)
            assert linears.refresh()


@pytest.mark.usefixtures("_any_device")
def test_excluded_layers_are_exactly_as_without(model):
    expected = run(model, PABConfig())
    everything = PABConfig(linear_precision="fp8-all", linear_exclude=("*",))
    assert torch.equal(run(model, everything), expected)
    stack = adapter_for(model).stack
    blocks = Fp8Linears(stack, ("spatial.0.*", "*.mlp"), measure=False).at(4).blocks
    for block in blocks:
        for branch in block.branches:
            excluded = block.name == "spatial.0" or branch.weights.layer == "mlp"
            assert type(branch.weights.linears[0]) is (Linear if excluded else Fp8Linear)


def layer_types(stack: BlockStack) -> dict[str, set[type]]:
    """For each layer the types of its linears, over all blocks."""
    types: dict[str, set[type]] = {}
    for block in stack.blocks:
        for branch in block.branches:
            layer = types.setdefault(branch.weights.layer, set())
            layer |= {type(getattr(branch.weights, name)) for name in branch.weights.fp8}
    return types


@pytest.mark.usefixtures("_any_device")
def test_a_shape_is_measured_once_and_decides(model, monkeypatch):
    measured = []

    def measure(branch, rows):
        measured.append((branch.weights.layer, rows))
        return Trial(1.0, 0.5 if branch.weights.layer == "mlp" and rows > 10 else 1.0)

    monkeypatch.setattr(precision, "measure", measure)
    linears = Fp8Linears(adapter_for(model).stack)
    large, small = linears.at(100), linears.at(10)
    assert measured == [(layer, rows) for rows in (100, 10) for layer in ("qkv", "cross.q", "mlp")]
    assert layer_types(large) == {"qkv": {Linear}, "cross.q": {Linear}, "mlp": {Fp8Linear}}
    assert layer_types(small) == {"qkv": {Linear}, "cross.q": {Linear}, "mlp": {Linear}}
    again = linears.at(100)
    assert len(measured) == 6
    assert again.blocks[0].branches[-1].weights is large.blocks[0].branches[-1].weights, "quantised a second time"
    assert set(linears.trials) == {Shape(*key) for key in [
        ("qkv", 100, 16, 48), ("cross.q", 100, 16, 16), ("mlp", 100, 16, 64),
        ("qkv", 10, 16, 48), ("cross.q", 10, 16, 16), ("mlp", 10, 16, 64),
    ]}  # fmt: skip


@pytest.mark.usefixtures("_any_device")
def test_sizes_that_do_not_fit_stay_where_fp8_must_pay(monkeypatch):
    model = tiny_latte(heads=3).bfloat16()  # 24 channels
    stack = adapter_for(model).stack
    monkeypatch.setattr(precision, "measure", lambda branch, rows: Trial(2.0, 1.0))
    assert layer_types(Fp8Linears(stack).at(4))["mlp"] == {Linear}
    assert layer_types(Fp8Linears(stack, measure=False).at(4))["mlp"] == {Fp8Linear}


def test_attention_in_fp8_is_that_of_spatial_blocks(monkeypatch):
    monkeypatch.setattr(precision, "no_hopper", lambda device: None)
    stack = precision.with_fp8_attention(adapter_for(tiny_latte()).stack)
    attention = [b.weights for block in stack.blocks for b in block.branches if isinstance(b.weights, SelfAttention)]
    assert {(weights.sequence, weights.precision) for weights in attention} == {("spatial", "fp8"), ("temporal", None)}


def test_errors(model, monkeypatch):
    config = PABConfig(linear_precision="fp8")
    with pytest.raises(ValueError, match=r"linear_precision: got fp8, must be None here: fp8 GEMMs need a CUDA GPU"):
        accelerate(model, config)
    assert "forward" not in model.__dict__
    monkeypatch.setattr(precision, "no_fp8", lambda device: None)
    with pytest.raises(ValueError, match=r"fp8 for weights of torch\.float32, must be None, or torch\.bfloat16"):
        accelerate(tiny_latte(), config)
    with pytest.raises(ValueError, match=r"linear_exclude: 'spatial\.9\.qkv' fits no layer; .* 'spatial\..*qkv'"):
        accelerate(model, PABConfig(linear_precision="fp8", linear_exclude=("spatial.9.qkv",)))
    with pytest.raises(ValueError, match=r"linear_precision: got 'fp4', must be null or one of fp8, fp8-all"):
        accelerate(model, PABConfig(), linear_precision="fp4")
    with pytest.raises(ValueError, match=r"attention_precision: got fp8, must be None here: .*cuda"):
        accelerate(model, PABConfig(), attention_precision="fp8")
    assert "forward" not in model.__dict__
    part = Linear(torch.randn(16, 16), torch.randn(16))
    with pytest.raises(TypeError, match=r"up, down: are Fp8Linear and Linear, must be alike"):
        Mlp(Fp8Linear.of(part), part)
    with pytest.raises(TypeError, match=r"h: got Tensor, must be Quantized because the weights are"):
        mlp(torch.randn(2, 16), Mlp(Fp8Linear.of(part), Fp8Linear.of(part)), torch.empty(2, 16))


def test_fused_attention_in_fp8():
    torch.manual_seed(0)
    qkv, proj = (Linear(torch.randn(rows, 16) * 0.3, torch.randn(rows) * 0.1) for rows in (48, 16))
    modulation: Any = tuple(torch.randn(2, 16) for _ in range(3))
    results = []
    for part in (qkv, Fp8Linear.of(qkv)):
        x = torch.ones(2, 3, 5, 16) * torch.arange(16)
        slot = Slot(torch.empty_like(x), torch.empty(2, 16))
        weights = SelfAttention(part, proj, 2, "spatial")
        results.append(fused_pab_attention(x, weights, modulation, slot, kind="spatial", broadcast=False))
    assert 1e-4 < error(results[1], results[0]) < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not has_fp8(), reason="no GPU with fp8 tensor cores")
@pytest.mark.parametrize("cache_dtype", [None, "fp8", "int8"])
def test_on_a_gpu(cache_dtype, device):
    """All linears in fp8 with each kind of slot: graphs repeat the eager steps bit for bit, near those in bfloat16."""
    model = gpu_latte()
    config = CONFIGS["attention"]
    with accelerate(model, config) as handle:
        expected = gpu_run(model, handle)
    options: dict[str, Any] = {"linear_precision": "fp8-all", "cache_dtype": cache_dtype}
    with accelerate(model, config, cuda_graphs=False, **options) as handle:
        result = gpu_run(model, handle)
        assert handle.report().fp8 == {"qkv": 6, "cross.q": 3, "mlp": 6}
    assert 1e-3 < error(result, expected) < 0.1
    with accelerate(model, config, **options) as handle:
        for _ in range(3):
            assert torch.equal(gpu_run(model, handle), result)
        assert handle.report().eager is None
        assert handle.report().graphs > 1
    with accelerate(model, config, cache_device="cpu", **options) as handle:
        assert torch.equal(gpu_run(model, handle), result)


@pytest.mark.gpu
@pytest.mark.skipif(not has_fp8(), reason="no GPU with fp8 tensor cores")
def test_on_a_gpu_shapes_are_measured(device):
    trials = precision.measure_shapes(adapter_for(gpu_latte()).stack, 4096, torch.device(device), torch.bfloat16)
    assert {shape.layer for shape in trials} == {"qkv", "cross.q", "mlp"}
    assert all(trial.plain_ms > 0 and trial.fp8_ms > 0 for trial in trials.values())
