"""Open-Sora's and Open-Sora-Plan's pipelines, on tiny transformers and a tiny T5."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from pab_kernels import PABConfig, accelerate
from pab_kernels.pipelines.arguments import Prompts
from pab_kernels.pipelines.open_sora import OpenSoraPipeline
from pab_kernels.pipelines.samplers import rflow_timesteps
from pab_kernels.pipelines.sizes import open_sora_size
from tests.pipeline_tools import CAPTION, FAMILIES, SMALLEST, close, run, tiny_pipeline, tiny_text, tiny_transformer

PROMPTS = ["a cat", "the red dog runs over the hill at night"]


# Batches


@pytest.mark.parametrize("family", FAMILIES)
def test_a_video_does_not_depend_on_its_neighbours(family):
    pipe = tiny_pipeline(family)
    both = run(pipe, PROMPTS, seed=[5, 9], negative_prompt=["", "red hill"])
    for i, (seed, negative) in enumerate([(5, ""), (9, "red hill")]):
        assert close(both[i : i + 1], run(pipe, PROMPTS[i], seed=seed, negative_prompt=negative))
    assert both.isfinite().all()
    assert both.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changed", [{"prompt": "a dog"}, {"seed": 1}, {"negative_prompt": "red"}, {"guidance_scale": 1.0}], ids=str
)
def test_every_input_matters(family, changed):
    pipe = tiny_pipeline(family)
    settings: dict[str, Any] = {"prompt": "a cat", "seed": 0}
    assert not close(run(pipe, **{**settings, **changed}), run(pipe, **settings), 1e-4)


def test_an_integer_seed_counts_up():
    pipe = tiny_pipeline("open_sora_plan_v120")
    assert torch.equal(run(pipe, PROMPTS, seed=3), run(pipe, PROMPTS, seed=[3, 4]))


def test_without_guidance_the_negative_prompt_is_not_read():
    pipe = tiny_pipeline("open_sora")
    plain = run(pipe, "a cat", guidance_scale=1.0)
    assert torch.equal(plain, run(pipe, "a cat", guidance_scale=1.0, negative_prompt="red"))


# Against the original's loops, written out


def test_open_sora_is_the_original_loop():
    pipe = tiny_pipeline("open_sora")
    host, size = pipe.transformer, open_sora_size(**SMALLEST)
    text, mask = pipe.text.encode(["a cat aesthetic score: 6.5."], 300)
    y = torch.stack([text, host.y_embedder.y_embedding[None]])  # the prompt first, then the learned null
    y = y.view(2, 1, 300, CAPTION)
    z = torch.randn(1, 4, *size.latent, generator=torch.Generator().manual_seed(2))
    times = [*rflow_timesteps(6, size.height, size.width, size.latent[0]), 0.0]
    numbers = {"fps": torch.tensor([24.0]), "height": torch.tensor([192.0]), "width": torch.tensor([192.0])}
    for t, after in pairwise(times):
        # The null embedding is read as far as the prompt's mask goes: one row of mask serves both.
        cond, uncond = host(torch.cat([z, z]), torch.tensor([t, t]), y, mask=mask, **numbers)[:, :4].chunk(2)
        z = z + (uncond + 3.0 * (cond - uncond)) * (t - after) / 1000
    assert close(run(pipe, "a cat", seed=2), z)


def test_plan_v110_uses_the_prompts_length_for_an_empty_negative_prompt():
    pipe = tiny_pipeline("open_sora_plan_v110")
    arguments = pipe._arguments(_prompts("a cat", ""), True)
    length = 3  # two words and the end
    assert arguments["encoder_attention_mask"].sum(1).tolist() == [length, length]
    arguments = pipe._arguments(_prompts("a cat", "the red dog runs"), True)
    assert arguments["encoder_attention_mask"].sum(1).tolist() == [5, 3]  # negative first


def test_plan_v120_uses_each_prompts_own_length():
    pipe = tiny_pipeline("open_sora_plan_v120")
    arguments = pipe._arguments(_prompts("a red cat", ""), True)
    assert arguments["encoder_attention_mask"].sum(1).tolist() == [1, 4]
    assert arguments["encoder_hidden_states"].shape == (2, 1, 512, CAPTION)


def _prompts(prompt: str, negative: str) -> Any:
    return Prompts.of(prompt, negative, 0)


def test_given_frames_come_out_unchanged_and_change_the_others():
    pipe = tiny_pipeline("open_sora")
    given = torch.randn(1, 4, 5, 24, 24)
    mask = torch.zeros(1, 5, dtype=torch.bool)
    mask[0, 0] = True
    video = run(pipe, "a cat", given_latents=given, given_mask=mask)
    assert torch.equal(video[:, :, 0], given[:, :, 0])
    assert not close(video[:, :, 1:], run(pipe, "a cat")[:, :, 1:], 1e-3)
    nothing = run(pipe, "a cat", given_latents=given, given_mask=torch.zeros(1, 5))
    assert close(nothing, run(pipe, "a cat"))


# PAB


@pytest.mark.parametrize(
    ("family", "calls"), [("open_sora", 6), ("open_sora_plan_v110", 15), ("open_sora_plan_v120", 6)]
)
def test_pab_is_planned_over_the_calls_that_happen(family, calls):
    pipe = tiny_pipeline(family)
    plain = run(pipe, PROMPTS)
    with accelerate(pipe, PABConfig()):
        assert close(run(pipe, PROMPTS), plain)
    with accelerate(pipe, PABConfig.preset(family)) as handle:
        first = run(pipe, PROMPTS)
        assert handle.schedule is not None
        assert len(handle.schedule) == calls
        assert list(handle.schedule.timesteps) == pipe.scheduler.timesteps.tolist()
        assert handle.report().calls == calls
        assert handle.report().broadcast["spatial"] > 0
        assert not close(first, plain, 1e-6)
        assert torch.equal(run(pipe, PROMPTS), first)  # a second run begins anew
        run(pipe, PROMPTS[0])  # another batch too
        if family == "open_sora":
            video = run(pipe, "a cat", given_latents=torch.randn(1, 4, 5, 24, 24), given_mask=torch.eye(5)[:1])
            assert video.isfinite().all()
    assert torch.equal(run(pipe, PROMPTS), plain)


def test_the_text_tensors_are_the_same_at_every_step():
    pipe = tiny_pipeline("open_sora")
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append((id(kwargs["y"]), id(kwargs["mask"]), len(kwargs["y"]))),
        with_kwargs=True,
    )
    run(pipe, "a cat")
    assert len(seen) == 6
    assert len(set(seen)) == 1
    assert seen[0][2] == 2


# Callbacks


def test_callbacks_see_every_call_and_may_change_the_latents():
    pipe = tiny_pipeline("open_sora_plan_v110")
    steps, progress = [], []

    def callback(_pipe: Any, step: int, _t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        steps.append(step)
        return {"latents": torch.zeros_like(tensors["latents"])}

    video = run(
        pipe,
        "a cat",
        callback_on_step_end=callback,
        progress=lambda done, total: progress.append((done, total)),
    )
    assert steps == list(range(15))
    assert progress[-1] == (15, 15)
    assert torch.equal(video, torch.zeros_like(video))
    with pytest.raises(ValueError, match="latents"):
        run(pipe, "a cat", callback_on_step_end=lambda *_: {"latents": torch.zeros(1, 4, 2, 2)})


# Bad input


@pytest.mark.parametrize("family", [*FAMILIES, "latte"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": []}, "prompt must be .* got an empty list"),
        ({"prompt": PROMPTS, "seed": [1]}, "seed must be a single value or one for each of 2 prompts, got 1"),
        ({"prompt": PROMPTS, "negative_prompt": ["a"] * 3}, "negative_prompt .* got 3"),
        ({"num_inference_steps": 1001}, r"num_inference_steps must be in \[1, 1000\], got 1001"),
        ({"prompt": "a " * 600}, "prompt: 'a a .*' has 60.* tokens, must have at most (120|300|512)"),
    ],
    ids=["no prompt", "seeds", "negatives", "steps", "long prompt"],
)
def test_bad_arguments_are_refused(family, settings, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_pipeline(family), **{"prompt": "a cat", **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": "100p"}, "resolution: got '100p'"),
        ({"aspect": "7:5"}, "aspect: got '7:5'"),
        ({"duration": 16}, "duration: got 16"),
        ({"given_latents": torch.zeros(1, 4, 5, 24, 24)}, "must be both or none"),
        (
            {"given_latents": torch.zeros(1, 4, 5, 24, 24), "given_mask": torch.zeros(1, 4)},
            r"given_mask: shape is \[1, 4\], must be \[1, 5\]",
        ),
        (
            {"given_latents": torch.zeros(1, 4, 4, 24, 24), "given_mask": torch.zeros(1, 5)},
            r"given_latents: shape is \[1, 4, 4, 24, 24\]",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_open_sora_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_pipeline("open_sora"), "a cat", **settings)


def test_plan_refuses_another_size():
    v110, v120 = tiny_pipeline("open_sora_plan_v110"), tiny_pipeline("open_sora_plan_v120")
    with pytest.raises(ValueError, match="frames: got 29, must be 17"):
        run(v110, "a cat", frames=29)
    with pytest.raises(ValueError, match="at least 4 for PNDM, got 3"):
        run(v110, "a cat", num_inference_steps=3)
    with pytest.raises(ValueError, match=r"frames: got 16, must be 4 k \+ 1"):
        run(v120, "a cat", frames=16)
    with pytest.raises(ValueError, match="width: got 60"):
        run(v120, "a cat", width=60)
    assert run(v120, "a cat", frames=9, height=48, width=80).shape == (1, 4, 3, 6, 10)


def test_a_mask_of_the_wrong_shape_is_refused():
    for family in FAMILIES:
        pipe = tiny_pipeline(family)
        key = "mask" if family == "open_sora" else "encoder_attention_mask"
        original = pipe._arguments
        pipe._arguments = lambda *args, original=original, key=key: {
            **(given := original(*args)),
            key: given[key][:, :-1],
        }
        with pytest.raises(ValueError, match=f"{key}: shape is"):
            run(pipe, "a cat")
        with accelerate(pipe, PABConfig()), pytest.raises(ValueError, match=f"{key}: shape is"):
            run(pipe, "a cat")


def test_a_text_encoder_of_another_width_is_refused():
    with pytest.raises(ValueError, match="text: the encoder has 24 channels, must have the transformer's 16"):
        OpenSoraPipeline(tiny_transformer("open_sora"), tiny_text(24))
