"""What outside software does that a good guess gets wrong (docs/compatibility.md), and that it does not reach us."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from torch import Tensor

from pab_kernels import PABConfig, accelerate, ops
from pab_kernels.ops import backends
from pab_kernels.ops.quantized import Quantized
from pab_kernels.ops.reference import quantize_ref
from pab_kernels.pipelines.sizes import open_sora_size
from pab_kernels.pipelines.vae import decode
from pab_kernels.plain import PlainPAB
from tests.latte_tools import call, inputs, tiny_latte
from tests.wan_tools import TEXT, tiny_ltx, tiny_wan

STEPS = 7
TIMESTEPS = [700.0 - 50 * i for i in range(STEPS)]
theirs = pytest.mark.skipif(diffusers.__version__ != "0.42.1", reason="seen in diffusers 0.42.1")


# diffusers' Pyramid Attention Broadcast beside ours: at which steps an attention is computed


@contextmanager
def watched(model: Any, *paths: str) -> Iterator[dict[str, Any]]:
    """What `now` was, in `seen["now"]`, whenever the attention at a path was computed."""
    seen: dict[str, Any] = {path: [] for path in paths}
    for path in paths:
        attention = model.get_submodule(path)
        compute = attention.processor

        class Watch(type(compute)):  # type: ignore[misc]
            def __call__(self, *args, path=path, compute=compute, **kwargs):
                seen[path].append(seen["now"])
                return compute(*args, **kwargs)

        attention.processor = Watch()
    yield seen


def hook(model: Any, **ranges: int) -> None:
    apply_pyramid_attention_broadcast(
        model,
        PyramidAttentionBroadcastConfig(
            current_timestep_callback=lambda: 500,
            **{f"{kind}_attention_block_skip_range": every for kind, every in ranges.items()},
        ),
    )


def config(**ranges: int) -> PABConfig:
    settings: dict[str, Any] = {}
    for kind, every in ranges.items():
        settings |= {f"{kind}_broadcast": True, f"{kind}_range": every, f"{kind}_threshold": (0, 1000)}
    return PABConfig(**settings)


def every(steps: int) -> list[int]:
    return list(range(0, STEPS, steps))


def run_wan(model: Any, seen: dict[str, Any]) -> None:
    """Two forwards a step, each in a context of its own, as WanPipeline calls it."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 1, 8, 8, generator=generator)
    texts = {name: torch.randn(1, 3, TEXT, generator=generator) for name in ("cond", "uncond")}
    with torch.no_grad():
        for step, t in enumerate(TIMESTEPS):
            for forward, text in texts.items():
                seen["now"] = (step, forward)
                with model.cache_context(forward):
                    model(latents + step, torch.tensor([t]), text, return_dict=False)


@theirs
def test_theirs_hands_one_forwards_attention_to_the_other():
    model = tiny_wan()
    with watched(model, "blocks.0.attn1") as seen:
        hook(model, spatial=2)
        run_wan(model, seen)
    assert seen["blocks.0.attn1"] == [(step, "cond") for step in range(STEPS)]


def test_ours_keeps_an_attention_for_each_forward_of_a_step():
    model = tiny_wan()
    with watched(model, "blocks.0.attn1") as seen, PlainPAB(model, config(spatial=2), 2) as plain:
        plain.begin(TIMESTEPS)
        run_wan(model, seen)
    assert seen["blocks.0.attn1"] == [(step, forward) for step in every(2) for forward in ("cond", "uncond")]


def run_ltx(model: Any, seen: dict[str, Any]) -> None:
    latents, text = torch.randn(1, 4, 8), torch.randn(1, 3, TEXT)
    sizes = {"num_frames": 1, "height": 2, "width": 2}
    with torch.no_grad():
        for step, t in enumerate(TIMESTEPS):
            seen["now"] = step
            model(latents, text, torch.tensor([t]), torch.ones(1, 3), **sizes, return_dict=False)


LTX = ("transformer_blocks.0.attn1", "transformer_blocks.0.attn2")


@theirs
def test_theirs_takes_the_cross_attention_of_ltx_for_spatial():
    model = tiny_ltx()
    with watched(model, *LTX) as seen:
        hook(model, spatial=2, cross=5)
        run_ltx(model, seen)
    assert [seen[path] for path in LTX] == [every(2), every(2)]


def test_ours_gives_the_cross_attention_of_ltx_its_own_range():
    model = tiny_ltx()
    with watched(model, *LTX) as seen, PlainPAB(model, config(spatial=2, cross=5)) as plain:
        plain.begin(TIMESTEPS)
        run_ltx(model, seen)
    assert [seen[path] for path in LTX] == [every(2), every(5)]


