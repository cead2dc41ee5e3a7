"""The demo: scenes, the check on pixel statistics, the pipeline, and the training's parts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pab_kernels.demo import train as training
from pab_kernels.demo.captions import (
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
from pab_kernels.demo.curriculum import Curriculum, direction_gap
from pab_kernels.demo.evaluate import contact_sheet, evaluate
from pab_kernels.demo.optimizer import FlatOptimizer, orthogonalize
from pab_kernels.demo.scenes import SceneBatch, render, sample_scenes
from pab_kernels.demo.score import check, measure
from pab_kernels.demo.text import TextEmbedding
from pab_kernels.pipelines.demo import DemoPipeline, demo_scheduler, demo_transformer


def scenes(n: int, seed: int = 0) -> SceneBatch:
    return sample_scenes(n, torch.Generator().manual_seed(seed))


def frames_of(video: torch.Tensor) -> torch.Tensor:
    """[N, 3, T, H, W] in [-1, 1] to [N, T, H, W, 3] in [0, 1]."""
    return video.permute(0, 2, 3, 4, 1) / 2 + 0.5


@pytest.fixture(scope="module")
def rendered() -> tuple[SceneBatch, np.ndarray]:
    batch = scenes(400, seed=3)
    return batch, (frames_of(render(batch)) * 255).round().byte().numpy()


@pytest.fixture(scope="module")
def tiny() -> DemoPipeline:
    torch.manual_seed(0)
    transformer = demo_transformer(pairs=1, heads=1, size=16, frames=4).eval().requires_grad_(False)
    text = TextEmbedding().eval().requires_grad_(False)
    return DemoPipeline(transformer, demo_scheduler(), text)


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


# The pipeline


class Oracle:
    """Stands in for the transformer: the true v of a known clean video."""

    def __init__(self, clean: torch.Tensor, alphas_cumprod: torch.Tensor) -> None:
        self.clean, self.alphas_cumprod = clean, alphas_cumprod
        self.config = SimpleNamespace(
            caption_channels=64, in_channels=3, video_length=clean.shape[2], sample_size=clean.shape[3]
        )
        self.texts: list[int] = []

    def __call__(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, timestep: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor]:
        self.texts.append(id(encoder_hidden_states))
        alpha = self.alphas_cumprod[timestep].view(-1, 1, 1, 1, 1)
        clean = self.clean.repeat(hidden_states.shape[0] // self.clean.shape[0], 1, 1, 1, 1)
        noise = (hidden_states - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        return (alpha.sqrt() * noise - (1 - alpha).sqrt() * clean,)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampler_recovers_the_video_of_an_oracle(guidance: float) -> None:
    clean = render(scenes(2), frames=4, size=16)
    scheduler = demo_scheduler()
    oracle: Any = Oracle(clean, scheduler.alphas_cumprod)
    pipe = DemoPipeline(oracle, scheduler, TextEmbedding())
    frames = pipe(["a red circle", ""], num_inference_steps=8, guidance_scale=guidance)
    torch.testing.assert_close(frames, frames_of(clean), atol=1e-3, rtol=0)
    assert len(oracle.texts) == 8
    assert len(set(oracle.texts)) == 1  # the same tensor object at every step


def test_sampling_starts_where_there_is_no_signal() -> None:
    scheduler = demo_scheduler()
    scheduler.set_timesteps(30)
    assert scheduler.timesteps[0] == 999
    assert scheduler.alphas_cumprod[999] == 0


def test_pipeline_shape_range_and_determinism(tiny: DemoPipeline) -> None:
    prompt = "a red circle moves left"
    frames = tiny(prompt, num_inference_steps=2, seed=3)
    assert frames.shape == (1, 4, 16, 16, 3)
    assert frames.dtype == torch.float32
    assert frames.min() >= 0
    assert frames.max() <= 1
    assert torch.equal(frames, tiny(prompt, num_inference_steps=2, seed=3))
    assert not torch.equal(frames, tiny(prompt, num_inference_steps=2, seed=4))
    assert not torch.equal(frames, tiny("a blue star bounces", num_inference_steps=2, seed=3))


def test_a_batch_equals_its_single_runs(tiny: DemoPipeline) -> None:
    prompts = ["a red circle moves left", "a blue star bounces over a dark background"]
    both = tiny(prompts, num_inference_steps=3, seed=[5, 11])
    singles = [tiny(p, num_inference_steps=3, seed=s) for p, s in zip(prompts, (5, 11), strict=True)]
    torch.testing.assert_close(both, torch.cat(singles), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        tiny(prompts, num_inference_steps=1, seed=5), tiny(prompts, num_inference_steps=1, seed=[5, 6])
    )


def test_guidance_leads_away_from_the_negative_prompt(tiny: DemoPipeline) -> None:
    prompt = "a red circle moves left"
    same = tiny(prompt, negative_prompt=prompt, num_inference_steps=2, guidance_scale=9.0)
    torch.testing.assert_close(same, tiny(prompt, num_inference_steps=2, guidance_scale=1.0), atol=1e-4, rtol=0)


def test_callbacks_are_called_and_may_change_the_latents(tiny: DemoPipeline) -> None:
    steps: list[tuple[int, int]] = []
    done: list[tuple[int, int]] = []

    def callback(
        pipe: DemoPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        steps.append((step, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    frames = tiny(
        "",
        num_inference_steps=2,
        callback_on_step_end=callback,
        progress=lambda step, total: done.append((step, total)),
    )
    assert steps == [(0, 999), (1, 499)]
    assert done == [(1, 2), (2, 2)]
    assert torch.equal(frames, torch.full_like(frames, 0.5))


def test_case_and_punctuation_do_not_matter() -> None:
    text = TextEmbedding()
    assert text.tokenize("A red circle, moves left.") == text.tokenize("a red circle moves left")
    assert text.tokenize("") == [0] * text.length


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "a reed circle"}, "'reed'.* Did you mean 'red'.*Known words: a, an, over"),
        ({"prompt": "a <pad> circle"}, "does not know: '<pad>'"),
        ({"prompt": "a " * 17}, "at most 16 words, got 17"),
        ({"prompt": []}, "prompt must be .* non-empty"),
        ({"prompt": "", "num_inference_steps": 0}, r"num_inference_steps must be in \[1, 1000\], got 0"),
        ({"prompt": "", "seed": [1, 2]}, "seed must be .* each of 1 prompts, got 2"),
        ({"prompt": ["", ""], "negative_prompt": [""]}, "negative_prompt must be .* 2 prompts, got 1"),
    ],
    ids=["unknown word", "padding", "too long", "no prompt", "steps", "seeds", "negatives"],
)
def test_pipeline_names_a_bad_argument(tiny: DemoPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_save_and_load_round_trip(tiny: DemoPipeline, tmp_path: Any) -> None:
    tiny.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = DemoPipeline.from_pretrained(tmp_path)
    for mine, theirs in (
        (tiny.transformer.state_dict(), loaded.transformer.state_dict()),
        (tiny.text.state_dict(), loaded.text.state_dict()),
    ):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert torch.equal(value.bfloat16().float(), theirs[key]), key
    scheduler: Any = tiny.scheduler.config
    assert all(loaded.scheduler.config[key] == value for key, value in scheduler.items() if key[0] != "_")
    again = DemoPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    assert again("", num_inference_steps=1).dtype == torch.float32


def test_load_names_what_is_wrong(tiny: DemoPipeline, tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        DemoPipeline.from_pretrained(tmp_path)
    tiny.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"dtype must be one of torch\.float32"):
        DemoPipeline.from_pretrained(tmp_path, dtype=torch.int8)
    other = DemoPipeline(demo_transformer(2, 1, 16, 4), demo_scheduler(), TextEmbedding())
    config = (tmp_path / "config.json").read_text()
    other.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"unexpected \(34\): transformer\.temporal_transformer_blocks\.1"):
        DemoPipeline.from_pretrained(tmp_path)


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
