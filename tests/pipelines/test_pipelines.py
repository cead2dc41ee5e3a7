"""Open-Sora's and Open-Sora-Plan's pipelines, on tiny transformers and a tiny T5."""

import io
from itertools import pairwise
from typing import Any

import pytest
import sentencepiece
import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX
from safetensors.torch import save_file

from pab_kernels import PABConfig, accelerate
from pab_kernels.pipelines import latents
from pab_kernels.pipelines.loading import Source, load_pipeline, load_text, resolve_model, text_encoder_bytes
from pab_kernels.pipelines.open_sora import OpenSoraPipeline
from pab_kernels.pipelines.samplers import RFlowScheduler, rflow_timesteps
from pab_kernels.pipelines.sizes import ASPECTS, RESOLUTIONS, VideoSize, family_size, open_sora_size, plan_size
from pab_kernels.pipelines.text import RandomText, clean_prompt
from pab_kernels.pipelines.vae import load_vae
from tests.pipeline_tools import CAPTION, SMALLEST, TINY, save_text, tiny_pipeline, tiny_text, tiny_transformer

FAMILIES = ["open_sora", "open_sora_plan_v110", "open_sora_plan_v120"]
PROMPTS = ["a cat", "the red dog runs over the hill at night"]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def run(pipe: Any, prompt: Any, **settings: Any) -> torch.Tensor:
    """Six steps at the smallest size."""
    size = SMALLEST if pipe.family == "open_sora" else {}
    return pipe(prompt, **{**size, "num_inference_steps": 6, "guidance_scale": 3.0, **settings})


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return float((a - b).norm() / b.norm()) < tolerance


# Sizes


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


# Samplers


def test_rflow_follows_a_straight_line_from_noise_to_data():
    scheduler = RFlowScheduler()
    scheduler.set_timesteps(7, 480, 854, 15)
    noise, data = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    state = noise
    for t in scheduler.timesteps:
        state = scheduler.step(data - noise, t, state)
        assert torch.allclose(scheduler.scale_model_input(state, t), state)
    assert torch.allclose(state, data)


def test_rflow_makes_new_timesteps_for_each_run():
    scheduler = RFlowScheduler()
    scheduler.set_timesteps(5, 144, 256, 15)
    first = scheduler.timesteps
    scheduler.set_timesteps(5, 144, 256, 15)
    assert scheduler.timesteps is not first
    assert scheduler.timesteps.tolist() == pytest.approx(rflow_timesteps(5, 144, 256, 15))
    with pytest.raises(ValueError, match="must be one of the run's 5 timesteps"):
        scheduler.step(torch.zeros(1), 3.0, torch.zeros(1))


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
    from pab_kernels.pipelines.text_to_video import Prompts

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


# Text


def test_prompts_are_cleaned():
    assert clean_prompt("  A &amp; B\n C ") == "a & b c"


def test_random_text_depends_on_the_prompt_alone():
    text = RandomText(8)
    embeddings, mask = text.encode(["a cat", "a red dog"], 10)
    assert torch.equal(text.encode(["a red dog"], 10)[0][0], embeddings[1])
    assert mask.sum(1).tolist() == [3, 4]
    with pytest.raises(ValueError, match="has 3 tokens, must have at most 2"):
        text.encode(["a cat"], 2)


# Loading


def _checkpoint(family: str, folder) -> str:
    """A tiny checkpoint with its config.json; returns its path."""
    import json

    folder.mkdir()
    model = tiny_transformer(family)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TINY[family]))
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_loads_from_folders(family, tmp_path):
    weights = _checkpoint(family, tmp_path / "weights")
    save_text(tiny_text(), tmp_path / "t5")
    source = Source(family, weights, str(tmp_path / "t5"))
    pipe: Any = load_pipeline(source, None, dtype=torch.float32, device="cpu")
    assert torch.equal(run(pipe, "a cat"), run(tiny_pipeline(family), "a cat"))
    assert text_encoder_bytes(source, torch.bfloat16) == 2 * sum(p.numel() for p in pipe.text_encoder.parameters())
    assert pipe.tokenizer is not None
    assert next(pipe.to(torch.bfloat16).text_encoder.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["open_sora", "open_sora_plan_v120"])
