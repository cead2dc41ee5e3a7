"""What `accelerate` refuses before it touches anything, and what norms it reads as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pab_kernels import PABConfig, accelerate
from pab_kernels.models.adapter import rms_norms_of
from tests.family_tools import FAMILIES, STEPS, host, relative_error


class Int8Weight(torch.Tensor):
    """Knows how to be detached, and nothing else."""

    @staticmethod
    def __new__(cls, values: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32, device=values.device)

    def __init__(self, values: Tensor) -> None:
        self.values_ = values

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].values_)
        raise NotImplementedError(f"Int8Weight has no {function}")


def storages(model: nn.Module) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_of_a_tensor_subclass_is_named_wherever_it_is(family: str) -> None:
    model = host(family).model
    before = storages(model)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            weight = module.weight
            module.weight = nn.Parameter(Int8Weight(weight.detach()), requires_grad=False)
            with pytest.raises(TypeError, match=rf"\.{path}\.weight: is a Int8Weight"):
                accelerate(model, PABConfig())
            module.weight = weight
    assert storages(model) == before


def test_an_exception_of_any_kind_leaves_the_host_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from pab_kernels.models import latte

    model = host("latte").model
    before = storages(model)
    made, count = latte.LatteAdapter._block, [0]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return made(*args, **kwargs)

    monkeypatch.setattr(latte.LatteAdapter, "_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        accelerate(model, PABConfig())
    assert len(storages(model)) == len(before)
    assert "forward" not in vars(model)
    monkeypatch.undo()
    accelerate(model, PABConfig()).close()


@pytest.mark.parametrize(("part", "dtype"), [("weight", torch.float64), ("bias", torch.bfloat16)])
def test_a_parameter_of_another_dtype_than_its_neighbours_is_refused_and_kept(part: str, dtype: torch.dtype) -> None:
    model = host("latte").model
    linear = model.transformer_blocks[1].attn1.to_k
    setattr(linear, part, nn.Parameter(getattr(linear, part).detach().to(dtype), requires_grad=False))
    with pytest.raises(TypeError, match=rf"transformer_blocks\.1\.attn1\.to_k\.{part}: is {dtype}"):
        accelerate(model, PABConfig())
    assert getattr(linear, part).dtype == dtype


def test_modules_that_another_open_handle_has_are_refused() -> None:
    one, two = host("latte"), host("latte", seed=2)
    two.model.transformer_blocks[1] = one.model.transformer_blocks[1]
    expected = two.run()
    with accelerate(one.model, PABConfig()) as handle:
        with pytest.raises(TypeError, match=r"transformer_blocks\.1\..*belongs to another accelerated model"):
            accelerate(two.model, PABConfig())
        handle.begin(STEPS)
        one.run()
    with accelerate(two.model, PABConfig()) as handle:
        handle.begin(STEPS)
        assert relative_error(two.run(), expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_in_training_is_refused_and_in_evaluation_it_is_nothing(family: str) -> None:
    made = host(family)
    path = "transformer_blocks.1.ff.net.1" if family != "open_sora" else "spatial_blocks.1.mlp.drop"
    if family == "open_sora":
        made.model.spatial_blocks[1].mlp.drop = nn.Dropout(0.5)
    else:
        made.model.get_submodule(path).p = 0.5
    with pytest.raises(TypeError, match=rf"\.{path}\.p: is 0\.5 in training mode"):
        accelerate(made.model.train(), PABConfig())
    expected = made.model.eval() and made.run()
    with accelerate(made.model, PABConfig()) as handle:
        handle.begin(STEPS)
        assert relative_error(made.run(), expected) < 1e-5
        made.model.train()
        with pytest.raises(ValueError, match=rf"\.{path}\.training: was changed"):
            handle.begin(STEPS)


# Norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_rms_norm_without_eps_has_the_eps_that_torch_computes_with(dtype: torch.dtype) -> None:
    norm = nn.RMSNorm(8, eps=None).to(dtype)
    (weight, _), eps = rms_norms_of(["q", "k"], [norm, nn.Identity()])
    assert weight is not None
    x = torch.full((1, 8), 2.0**-11, dtype=dtype)
    by_hand = x.double() / (x.double().square().mean() + eps).sqrt()
    torch.testing.assert_close(norm(x).double(), by_hand, rtol=float(torch.finfo(dtype).eps) * 2, atol=0)


@pytest.mark.parametrize("eps", [None, 1e-2, 1e-5])
def test_norms_of_queries_and_keys_are_those_of_the_host(eps: float | None) -> None:
    made = host("open_sora")
    for layer in (*made.model.spatial_blocks, *made.model.temporal_blocks):
        for name in ("q_norm", "k_norm"):
            getattr(layer.attn, name).eps = eps
    made.model.spatial_blocks[0].attn.qkv.weight.data.mul_(1e-3)  # so small that eps shows
    expected = made.run()
    with accelerate(made.model, PABConfig()) as handle:
        handle.begin(STEPS)
        assert relative_error(made.run(), expected) < 1e-5


def test_norms_that_the_executor_cannot_give_are_refused() -> None:
    model = host("open_sora").model
    model.temporal_blocks[1].attn.k_norm.eps = 1e-3
    with pytest.raises(TypeError, match=r"temporal_blocks\.1\.attn\.q_norm\.eps is 1e-06 and .*k_norm\.eps is 0\.001"):
        accelerate(model, PABConfig())
    model.temporal_blocks[1].attn.k_norm = nn.RMSNorm(12, elementwise_affine=False)
    with pytest.raises(TypeError, match=r"k_norm\.weight: is None"):
        accelerate(model, PABConfig())
    model = host("open_sora").model
    model.spatial_blocks[1].norm2.eps = 1e-3
    with pytest.raises(TypeError, match=r"spatial_blocks\.1\.norm2\.eps: is 0\.001, must be 1e-06"):
        accelerate(model, PABConfig())
    model = host("latte").model
    model.transformer_blocks[0].norm2 = nn.LayerNorm(24)
    with pytest.raises(TypeError, match=r"transformer_blocks\.0\.norm2\.(eps|weight): is"):
        accelerate(model, PABConfig())
