"""`pab generate` on tiny models."""

import json
import re
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, DDIMScheduler
from safetensors.torch import save_file

from pab_kernels.config import PABConfig
from pab_kernels.pipelines import latents
from pab_kernels.pipelines.demo import DemoPipeline
from pab_kernels.pipelines.generate import Request, Step
from pab_kernels.pipelines.generate import generate as run
from pab_kernels.schedule import Schedule
from tests.cli_tools import invoke, pab, refused
from tests.pipeline_tools import save_text, tiny_text, tiny_transformer

FAMILY_SIZES = {
    "open_sora": ["--resolution", "144p", "--aspect", "1:1", "--duration", "17"],
    "latte": [],
    "open_sora_plan_v110": ["--size", "17x64"],
    "open_sora_plan_v120": ["--size", "17x64"],
}


@pytest.mark.parametrize("family", FAMILY_SIZES)
def test_generate_runs_every_family_on_random_weights(tiny, family, tmp_path):
    output = pab(
        *("generate", "--model", family, *FAMILY_SIZES[family], "--random-weights", "--steps", 6, "--compare"),
        *("--prompt", "a cat", "--prompt", "a dog that runs", "--negative-prompt", "red", "--seed", 4, "--seed", 9),
        *("--output", tmp_path / "v.mp4", "--device", "cpu", "--cfg", 3, "--latents-only"),
    )
    assert re.search("finite .* yes .* yes", output)
    assert "speed-up" in output
    assert "latents' difference to no PAB" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "v-0.png",
        "v-0.safetensors",
        "v-1.png",
        "v-1.safetensors",
    ]
    hidden, metadata = latents.load(tmp_path / "v-1.safetensors")
    assert hidden.isfinite().all()
    assert metadata["family"] == family
    assert (metadata["prompt"], metadata["negative_prompt"], metadata["seed"]) == ("a dog that runs", "red", 9)
    assert (metadata["steps"], metadata["guidance"]) == (6, 3.0)
    assert PABConfig.from_dict(metadata["pab"]) == PABConfig.preset(family)
    assert len(metadata["latent_scale"]) in (1, hidden.shape[0])
    assert metadata["height"] == hidden.shape[2] * 8
    assert {"frames", "width", "fps", "latent_shift"} <= metadata.keys()


def test_generate_loads_a_checkpoint_and_a_text_encoder(tiny, tmp_path):
    state = tiny_transformer("open_sora").state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    save_text(tiny_text(), tmp_path / "t5")
    output = pab(
        *("generate", "--model", "open_sora", *FAMILY_SIZES["open_sora"], "--prompt", "a red cat"),
        *("--weights", tmp_path / "model.safetensors", "--text-encoder", tmp_path / "t5"),
        *("--steps", 4, "--output", tmp_path / "v.mp4", "--device", "cpu", "--latents-only"),
    )
    assert "4 transformer calls" in output
    assert latents.load(tmp_path / "v.safetensors")[0].isfinite().all()


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_generate_paints_a_video_with_the_demo(demo, suffix, tmp_path):
    if suffix == ".mp4":
        pytest.importorskip("imageio_ffmpeg")
    output = pab(
        *("generate", "--model", demo, "--prompt", "a red circle moves right", "--steps", 3, "--pab", "off"),
        *("--output", tmp_path / f"v{suffix}", "--device", "cpu"),
    )
    assert f"wrote {tmp_path / 'v'}{suffix}" in output
    assert [path.name for path in tmp_path.iterdir()] == [f"v{suffix}"]
    assert (tmp_path / f"v{suffix}").stat().st_size > 500


