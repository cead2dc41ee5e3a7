"""The sizes that the families have, and those they refuse."""

import pytest

from pab_kernels.pipelines.sizes import ASPECTS, RESOLUTIONS, family_size, open_sora_size, plan_size


@pytest.mark.parametrize(
    ("resolution", "latent"),
    [("144p", (18, 32)), ("240p", (30, 53)), ("360p", (45, 80)), ("480p", (60, 106)), ("720p", (90, 160))],
)
def test_open_sora_latents_have_the_published_sizes(resolution, latent):
    assert open_sora_size(resolution).latent == (15, *latent)


@pytest.mark.parametrize(("duration", "frames"), [("2s", 15), ("4s", 30), ("8s", 60), ("16s", 120), (17, 5)])
def test_open_sora_durations(duration, frames):
    assert open_sora_size(duration=duration).latent[0] == frames


def test_aspects_are_height_to_width():
    for resolution in RESOLUTIONS:
        for aspect in ASPECTS:
            size = open_sora_size(resolution, aspect)
            high, wide = map(int, aspect.split(":"))
            assert size.height / size.width == pytest.approx(high / wide, rel=0.02)


@pytest.mark.parametrize(("frames", "latent"), [(65, 17), (221, 56), (29, 8), (93, 24)])
def test_plan_latent_frames(frames, latent):
    assert plan_size(frames, 480, 640).latent == (latent, 60, 80)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: open_sora_size("1080p"), "resolution: got '1080p', must be one of 144p"),
        (lambda: open_sora_size(aspect="21:9"), "aspect: got '21:9', must be one of 9:21"),
        (lambda: open_sora_size(duration="3s"), "duration: got '3s', must be one of 2s"),
        (lambda: open_sora_size(duration=50), "duration: got 50, .* a multiple of 17"),
        (lambda: plan_size(30, 480, 640), r"frames: got 30, must be 4 k \+ 1"),
        (lambda: plan_size(29, 481, 640), "height: got 481, must be a positive multiple of 16"),
        (lambda: family_size("open_sora", size="29x480p"), "size: got '29x480p' for open_sora.*--resolution"),
        (lambda: family_size("latte", resolution="480p"), "resolution: .* its size is fixed"),
        (lambda: family_size("open_sora_plan_v120", size="65x512x512"), "size: got '65x512x512', must be one of 93x"),
        (lambda: family_size("sora"), "family: got 'sora', must be one of latte"),
    ],
)
def test_sizes_that_no_model_has_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