def test_a_text_encoder_loads_from_the_sentencepiece_file_of_its_release(family, tmp_path):
    """The released T5 and mT5 have no tokenizer.json, so that transformers needs sentencepiece and protobuf."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat runs over the hill", "a dog runs at night"] * 50),
        model_writer=model,
        vocab_size=21,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    tiny_text().encoder.save_pretrained(tmp_path)
    text = load_text(family, tmp_path, dtype=torch.float32, device="cpu")
    ids = text.tokenizer("a cat")["input_ids"]
    assert text.tokenizer.convert_ids_to_tokens(ids)[-1] == "</s>"
    assert text.tokenizer.decode(ids, skip_special_tokens=True) == "a cat"


def test_plan_weights_lie_in_a_folder_for_each_size(tmp_path):
    (tmp_path / "all").mkdir()
    _checkpoint("open_sora_plan_v120", tmp_path / "all" / "29x480p")
    save_text(tiny_text(), tmp_path / "text_encoder")
    save_text(tiny_text(), tmp_path / "tokenizer")
    size = VideoSize(29, 480, 640, (8, 60, 80))
    source = Source("open_sora_plan_v120", str(tmp_path / "all"), str(tmp_path))
    assert load_pipeline(source, size, dtype=torch.float32, device="cpu") is not None


def test_a_checkpoint_of_another_family_is_refused(tmp_path):
    weights = _checkpoint("open_sora", tmp_path / "weights")
    with pytest.raises(ValueError, match="is a checkpoint of family 'open_sora', not 'open_sora_plan_v110'"):
        load_pipeline(Source("open_sora_plan_v110", weights), None, dtype=torch.float32, device="cpu")


def test_missing_parts_say_what_to_download(tmp_path):
    absent = str(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"hf download google/mt5-xxl --local-dir mt5-xxl` .* `--text-encoder"):
        load_text("open_sora_plan_v120", absent, dtype=torch.float32, device="cpu")
    with pytest.raises(FileNotFoundError, match="absent"):
        load_pipeline(Source("open_sora", absent), None, dtype=torch.float32, device="cpu")
    with pytest.raises(FileNotFoundError, match=r"vae: .*absent.* `hf download"):
        load_vae(absent, 4, dtype=torch.float32, device="cpu")
    with pytest.raises(FileNotFoundError, match="hf download maxin-cn/Latte-1"):
        load_pipeline(Source("latte", absent), None, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "open_sora", "weights": "x", "random_weights": True}, "random_weights: .* must be given alone"),
        ({"model": "demo", "random_weights": True}, "random_weights: got it for 'demo'"),
        ({"model": "latte", "vae": "x"}, "vae, text_encoder: got one for 'latte'"),
        ({"model": "opensora"}, "model: got 'opensora', must be demo, open_sora"),
    ],
)
def test_sources_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Source(**settings)


def test_plan_versions_are_told_by_the_size():
    assert resolve_model("open_sora_plan", "65x512x512") == "open_sora_plan_v110"
    assert resolve_model("open_sora_plan", "93x720p") == "open_sora_plan_v120"
    assert resolve_model("open_sora_plan", None) == "open_sora_plan_v120"


# Decoding


def video_vae(latent_channels: int = 4) -> Any:
    torch.manual_seed(0)
    return AutoencoderKLCogVideoX(
        latent_channels=latent_channels, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    )


def test_a_given_decoder_makes_a_video(tmp_path):
    video_vae().save_pretrained(tmp_path / "vae")
    vae = load_vae(tmp_path, 4, dtype=torch.float32, device="cpu")
    pipe = tiny_pipeline("open_sora_plan_v120", vae=vae)
    size = pipe.size()
    hidden = torch.randn(2, 4, *size.latent)
    video = pipe.decode(hidden, size)
    assert video.shape == (2, 17, 64, 64, 3)
    assert 0 <= video.min() < video.max() <= 1
    raw = vae.decode(hidden[1:] / 0.18215).sample  # type: ignore[operator]
    expected = (raw[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(video[1], expected[:17], atol=1e-5)


def test_decoders_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="AutoencoderKLCogVideoX has 5 latent channels, must have 4"):
        tiny_pipeline("open_sora", vae=video_vae(5))
    image_vae: Any = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2)
    image_vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="AutoencoderKL decodes images"):
        load_vae(tmp_path / "vae", 4, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="vae: got None"):
        tiny_pipeline("open_sora").decode(torch.zeros(1, 4, 5, 24, 24), open_sora_size("144p", "1:1", 17))


# Latents as files


def test_latents_come_back_with_their_metadata(tmp_path):
    hidden = torch.randn(4, 3, 6, 5)
    latents.save(hidden, tmp_path / "a" / "x.safetensors", {"prompt": "a cat", "scale": (1.0, 2.0), "pab": None})
    loaded, metadata = latents.load(tmp_path / "a" / "x.safetensors")
    assert torch.equal(loaded, hidden)
    assert metadata == {"prompt": "a cat", "scale": [1.0, 2.0], "pab": None}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.safetensors"]
    with pytest.raises(FileNotFoundError, match="no such file"):
        latents.load(tmp_path / "y.safetensors")
    (tmp_path / "z.safetensors").write_text("nothing")
    with pytest.raises(ValueError, match="not a file of latents"):
        latents.load(tmp_path / "z.safetensors")


def test_the_first_look_shows_what_varies_and_compares_like_with_like():
    hidden = torch.randn(4, 3, 8, 8) * 0.01
    hidden[2, :, :, 4:] += 5  # the right half differs in one channel
    picture = latents.first_look(hidden)
    assert picture.shape == (3, 8, 8, 3)
    halves = picture[:, :, :4, 0].astype(float).mean(), picture[:, :, 4:, 0].astype(float).mean()
    assert abs(halves[0] - halves[1]) > 150
    assert (latents.first_look(hidden, like=hidden) == picture).all()
    assert (latents.first_look(hidden + 1, like=hidden) != picture).any()
    assert latents.first_look(torch.full((4, 1, 2, 2), float("nan"))).shape == (1, 2, 2, 3)