def test_generate_compares_the_demo_with_itself(demo, tmp_path):
    output = pab(
        *("generate", "--model", demo, "--prompt", "a red circle moves right", "--prompt", "a blue star moves up"),
        *("--steps", 4, "--compare", "--output", tmp_path / "v.gif", "--device", "cpu"),
    )
    assert all(word in output for word in ("PSNR against no PAB, video 1", "SSIM", "speed-up", "4 transformer calls"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v-0.gif", "v-0.png", "v-1.gif", "v-1.png"]


def test_generate_prints_json_alone_on_stdout(demo, tmp_path):
    result = invoke(
        *("generate", "--model", demo, "--prompt", "a red circle moves right", "--steps", 4, "--compare", "--json"),
        *("--output", tmp_path / "v.gif", "--device", "cpu", "--seed", 7, "--preview", 2),
    )
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["model"], summary["steps"], summary["seeds"], summary["guidance"]) == ("demo", 4, [7], 2.0)
    assert (summary["device"], summary["dtype"]) == ("cpu", "float32")
    assert PABConfig.from_dict(summary["pab"]) == PABConfig.preset("latte")
    assert sorted(summary["files"]) == sorted(map(str, tmp_path.iterdir()))
    without, with_pab = summary["runs"].values()
    assert without["report"] is None
    assert with_pab["finite"]
    computed, broadcast = with_pab["report"]["computed"], with_pab["report"]["broadcast"]
    assert all(computed[kind] + broadcast[kind] == 4 for kind in computed)
    (video,) = summary["comparison"]["videos"]
    assert video["psnr"] is None or video["psnr"] > 0
    assert 0 < video["ssim"] <= 1
    assert summary["comparison"]["speed_up"] == pytest.approx(without["seconds"] / with_pab["seconds"])
    assert "with PAB" in result.stderr  # the progress bar


def test_generate_writes_previews_of_every_second_step(demo, tmp_path):
    prompts = ("--prompt", "a red circle moves right", "--prompt", "a blue star moves up")
    arguments = (
        "--model",
        demo,
        *prompts,
        "--steps",
        5,
        "--preview",
        2,
        "--output",
        tmp_path / "v.gif",
        "--pab",
        "off",
    )
    assert pab("generate", *arguments, "--device", "cpu", "--quiet") == ""
    names = ["v-0.gif", "v-1.gif", "v-denoising-step-002.png", "v-denoising-step-004.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    frames = [iio.imread(tmp_path / name) for name in names[2:]]
    assert frames[0].shape == (256, 512, 3)  # two videos of 16 x 16, enlarged
    assert not np.array_equal(frames[0], frames[1])
    # The last but one preview is near the video: the demo's previews are without the noise that is still to go.
    video = iio.imread(tmp_path / "v-0.gif")[2].astype(int)
    distance = [abs(frame[:, :256].astype(int) - video).mean() for frame in frames]
    assert distance[1] < distance[0]


def test_generate_previews_latents(tiny, tmp_path):
    arguments = (
        "--model",
        "latte",
        "--random-weights",
        "--latents-only",
        "--steps",
        2,
        "--preview",
        1,
        "--device",
        "cpu",
    )
    pab("generate", *arguments, "--output", tmp_path / "v.mp4", "--quiet")
    frame = iio.imread(tmp_path / "v-denoising-step-001.png")
    assert frame.shape[2] == 3
    assert frame.std() > 10


def test_generate_tells_of_every_step_what_it_did(demo):
    pipe = DemoPipeline.from_pretrained(demo)
    request = Request(["a red circle moves right"], steps=6)
    steps: list[Step] = []
    config = PABConfig.preset("latte")
    run(pipe, request, config, steps.append)
    plan = Schedule(config, pipe.scheduler.timesteps.tolist())
    assert [(step.done, step.total, step.variant) for step in steps] == [(i + 1, 6, v) for i, v in enumerate(plan)]
    assert len(set(plan)) > 1
    run(pipe, request, None, steps.append)
    assert steps[-1].variant is None


def test_generate_ends_with_1_for_a_result_that_is_not_finite(demo, tmp_path, monkeypatch):
    step = DDIMScheduler.step

    def broken(self, *args, **kwargs):
        latents, denoised = step(self, *args, **kwargs)
        return latents * torch.nan, denoised

    monkeypatch.setattr(DDIMScheduler, "step", broken)
    arguments = ("--model", demo, "--prompt", "a red circle moves right", "--steps", 2, "--device", "cpu")
    result = invoke("generate", *arguments, "--pab", "off", "--output", tmp_path / "v.gif", "--quiet")
    assert result.exit_code == 1
    assert "not finite" in result.stderr
    assert result.stdout == ""


def test_generate_refuses_a_folder_that_cannot_be_written(demo, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused("generate", "--model", demo, "--device", "cpu", "--output", tmp_path / "file" / "v.gif")
    assert "must be in a folder that can be written" in line


def test_generate_refuses_a_word_that_the_demo_does_not_know(demo, tmp_path):
    output = tmp_path / "v.gif"
    arguments = ("--model", demo, "--prompt", "a red elephant", "--output", output, "--device", "cpu")
    assert "elephant" in refused("generate", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "open_sora", "--steps", "3000"], r"num_inference_steps must be in \[1, 1000\], got 3000"),
        (["--output", "v.avi"], "output: got 'v.avi'"),
        (["--model", "opensora"], "model: got 'opensora', must be demo"),
        (["--random-weights"], "random_weights: got it for 'demo'"),
        (["--model", "open_sora", "--random-weights", "--weights", "x"], "random_weights: .* must be given alone"),
        (["--model", "open_sora", "--resolution", "481p"], "resolution: got '481p'"),
        (["--model", "open_sora", "--duration", "50"], "duration: got '50'"),
        (["--model", "open_sora", "--aspect", "21:9"], "aspect: got '21:9'"),
        (["--model", "open_sora_plan_v110", "--size", "29x480p"], "size: got '29x480p'"),
        (["--size", "29x480p"], "size: got '29x480p' for demo"),
        (["--pab", "nothing"], "pab: got 'nothing'"),
        (["--pab", "off", "--compare"], "there is nothing to compare"),
        (["--prompt", "a", "--prompt", "b", "--prompt", "c", "--seed", "1", "--seed", "2"], "seed must be given once"),
        (["--dtype", "int8"], "dtype: got 'int8'"),
        (["--linear-precision", "fp8"], "linear_precision: got fp8, must be None here: fp8 GEMMs need a CUDA GPU"),
        (["--model", "open_sora", "--weights", "nowhere.safetensors"], "there is no file or folder nowhere"),
    ],
    ids=lambda value: "" if isinstance(value, list) else value[:20],
)
def test_generate_refuses(arguments, message, tmp_path):
    line = refused("generate", "--output", tmp_path / "v.gif", "--device", "cpu", *arguments)
    assert re.search(message, line)
    assert not list(tmp_path.iterdir())


