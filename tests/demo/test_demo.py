"""The demo: scenes, the check on pixel statistics, and the training's parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pab_kernels.demo import train as training
from pab_kernels.demo.curriculum import Curriculum, direction_gap
from pab_kernels.demo.evaluate import contact_sheet, evaluate
from pab_kernels.demo.optimizer import FlatOptimizer, orthogonalize
from pab_kernels.demo.scenes import SceneBatch, render, sample_scenes
from pab_kernels.demo.score import check, measure
from pab_kernels.pipelines.demo import DemoPipeline, demo_scheduler
from pab_kernels.pipelines.demo_captions import (
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    SHAPES,
    TEXTURES,
    TONES,
    VOCABULARY,
    EvaluationPrompt,
    caption,
    evaluation_prompts,
)
from pab_kernels.pipelines.demo_text import TextEmbedding


def scenes(n: int, seed: int = 0) -> SceneBatch:
    return sample_scenes(n, torch.Generator().manual_seed(seed))


def frames_of(video: torch.Tensor) -> torch.Tensor:
    """[N, 3, T, H, W] in [-1, 1] to [N, T, H, W, 3] in [0, 1]."""
    return video.permute(0, 2, 3, 4, 1) / 2 + 0.5


@pytest.fixture(scope="module")
def rendered() -> tuple[SceneBatch, np.ndarray]:
    batch = scenes(400, seed=3)
    return batch, (frames_of(render(batch)) * 255).round().byte().numpy()


# Captions


def test_captions_survive_the_tokenizer() -> None:
    batch, text = scenes(300), TextEmbedding()
    assert [text.tokenize(c) for c in batch.captions] == batch.tokens.tolist()


def test_captions_match_the_grammar() -> None:
    batch = scenes(300)
    for i, text in enumerate(batch.captions):
        words = text.split()
        assert words[0] == ("an" if words[1] == "orange" else "a")
        assert batch.colour_names[i] in words
        assert SHAPES[batch.shape[i]] in words
        assert MOTIONS[batch.motion[i]] in text
        assert not set(words) & set(TONES) - {TONES[batch.tone[i]]}
        assert not set(words) & set(TEXTURES) - {TEXTURES[batch.texture[i]]}
    with_background = sum("background" in text for text in batch.captions)
    assert 200 < with_background < 280


def test_caption_writes_what_the_sampler_writes() -> None:
    assert caption("red", "circle", "moves left", texture="striped") == (
        "a red circle moves left over a striped background"
    )
    assert caption("orange", "star", "bounces") == "an orange star bounces"
    assert caption("orange", "star", "bounces", size="small", tone="dark", texture="plain") == (
        "a small orange star bounces over a dark plain background"
    )


def test_caption_names_a_bad_word() -> None:
    with pytest.raises(ValueError, match=r"colour must be one of red, .*'mauve'"):
        caption("mauve", "circle", "moves left")


def test_vocabulary_has_no_word_twice() -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY)


# Rendering


def test_render_range_shape_and_determinism() -> None:
    video = render(scenes(7, seed=5), frames=5, size=24)
    assert video.shape == (7, 3, 5, 24, 24)
    assert video.dtype == torch.float32
    assert video.min() >= -1
    assert video.max() <= 1
    assert torch.equal(video, render(scenes(7, seed=5), frames=5, size=24))
    assert not torch.equal(video, render(scenes(7, seed=6), frames=5, size=24))


def test_a_scene_is_the_same_at_any_size() -> None:
    batch = scenes(20)
    small = torch.nn.functional.avg_pool2d(render(batch, 4, 96).flatten(0, 2), 2)
    assert (small - render(batch, 4, 48).flatten(0, 2)).abs().mean() < 0.02


def test_shapes_stay_in_the_frame(rendered: tuple[SceneBatch, np.ndarray]) -> None:
    batch, videos = rendered
    white = np.array([name == "white" for name in batch.colour_names])
    chroma = videos.max(-1).astype(int) - videos.min(-1)
    vivid = chroma[~white] > 100
    edge = vivid[:, :, 0].sum() + vivid[:, :, -1].sum() + vivid[:, :, :, 0].sum() + vivid[:, :, :, -1].sum()
    assert edge / vivid.sum() < 1e-3


@pytest.mark.parametrize(("name", "value"), [("frames", 1), ("size", 4)])
def test_render_names_a_bad_argument(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least .*{value}"):
        render(scenes(1), **{name: value})


def test_evaluation_prompts_are_fixed_and_balanced() -> None:
    prompts = evaluation_prompts()
    assert prompts == evaluation_prompts(50, seed=0)
    assert prompts != evaluation_prompts(50, seed=1)
    text = TextEmbedding()
    for item in prompts:
        text.tokenize(item.prompt)
        assert item.colour in item.prompt.split()
        assert f"moves {item.direction}" in item.prompt
    assert {p.colour for p in prompts} == set(COLOURS)
    assert {p.direction for p in prompts} == set(DIRECTIONS)


# The check


def test_check_is_right_on_rendered_scenes(rendered: tuple[SceneBatch, np.ndarray]) -> None:
    batch, videos = rendered
    still = {"bounces": "bounces", "rotates in place": "still"}
    expected = [d or still[MOTIONS[m]] for d, m in zip(batch.directions, batch.motion.tolist(), strict=True)]
    verdicts = [check(v, c, d) for v, c, d in zip(videos, batch.colour_names, expected, strict=True)]
    assert sum(v.both for v in verdicts) >= 0.98 * len(verdicts)
    combinations = set(zip(batch.tone.tolist(), batch.texture.tolist(), strict=True))
    assert len(combinations) == len(TONES) * len(TEXTURES)


def test_check_refuses_a_wrong_expectation(rendered: tuple[SceneBatch, np.ndarray]) -> None:
    batch, videos = rendered
    for video, colour, direction in zip(videos[:60], batch.colour_names, batch.directions, strict=False):
        assert not any(check(video, other, "left").colour for other in set(COLOURS) - {colour})
        assert not any(check(video, colour, other).direction for other in set(DIRECTIONS) - {direction})


def test_check_sees_the_reversed_and_the_frozen_video() -> None:
    batch = scenes(40, seed=8)
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for video, colour, direction in zip(frames_of(render(batch)), batch.colour_names, batch.directions, strict=True):
        if direction:
            assert check(video.flip(0), colour, opposite[direction]).both
            assert measure(video[:1].expand(16, -1, -1, -1)).motion == "still"


def test_check_finds_nothing_in_noise_or_an_empty_frame() -> None:
    noise = np.random.default_rng(0).random((16, 48, 48, 3))
    assert measure(noise).colour is None
    assert measure(np.full((16, 48, 48, 3), 90, np.uint8)).colour is None


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((4, 3, 8, 8), np.uint8), "shape"),
        (np.zeros((4, 8, 8, 3), np.int64), "int64"),
        (np.full((4, 8, 8, 3), -1.0), "values in"),
    ],
    ids=["shape", "dtype", "range"],
)
def test_check_names_a_bad_video(video: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(video, "red", "left")


def test_check_names_a_bad_expectation() -> None:
    video = np.zeros((4, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=r"colour must be one of .*'mauve'"):
        check(video, "mauve", "left")
    with pytest.raises(ValueError, match=r"direction must be one of .*'north'"):
        check(video, "red", "north")


# Training


def test_orthogonalize_brings_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, 24, 12, generator=torch.manual_seed(0))))
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    layer = torch.nn.Linear(4, 4)
    optimizer = FlatOptimizer(layer, torch.float32, 1e-2, 1e-2)
    before = layer.weight.clone()
    layer(torch.full((1, 4), float("nan"))).sum().backward()
    optimizer.step(1.0)
    assert torch.equal(layer.weight, before)
    assert optimizer.skipped == 1
    optimizer.zero_grad()
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step(1.0)
    assert not torch.equal(layer.weight, before)


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    assert training.learning_rate_scale(0, 0.0, 100) == pytest.approx(0.01)
    assert training.learning_rate_scale(200, 0.0, 100) == 1.0
    assert training.learning_rate_scale(200, 0.5, 100) == pytest.approx(0.5)
    assert training.learning_rate_scale(200, 1.0, 100) == pytest.approx(0.0)
    assert training.learning_rate_scale(200, 1.2, 100) == pytest.approx(0.0)


def test_curriculum_waits_for_the_direction_but_not_for_ever() -> None:
    curriculum = Curriculum(threshold=0.1, patience=0.4, ramp=0.2)
    assert not curriculum.update(0.1, gap=0.05)
    assert curriculum.easy(0.3) == 1.0
    assert curriculum.update(0.3, gap=0.15)
    assert not curriculum.update(0.35, gap=0.2)
    assert curriculum.easy(0.4) == pytest.approx(0.5)
    assert curriculum.easy(0.9) == 0.0
    late = Curriculum(threshold=0.1, patience=0.4)
    assert late.update(0.41, gap=0.0)


def test_direction_gap_sees_whether_the_direction_is_used() -> None:
    alphas = demo_scheduler().alphas_cumprod
    batch = sample_scenes(64, torch.Generator().manual_seed(12345), easy=1.0)
    clean, tokens = render(batch, 4, 16), batch.tokens

    def follows(pixels: torch.Tensor, timesteps: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        right = (words == tokens).all(dim=1).view(-1, 1, 1, 1, 1)
        return -clean * right

    def ignores(pixels: torch.Tensor, timesteps: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return -0.5 * clean

    assert direction_gap(follows, alphas, 4, 16, torch.float32) > 1
    assert direction_gap(ignores, alphas, 4, 16, torch.float32) == 0


def test_easy_scenes_are_directed_on_plain_dark_ground() -> None:
    batch = sample_scenes(100, torch.Generator().manual_seed(0), easy=1.0)
    assert None not in batch.directions
    assert not batch.tone.any()
    assert not batch.texture.any()
    with pytest.raises(ValueError, match=r"easy must be in \[0, 1\], got 2"):
        sample_scenes(1, torch.Generator(), easy=2)


def test_training_lowers_the_loss_and_writes_its_files(tmp_path: Any) -> None:
    words = (
        f"--output {tmp_path} --minutes 2 --max-steps 60 --pairs 1 --heads 1 --size 16 --frames 4 --batch 8 "
        "--warmup 10 --log-every 15 --evaluate 1 --steps 2 --device cpu --no-compile --no-curriculum"
    )
    result = training.train(training.parser().parse_args(words.split()))
    losses = [entry["loss"] for entry in result["history"]]
    assert losses[-1] < 0.8 * losses[0]
    names = ["config.json", "contact_sheet.png", "evaluation.json", "model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert evaluate(DemoPipeline.from_pretrained(tmp_path), steps=1, count=1)["prompts"] == 1


def test_contact_sheet(tmp_path: Any) -> None:
    videos = np.zeros((2, 4, 16, 16, 3), np.uint8)
    contact_sheet(videos, [EvaluationPrompt("a red circle", "red", "left")] * 2, tmp_path / "sheet.png", zoom=2)
    assert (tmp_path / "sheet.png").stat().st_size > 0


def test_shipped_model_follows_its_prompt() -> None:
    """Six prompts at few steps; the whole check is `python -m pab_kernels.demo.evaluate`."""
    result = evaluate(DemoPipeline.from_pretrained(), steps=10, count=6, batch=1)
    assert result["guidance"]["2.0"]["both"] >= 5 / 6, result["failures"]
