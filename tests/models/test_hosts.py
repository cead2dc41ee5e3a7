"""The hosts against recorded runs of the original, and the properties that a recording does not show."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from pab_kernels import PABConfig, accelerate
from pab_kernels.models.checkpoints import CLASSES
from pab_kernels.models.hosts import OpenSoraPlanV110, OpenSoraPlanV120, STDiT3
from pab_kernels.models.hosts.layers import rotate

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
FAMILIES = ("open_sora", "latte", "open_sora_plan_v110", "open_sora_plan_v120")
TEXT_FAMILIES = ("open_sora", "open_sora_plan_v110", "open_sora_plan_v120")  # those with a text mask

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # latent, timestep, text


def predict(model: Any, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, mask: Any = None, **kwargs: Any) -> Any:
    """Call a host of any family in the same way."""
    if isinstance(model, STDiT3):
        size = {"fps": torch.tensor([24.0]), "height": torch.tensor([96.0]), "width": torch.tensor([112.0])}
        return model(x, t, y, mask, **{**size, **kwargs})
    if isinstance(model, (OpenSoraPlanV110, OpenSoraPlanV120)):
        return model(x, t, y, mask).sample
    return model(x, t, y).sample


def small(family: str, **overrides: Any) -> Any:
    """A tiny host in float64 with weights large enough that every branch shows in the output."""
    heads: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24}
    config: dict[str, Any] = {
        "open_sora": {"depth": 2, "hidden_size": 24, "num_heads": 2},
        "open_sora_plan_v110": {**heads, "num_layers": 2, "sample_size": (8, 8), "video_length": 5},
        "open_sora_plan_v120": {**heads, "num_layers": 2, "sample_size": (8, 8), "sample_size_t": 5},
    }[family]
    torch.manual_seed(0)
    model: Any = CLASSES[family](caption_channels=16, **{**config, **overrides})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval().requires_grad_(False)


def inputs(batch: int = 2, frames: int = 5, size: tuple[int, int] = (8, 8)) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, frames, *size, generator=generator, dtype=torch.float64)
    y = torch.randn(batch, 1, 7, 16, generator=generator, dtype=torch.float64)
    return x, torch.full((batch,), 700.5, dtype=torch.float64), y


@pytest.mark.parametrize("family", FAMILIES)
def test_replays_the_original_run(family: str) -> None:
    with safe_open(GOLDENS / f"{family}.safetensors", "pt") as file:
        meta = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
    model: Any = CLASSES[family](**json.loads(meta["model_config"])).eval().requires_grad_(False)
    model.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("state.")})
    given = {key[3:]: value for key, value in tensors.items() if key.startswith("in.")}
    mask = given.get("mask", given.get("encoder_attention_mask"))
    size = {key: given[key] for key in ("fps", "height", "width") if key in given}

    z = given["x"]
    for step, t in enumerate(given["timesteps"]):
        v = predict(model, torch.cat([z, z]), t.expand(2), given["y"], mask, **size)
        cond, uncond = v[:, : z.shape[1]].chunk(2)
        z = z + float(meta["dt"]) * (uncond + float(meta["cfg_scale"]) * (cond - uncond))
        expected = tensors["out.base"][step]
        error = (z - expected).abs().max() / expected.abs().max()
        assert error <= 1e-4, f"step {step}: relative error {error:.1e}"


@pytest.mark.parametrize(("height", "width"), [(15, 27), (16, 27), (15, 26), (1, 3)])
def test_open_sora_pads_odd_sizes_with_zeros_and_crops(height: int, width: int) -> None:
    model = small("open_sora")
    x, t, y = inputs(size=(height, width))
    padded = torch.nn.functional.pad(x, (0, width % 2, 0, height % 2))
    out = predict(model, x, t, y)
    assert out.shape == (2, 8, 5, height, width)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, predict(model, padded, t, y)[..., :height, :width], rtol=0, atol=1e-12)


def test_open_sora_returns_float32_from_bfloat16() -> None:
    model = small("open_sora").bfloat16()
    out = predict(model, *inputs())
    assert out.dtype == torch.float32
    assert out.isfinite().all()


def test_x_mask_of_ones_changes_nothing() -> None:
    model = small("open_sora")
    ones = torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(predict(model, *inputs(), x_mask=ones), predict(model, *inputs()), rtol=0, atol=1e-12)


def test_x_mask_modulates_masked_frames_as_at_timestep_zero() -> None:
    model = small("open_sora")
    x, t, y = inputs()
    seen: dict[str, list[Any]] = {}
    blocks = {"spatial": model.spatial_blocks[0], "final": model.final_layer}
    for name, block in blocks.items():
        seen[name] = []
        block.register_forward_hook(lambda _, args, out, log=seen[name]: log.append((args, out)))
    x_mask = torch.tensor([[True, False, True, True, False], [False, True, True, True, True]])
    predict(model, x, t, y)
    predict(model, x, torch.zeros_like(t), y)
    predict(model, x, t, y, x_mask=x_mask)
    # The frames of the first spatial block do not mix yet, so each must be as in the run at its own timestep.
    at_t, at_zero, mixed = (out for _, out in seen["spatial"])
    torch.testing.assert_close(mixed[x_mask], at_t[x_mask], rtol=0, atol=1e-12)
    torch.testing.assert_close(mixed[~x_mask], at_zero[~x_mask], rtol=0, atol=1e-12)
    assert not torch.allclose(mixed[~x_mask], at_t[~x_mask])
    # In the final layer the official model normalises and modulates masked frames a second time.
    (hidden, t_emb, t0_emb, _), out = seen["final"][2]
    once = model.final_layer.modulated(hidden, t_emb)
    twice = model.final_layer.modulated(once, t0_emb)
    torch.testing.assert_close(out[x_mask], model.final_layer.linear(once)[x_mask], rtol=0, atol=1e-12)
    torch.testing.assert_close(out[~x_mask], model.final_layer.linear(twice)[~x_mask], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_text_masks_hide_tokens_row_by_row(family: str) -> None:
    model = small(family)
    x, t, y = inputs()
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0, 1]])
    out = predict(model, x, t, y, mask)

    other = torch.where(mask[:, None, :, None].bool(), y, torch.randn_like(y))
    torch.testing.assert_close(predict(model, x, t, other, mask), out, rtol=0, atol=1e-10)
    assert not torch.allclose(predict(model, x, t, other), predict(model, x, t, y))

    for row, real in enumerate(mask.bool()):  # alone, with only its real tokens, a row gives the same
        alone = predict(model, x[row : row + 1], t[:1], y[row : row + 1, :, real])
        torch.testing.assert_close(alone[0], out[row], rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_a_mask_of_ones_is_no_mask(family: str) -> None:
    model = small(family)
    expected = predict(model, *inputs())
    torch.testing.assert_close(predict(model, *inputs(), torch.ones(2, 7)), expected, rtol=0, atol=1e-12)


def test_open_sora_keeps_a_prompt_without_tokens_finite() -> None:
    mask = torch.tensor([[1] * 7, [0] * 7])
    assert predict(small("open_sora"), *inputs(), mask).isfinite().all()


def test_open_sora_repeats_one_mask_row_over_the_batch() -> None:
    model = small("open_sora")
    row = torch.tensor([[1, 1, 0, 1, 0, 0, 0]])
    one, both = (predict(model, *inputs(), mask) for mask in (row, row.repeat(2, 1)))
    torch.testing.assert_close(one, both, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_other_sizes_than_the_configured_one_work(family: str, size: tuple[int, int]) -> None:
    out = predict(small(family), *inputs(size=size))
    assert out.shape[2:] == (5, *size)
    assert out.isfinite().all()


@pytest.mark.parametrize("layout", [((-1, 2), -1), ((2, -1), -2), ((3, 2, -1), -2)])
def test_rotated_scores_depend_on_distance_alone(layout: tuple[tuple[int, ...], int]) -> None:
    split, pair = layout
    angles = torch.randn(tuple(abs(n) * 2 if n == -1 else n for n in split if n != 2), dtype=torch.float64)
    q, k = torch.randn(2, 2 * angles.numel(), dtype=torch.float64)

    def at(x: torch.Tensor, position: int) -> torch.Tensor:
        return rotate(x[None, None], position * angles[None], split, pair)[0, 0]

    torch.testing.assert_close(at(q, 7) @ at(k, 4), at(q, 3) @ k)
    torch.testing.assert_close(at(q, 0), q)


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_config_keys_raise(family: str) -> None:
    with pytest.raises(TypeError, match="flash"):
        CLASSES[family](flash=True)


@pytest.mark.parametrize(
    ("family", "overrides", "match"),
    [
        ("open_sora", {"hidden_size": 26, "num_heads": 4}, "hidden_size"),
        ("open_sora_plan_v110", {"use_rope": True}, "use_rope is True"),
        ("open_sora_plan_v110", {"video_length": 1}, "video_length is 1"),
        ("open_sora_plan_v120", {"use_rope": False}, "use_rope is False"),
        ("open_sora_plan_v120", {"attention_head_dim": 8, "cross_attention_dim": 16}, "attention_head_dim is 8"),
    ],
)
def test_unsupported_settings_raise(family: str, overrides: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        small(family, **overrides)


@pytest.mark.parametrize("accelerated", [False, True], ids=["host", "runtime"])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_misshapen_inputs_raise(family: str, accelerated: bool) -> None:
    model = small(family)
    x, t, y = inputs()
    latent = "x" if family == "open_sora" else "hidden_states"
    text, mask = ("y", "mask") if family == "open_sora" else ("encoder_hidden_states", "encoder_attention_mask")
    with accelerate(model, PABConfig()) if accelerated else nullcontext() as handle:
        if handle is not None:
            handle.begin([700.5])
        for arguments, name in (
            ((x[:, :3], t, y), latent),
            ((x[:, :, 0], t, y), latent),
            ((x, t[:1], y), "timestep"),
            ((x, t, y[:, 0]), text),
            ((x, t, y[:1]), text),
            ((x, t, y[..., :3]), text),
            ((x, t, y, torch.ones(2, 6)), mask),
            ((x, t, y, torch.ones(3, 7)), mask),
        ):
            with pytest.raises(ValueError, match=f"{name}: (shape is|has 3 rows)"):
                predict(model, *arguments)
        assert predict(model, x, t, y).isfinite().all(), "a refused call leaves the run as it was"


@pytest.mark.parametrize("family", ["open_sora_plan_v110", "open_sora_plan_v120"])
def test_plan_refuses_sizes_that_patches_do_not_fill(family: str) -> None:
    with pytest.raises(ValueError, match="multiples of the patch size 2"):
        predict(small(family), *inputs(size=(7, 8)))


def test_plan_v110_takes_its_own_number_of_frames_only() -> None:
    with pytest.raises(ValueError, match="hidden_states"):
        predict(small("open_sora_plan_v110"), *inputs(frames=4))