def test_generate_refuses_mp4_where_it_cannot_be_written(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert "output: got 'video.mp4', must end in .gif" in refused("generate", "--device", "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_generate_refuses_a_gpu_that_is_not_there():
    assert "device: got cuda" in refused("generate", "--device", "cuda", "--output", "v.gif")


def test_generate_refuses_a_run_that_does_not_fit(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (40 * 2**30, 80 * 2**30))
    monkeypatch.setattr("pab_kernels.pipelines.memory.available_host_memory", lambda: 64 * 2**30)
    line = refused(
        *("generate", "--model", "open_sora", "--resolution", "480p", "--duration", "8s", "--random-weights"),
        *("--device", "cuda", "--output", tmp_path / "v.mp4"),
    )
    assert re.search(
        r"needs 53\.\d GiB .* 45.9 in 112 slots.*, 2.1 others.* but 40.0 GiB are free"
        r".* --cache-device cpu .* --duration 4s",
        line,
    )


def test_a_text_encoder_that_is_offloaded_is_never_beside_slots(monkeypatch, tmp_path):
    """Open-Sora 480p: 2.3 GiB of weights, 2.1 of the decoder's, 11.5 in slots; a text encoder of 12."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("pab_kernels.pipelines.generate.text_encoder_bytes", lambda _source, _dtype: 12 * 2**30)
    arguments = (
        *("generate", "--model", "open_sora", "--resolution", "480p", "--random-weights", "--device", "cuda"),
        *("--output", tmp_path / "v.gif"),
    )

    def needed(free: float, *more: str) -> float:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (int(free * 2**30), 80 * 2**30))
        found = re.search(r"needs (\d+\.\d) GiB", refused(*arguments, *more))
        assert found is not None
        return float(found[1])

    without = needed(1, "--offload-text")
    assert needed(1) == pytest.approx(without + 12, abs=0.11)
    monkeypatch.setattr("pab_kernels.pipelines.generate.text_encoder_bytes", lambda _source, _dtype: 30 * 2**30)
    assert without < needed(1, "--offload-text") < 36  # while it runs it lies beside the weights alone
    assert "offload_text: got it for latte" in refused("generate", "--model", "latte", *arguments[6:], "--offload-text")


def test_generate_writes_every_video_before_any_picture(demo, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no room for a picture")

    monkeypatch.setattr("pab_kernels.figures.contact_sheet", fail)
    prompts = ("--prompt", "a red circle moves right", "--prompt", "a blue star moves up")
    arguments = ("--model", demo, *prompts, "--steps", 2, "--compare", "--device", "cpu")
    assert "no room" in pab("generate", *arguments, "--output", tmp_path / "v.gif", code=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v-0.gif", "v-1.gif"]


@pytest.mark.parametrize(
    ("output", "in_the_way"),
    [
        ("file/v.gif", "file"),
        ("v.gif", "v.gif/"),
        ("v.gif", "v.png/"),
        ("v.gif", "v-with-PAB-step-004.png/"),
        (f"{'x' * 300}.gif", ""),
        (f"{'x' * 240}.gif", ""),  # the previews' names are longer
    ],
)
def test_generate_refuses_outputs_before_the_work(output, in_the_way, demo, tmp_path, monkeypatch):
    monkeypatch.setattr(DemoPipeline, "__call__", lambda *args, **kwargs: pytest.fail("it ran"))
    if in_the_way.endswith("/"):
        (tmp_path / in_the_way).mkdir()
    elif in_the_way:
        (tmp_path / in_the_way).write_text("mine")
    before = sorted(tmp_path.iterdir())
    arguments = ("--model", demo, "--device", "cpu", "--steps", 4, "--compare", "--preview", 2)
    line = refused("generate", *arguments, "--output", tmp_path / output)
    assert re.match("error: (output|preview): got", line)
    assert sorted(tmp_path.iterdir()) == before


def test_generate_does_not_write_what_it_reads(tiny, tmp_path):
    weights = tmp_path / "v.safetensors"
    state = tiny_transformer("open_sora").state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, weights)
    before = weights.read_bytes()
    arguments = ("--model", "open_sora", *FAMILY_SIZES["open_sora"], "--device", "cpu", "--output", tmp_path / "v.mp4")
    arguments = (*arguments, "--latents-only")
    for given in (weights, tmp_path):
        assert "output: got" in refused("generate", *arguments, "--weights", given)
    assert weights.read_bytes() == before


IMAGE_SIZES = {**FAMILY_SIZES, "open_sora": ["--resolution", "144p", "--aspect", "1:1"]}


@pytest.mark.parametrize("family", FAMILY_SIZES)
def test_generate_makes_single_images(tiny, family, tmp_path):
    pab(
        *("generate", "--model", family, *IMAGE_SIZES[family], "--random-weights", "--steps", 4, "--still"),
        *("--prompt", "a cat", "--output", tmp_path / "v.png", "--device", "cpu", "--pab", "off", "--latents-only"),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.png", "v.safetensors"]
    hidden, metadata = latents.load(tmp_path / "v.safetensors")
    assert hidden.shape[1] == metadata["frames"] == 1
    assert hidden.isfinite().all()


def test_generate_makes_one_frame_of_open_sora_by_its_duration_too(tiny, tmp_path):
    common = ("generate", "--model", "open_sora", "--resolution", "144p", "--random-weights", "--steps", 4, "--seed", 3)
    for name, choice in (("a", ("--still",)), ("b", ("--duration", 1))):
        pab(*common, *choice, "--output", tmp_path / f"{name}.png", "--device", "cpu", "--latents-only")
    first, second = (latents.load(tmp_path / f"{name}.safetensors")[0] for name in "ab")
    assert torch.equal(first, second)


def test_generate_decodes_a_single_image_and_compares_two(tiny, tmp_path):
    vae: Any = AutoencoderKLCogVideoX(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    )
    vae.save_pretrained(tmp_path / "vae")
    save_text(tiny_text(), tmp_path / "t5")
    state = tiny_transformer("open_sora").state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    out = tmp_path / "out"
    pab(
        *("generate", "--model", "open_sora", *IMAGE_SIZES["open_sora"], "--prompt", "a cat", "--still", "--compare"),
        *("--weights", tmp_path / "model.safetensors", "--text-encoder", tmp_path / "t5", "--vae", tmp_path / "vae"),
        *("--steps", 6, "--output", out / "v.png", "--device", "cpu"),
    )
    assert sorted(path.name for path in out.iterdir()) == ["v-sheet.png", "v.png"]
    assert iio.imread(out / "v.png").shape[-1] == 3


def test_generate_makes_several_videos_of_each_prompt(tiny, tmp_path):
    common = ("generate", "--model", "open_sora_plan_v120", "--size", "17x64", "--random-weights", "--steps", 4)
    prompts = ("--prompt", "a cat", "--prompt", "a dog", "--seed", 5, "--device", "cpu", "--pab", "off")
    pab(*common, *prompts, "--latents-only", "--videos", 2, "--output", tmp_path / "v.mp4")
    found = [latents.load(tmp_path / f"v-{i}.safetensors") for i in range(4)]
    assert [(metadata["prompt"], metadata["seed"]) for _, metadata in found] == [
        ("a cat", 5),
        ("a cat", 6),
        ("a dog", 7),
        ("a dog", 8),
    ]
    assert not torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "open_sora", "--still", "--duration", "2s"], "still, duration: got both"),
        (["--still"], "still: got it for demo, whose weights make videos of one length"),
        (["--model", "latte", "--still", "--output", "v.mp4"], "must end in .png: it is a single image"),
        (["--model", "open_sora", "--output", "v.png"], "must end in .mp4 or .gif"),
        (["--videos", "2", "--seed", "1", "--seed", "2", "--seed", "3"], "seed must be given once or for each of 2"),
        (["--seed", str(2**64)], "must fit 64 bits"),
    ],
)
def test_generate_refuses_images_and_numbers_that_make_no_sense(arguments, message):
    assert message in refused("generate", "--random-weights" if "--model" in arguments else "-q", *arguments)
