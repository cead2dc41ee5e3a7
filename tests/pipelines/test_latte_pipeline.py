"""accelerate on diffusers' own LattePipeline, with a tiny text encoder and autoencoder."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline

from pab_kernels import PABConfig, accelerate
from pab_kernels.pipelines.generate import Request, generate
from pab_kernels.pipelines.sizes import VideoSize
from pab_kernels.plain import PlainPAB
from tests.pipeline_tools import tiny_text, tiny_transformer

STEPS = 8
PAB = PABConfig.preset("latte")


@pytest.fixture(scope="module")
def pipe() -> Any:
    text = tiny_text()
    torch.manual_seed(0)
    vae: Any = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    vae.eval()
    pipe: Any = LattePipeline(text.tokenizer, text.encoder, vae, tiny_transformer("latte"), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, prompt: str = "a red cat runs", seed: int = 0, size: int = 16, **kwargs: Any) -> Any:
    return pipe(
        prompt,
        height=size,
        width=size,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(seed),
        clean_caption=False,
        **{"video_length": 5, "output_type": "latent", **kwargs},
    ).frames


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_with_and_without_pab_it_is_the_plain_form(pipe):
    without = run(pipe)
    with PlainPAB(pipe.transformer, PAB) as plain:
        plain.begin(ddim_timesteps())
        expected = run(pipe)
    with accelerate(pipe, PABConfig()):
        assert error(run(pipe), without) < 1e-5
    with accelerate(pipe, PAB) as handle:
        for _ in range(2):
            assert error(run(pipe), expected) < 1e-5
        report = handle.report()
        assert report.calls == STEPS
        assert report.broadcast["spatial"] > 0
    assert torch.equal(run(pipe), without)
    assert error(expected, without) > 1e-3


def ddim_timesteps() -> list[float]:
    scheduler: Any = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    return [float(t) for t in scheduler.timesteps]


def test_a_cancelled_run_and_other_shapes_leave_nothing_behind(pipe):
    def cancel(_pipe: Any, step: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            raise KeyboardInterrupt
        return tensors

    with accelerate(pipe, PAB):
        expected = run(pipe)
        with pytest.raises(KeyboardInterrupt):
            run(pipe, "a blue dog at night", seed=1, callback_on_step_end=cancel)
        assert torch.equal(run(pipe), expected)
        run(pipe, seed=2, size=24)
        run(pipe, seed=3, guidance_scale=1.0)
        assert torch.equal(run(pipe), expected)


def test_decoded_video(pipe):
    with accelerate(pipe, PAB):
        frames = np.asarray(run(pipe, output_type="np"))
    assert frames.shape[0] == 1
    assert np.isfinite(frames).all()


def test_images_leave_temporal_attention_out(pipe):
    image: dict[str, Any] = {"video_length": 1, "enable_temporal_attentions": False}
    with PlainPAB(pipe.transformer, PAB) as plain:
        plain.begin(ddim_timesteps())
        expected = run(pipe, **image)
    assert expected.shape[2] == 1
    with accelerate(pipe, PAB) as handle:
        for _ in range(2):
            assert error(run(pipe, **image), expected) < 1e-5
        assert set(handle.report().computed) == {"spatial", "cross"}
        video = run(pipe)
        assert error(run(pipe, **image), expected) < 1e-5
        assert torch.equal(run(pipe), video)


def test_a_request_for_one_frame_is_an_image(pipe, monkeypatch):
    seen: dict[str, Any] = {}
    monkeypatch.setattr(type(pipe), "__call__", lambda _self, _prompts, **given: seen.update(given) or _Frames())
    result = generate(pipe, Request(["a cat"], size=VideoSize(1, 16, 16, (1, 2, 2))), None)
    assert (seen["video_length"], seen["enable_temporal_attentions"], seen["negative_prompt"]) == (1, False, "")
    assert result.frames is not None
    generate(pipe, Request(["a cat"], size=VideoSize(5, 16, 16, (5, 2, 2))), None)


class _Frames:
    frames = np.zeros((1, 1, 16, 16, 3))