LATTE = ("transformer_blocks.0.attn1", "temporal_transformer_blocks.0.attn1", "transformer_blocks.0.attn2")


@theirs
def test_theirs_gives_the_temporal_attention_of_latte_the_spatial_range():
    model = tiny_latte()
    latents, text = inputs()
    with watched(model, *LATTE) as seen:
        hook(model, spatial=2, temporal=3, cross=5)
        for step, t in enumerate(TIMESTEPS):
            seen["now"] = step
            call(model, latents, text, t)
    assert [seen[path] for path in LATTE] == [every(2), every(2), every(5)]


def test_ours_gives_each_attention_of_latte_its_own_range():
    model = tiny_latte()
    latents, text = inputs()
    with accelerate(model, config(spatial=2, temporal=3, cross=5)) as pab:
        pab.begin(TIMESTEPS)
        for t in TIMESTEPS:
            call(model, latents, text, t)
        computed = pab.report().computed
    assert computed == {"spatial": len(every(2)), "temporal": len(every(3)), "cross": len(every(5))}


# torch: casts to e4m3

ROWS = [
    [0.0, 1.0, -2.0, 448.0, 3.3],
    [1e-3, -1e-3, 5e-4, 1e-6, 0.0],
    [500.0, -1e4, 65504.0, 3e38, -3e38],
    [0.0, 0.0, 0.0, 0.0, 0.0],
    [1.0, float("nan"), 2.0, 0.0, -1.0],
]
BYTES = ["0038c07e45", "7efe762e00", "0080007efe", "0000000000", "7f7f7f7f7f"]


def test_rows_of_e4m3_have_the_same_bytes_whether_casts_saturate_or_not():
    """Recorded with torch 2.13, whose casts saturate; 2.11's give NaN beyond 448. Nothing here is beyond."""
    assert e4m3_bytes("cpu") == BYTES


@pytest.mark.gpu
def test_rows_of_e4m3_have_the_same_bytes_on_a_gpu(device):
    assert e4m3_bytes(device) == BYTES


def e4m3_bytes(device: str) -> list[str]:
    rows = Quantized.empty((len(ROWS), 5), torch.float8_e4m3fn, device)
    quantize_ref(torch.tensor(ROWS, device=device), rows)
    return [bytes(row.view(torch.uint8).tolist()).hex() for row in rows.values]


# Attention on a row without keys


def check_rows_without_keys(backend: str, head_dim: int, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, n, 2, head_dim, device=device).to(dtype) for n in (40, 70, 70))
    kv_len = torch.tensor([0, 70, 3], dtype=torch.int32, device=device)
    result = ops.attention(q, k, v, kv_len=kv_len, backend=backend)
    assert (result[0] == 0).all()
    wanted = ops.attention(q, k, v, kv_len=kv_len, backend="reference")
    assert (wanted[0] == 0).all()
    torch.testing.assert_close(result.float(), wanted.float(), atol=2e-2, rtol=2e-2)


ATTENTION = [name for name, _ in backends.BACKENDS["attention"]]


@pytest.mark.parametrize("backend", [name for name in ATTENTION if name != "cuda"])
@pytest.mark.parametrize("head_dim", [8, 72])
def test_a_row_without_keys_gives_zeros(backend, head_dim):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    check_rows_without_keys(backend, head_dim, torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ATTENTION)
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_row_without_keys_gives_zeros_on_a_gpu(backend, head_dim, dtype, device):
    try:
        check_rows_without_keys(backend, head_dim, dtype, device)
    except ValueError as error:
        pytest.skip(str(error))  # a head_dim that this kernel was not built for


@pytest.mark.gpu
def test_cudnn_gives_a_row_without_keys_no_zeros(device):
    """Why a mask that hides all keys never reaches SDPA here."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 64, device=device).bfloat16() for _ in range(3))
    mask = torch.zeros(1, 1, 1, 64, dtype=torch.bool, device=device)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        result = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert result.isfinite().all()
    assert result.abs().max() > 0


# Packages and sizes


def test_wan_loads_with_a_package_that_diffusers_does_not_ask_for():
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '\n    "accelerate>=' in project


def test_a_decoded_video_of_open_sora_is_848_wide_where_854_was_asked():
    class Decoder(torch.nn.Module):
        """Eight pixels of a latent one, as the official one."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def decode(self, z: Tensor) -> Any:
            frames = z[:, :3].repeat_interleave(4, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
            return diffusers.models.autoencoders.vae.DecoderOutput(sample=frames)

    size = open_sora_size("480p", "9:16", 17)
    assert (size.height, size.width, size.latent) == (480, 854, (5, 60, 106))
    assert decode(Decoder(), torch.zeros(1, 4, *size.latent), size).shape == (1, 17, 480, 848, 3)
