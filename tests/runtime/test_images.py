"""Images: the blocks along time left out, as diffusers' Latte and Open-Sora-Plan 1.1 make them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pab_kernels import PABConfig, accelerate
from pab_kernels.plain import PlainPAB
from tests.pipeline_tools import CAPTION, close, tiny_transformer

TIMESTEPS = [700.0 - 50 * i for i in range(7)]
FAMILIES = ["latte", "open_sora_plan_v110"]


def steps(family: str, model: Any, frames: int, temporal: bool = False) -> list[Tensor]:
    """The predictions of a run of two rows."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 4, CAPTION, generator=generator)
    return [
        model(
            torch.randn(2, 4, frames, 8, 8, generator=generator),
            timestep=torch.full((2,), t),
            encoder_hidden_states=text if family == "latte" else text[:, None],
            enable_temporal_attentions=temporal,
            return_dict=False,
        )[0]
        for t in TIMESTEPS
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frames", [1, 3, 5])
@pytest.mark.parametrize("broadcast", [False, True], ids=["compute", "pab"])
def test_without_temporal_attention_it_is_the_host(family, frames, broadcast):
    model = tiny_transformer(family)
    config = PABConfig.preset(family) if broadcast else PABConfig()
    with PlainPAB(model, config) as plain:
        plain.begin(TIMESTEPS)
        expected = steps(family, model, frames)
    with accelerate(model, config) as handle:
        for _ in range(2):
            handle.begin(TIMESTEPS)
            got = steps(family, model, frames)
            assert all(close(a, b) for a, b in zip(got, expected, strict=True))
        report = handle.report()
        assert set(report.computed) == {"spatial", "cross"}
        assert (report.broadcast["spatial"] > 0) == broadcast
        if broadcast:
            assert report.slots == 2 * 2  # of two blocks spatial and cross


@pytest.mark.parametrize("family", FAMILIES)
def test_videos_and_images_take_turns(family):
    model = tiny_transformer(family)
    config = PABConfig.preset(family)
    with accelerate(model, config) as handle:
        handle.begin(TIMESTEPS)
        video = steps(family, model, 5, temporal=True)
        handle.begin(TIMESTEPS)
        image = steps(family, model, 5)
        handle.begin(TIMESTEPS)
        again = steps(family, model, 5, temporal=True)
        assert set(handle.report().computed) == {"spatial", "temporal", "cross"}
    assert all(torch.equal(a, b) for a, b in zip(video, again, strict=True))
    assert not close(video[0], image[0], 1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_cannot_drop_temporal_attention_in_its_middle(family):
    """Its slots are those of other blocks: nothing of them may be read."""
    model = tiny_transformer(family)
    with accelerate(model, PABConfig(spatial_broadcast=True, spatial_range=7, spatial_threshold=(0, 1000))) as handle:
        handle.begin(TIMESTEPS)
        latents, text = torch.randn(1, 4, 5, 8, 8), torch.randn(1, 4, CAPTION)
        text = text if family == "latte" else text[:, None]

        def call(t: float, temporal: bool) -> Any:
            return model(
                latents,
                timestep=torch.tensor([t]),
                encoder_hidden_states=text,
                enable_temporal_attentions=temporal,
                return_dict=False,
            )

        call(TIMESTEPS[0], True)
        with pytest.raises(ValueError, match="read before this run has written it"):
            call(TIMESTEPS[1], False)
