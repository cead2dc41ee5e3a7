"""The demo's pipeline: its sampler, arguments and files."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pab_kernels.demo.scenes import SceneBatch, render, sample_scenes
from pab_kernels.pipelines.demo import DemoPipeline, demo_scheduler, demo_transformer
from pab_kernels.pipelines.demo_text import TextEmbedding


def scenes(n: int, seed: int = 0) -> SceneBatch:
    return sample_scenes(n, torch.Generator().manual_seed(seed))


def frames_of(video: torch.Tensor) -> torch.Tensor:
    """[N, 3, T, H, W] in [-1, 1] to [N, T, H, W, 3] in [0, 1]."""
    return video.permute(0, 2, 3, 4, 1) / 2 + 0.5


@pytest.fixture(scope="module")
def tiny() -> DemoPipeline:
    torch.manual_seed(0)
    transformer = demo_transformer(pairs=1, heads=1, size=16, frames=4).eval().requires_grad_(False)
    text = TextEmbedding().eval().requires_grad_(False)
    return DemoPipeline(transformer, demo_scheduler(), text)


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
