"""accelerate on diffusers' own Wan and LTX-Video pipelines, with tiny text encoders and autoencoders."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanVideoToVideoPipeline

from pab_kernels import PABConfig, PABHandles, accelerate
from tests.wan_tools import (
    PIPELINES,
    forwards_per_step,
    generate,
    plain_runs,
    relative_error,
    timesteps_of,
    transformers_of,
    unipc,
)

STEPS = 10
PAB = PABConfig(
    spatial_broadcast=True, spatial_threshold=(50, 990), spatial_range=2,
    cross_broadcast=True, cross_threshold=(50, 990), cross_range=3,
)  # fmt: skip


@pytest.mark.parametrize("name", PIPELINES)
def test_without_pab_it_is_the_host_and_with_it_the_plain_form(name: str) -> None:
    pipe = PIPELINES[name]()
    weights = [{key: value.clone() for key, value in each.state_dict().items()} for each in transformers_of(pipe)]
    without = generate(pipe, STEPS)
    with plain_runs(pipe, PAB, STEPS):
        expected = generate(pipe, STEPS)
    assert relative_error(expected, without) > 1e-3, "the config must really broadcast"
    with accelerate(pipe, PABConfig()):
        assert relative_error(generate(pipe, STEPS), without) < 1e-5
    with accelerate(pipe, PAB) as handle:
        for _ in range(2):
            assert relative_error(generate(pipe, STEPS), expected) < 1e-5
        report = handle.report()
        assert report.calls == STEPS * forwards_per_step(pipe)
        assert 0 < report.broadcast["spatial"] < report.broadcast["cross"]
    for each, before in zip(transformers_of(pipe), weights, strict=True):
        assert all(torch.equal(value, before[key]) for key, value in each.state_dict().items())
        assert not {"forward", "cache_context"} & set(vars(each))
    assert torch.equal(generate(pipe, STEPS), without)


@pytest.mark.parametrize("name", ["wan t2v", "wan t2v, two transformers", "ltx, image"])
def test_after_anything_a_run_starts_clean(name: str) -> None:
    """An exception, another size, other steps, no guidance, another scheduler, prompt and batch."""
    pipe = PIPELINES[name]()

    def cancel(_pipe: Any, step: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            raise KeyboardInterrupt
        return tensors

    with accelerate(pipe, PAB):
        expected = generate(pipe, STEPS)
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, STEPS, seed=1, prompt="a blue dog at night", callback_on_step_end=cancel)
        assert torch.equal(generate(pipe, STEPS), expected)
        generate(pipe, STEPS, seed=2, width=128)
        generate(pipe, STEPS + 3, seed=2)
        assert torch.equal(generate(pipe, STEPS), expected)
        generate(pipe, STEPS, seed=3, guidance_scale=1.0)
        assert torch.equal(generate(pipe, STEPS), expected)
        generate(pipe, STEPS, num_videos_per_prompt=2)
        first, pipe.scheduler = pipe.scheduler, type(pipe.scheduler).from_config(pipe.scheduler.config)
        assert torch.equal(generate(pipe, STEPS), expected)
        pipe.scheduler = first
        assert torch.equal(generate(pipe, STEPS), expected)


def test_guidance_that_is_switched_off_leaves_no_stale_slots() -> None:
    pipe = PIPELINES["wan t2v"]()
    alone = generate(pipe, STEPS, guidance_scale=1.0)
    with accelerate(pipe, PABConfig()) as handle:
        generate(pipe, STEPS)
        assert relative_error(generate(pipe, STEPS, guidance_scale=1.0), alone) < 1e-5
        assert handle.report().calls == STEPS


def test_wan_with_euler_and_a_plan_over_what_really_happens() -> None:
    pipe = PIPELINES["wan t2v"]()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with plain_runs(pipe, PAB, STEPS):
        expected = generate(pipe, STEPS)
    with accelerate(pipe, PAB):
        assert relative_error(generate(pipe, STEPS), expected) < 1e-5


def test_repeated_integer_timesteps_do_not_confuse_it() -> None:
    """UniPC at shift 3 has more steps than integers near 1000: five of 400 repeat the one before."""
    pipe = PIPELINES["wan t2v"]()
    steps = 400
    (timesteps,) = timesteps_of(pipe, steps)
    assert sum(now == after for now, after in itertools.pairwise(timesteps)) == 5
    with plain_runs(pipe, PAB, steps):
        expected = generate(pipe, steps)
    with accelerate(pipe, PAB) as handle:
        assert relative_error(generate(pipe, steps), expected) < 1e-5
        assert len(handle.schedule) == steps


def test_a_run_that_begins_later() -> None:
    """Video to video skips the first steps of the scheduler."""
    parts = PIPELINES["wan t2v"]()
    pipe: Any = WanVideoToVideoPipeline(parts.tokenizer, parts.text_encoder, parts.transformer, parts.vae, unipc())
    pipe.set_progress_bar_config(disable=True)
    given = np.random.default_rng(0).random((9, 32, 64, 3), dtype=np.float32)

    def run() -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipe(
            list(given), "a red cat", strength=0.6, height=32, width=64, num_inference_steps=STEPS, guidance_scale=4.0,
            generator=generator, output_type="latent",
        ).frames  # fmt: skip

    without = run()
    with accelerate(pipe, PABConfig()), pytest.raises(ValueError, match=r"give accelerate\(\) forwards_per_step=2"):
        run()  # this pipeline gives the two forwards of a step no names
    with accelerate(pipe, PABConfig(), forwards_per_step=2):
        assert relative_error(run(), without) < 1e-5
    with accelerate(pipe, PAB, forwards_per_step=2) as handle:
        assert relative_error(run(), without) > 1e-4
        assert len(handle.schedule) == 6


def test_two_transformers_share_the_memory_of_their_slots() -> None:
    pipe = PIPELINES["wan t2v, two transformers"]()
    with accelerate(pipe, PAB) as pair:
        assert isinstance(pair, PABHandles)
        generate(pipe, STEPS)
        reports = [handle.report() for handle in pair.handles]
        together = pair.report()
        assert reports[0].cache_bytes == reports[1].cache_bytes == together.cache_bytes > 0
        assert together.calls == sum(report.calls for report in reports) == 2 * STEPS
        assert together.slots == 2 * reports[0].slots
        counts = [len(timesteps) for timesteps in timesteps_of(pipe, STEPS)]
        assert len(pair.handles[1].schedule or ()) == counts[1]
    assert pair.report().calls == 4 * STEPS // 2
    assert not pair.is_open


def test_the_second_transformer_is_refused_and_the_first_given_back() -> None:
    pipe = PIPELINES["wan t2v, two transformers"]()
    pipe.transformer_2.blocks[1].ffn.net[2].register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"WanTransformer3DModel\.blocks\.1\.ffn\.net\.2: "):
        accelerate(pipe, PAB)
    assert not {"forward", "cache_context"} & set(vars(pipe.transformer))
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in pipe.transformer.parameters())


def test_a_transformer_that_reads_what_the_other_wrote_is_refused() -> None:
    """A loop that goes back to the first: its slots were overwritten meanwhile."""
    pipe = PIPELINES["wan t2v, two transformers"]()
    with accelerate(pipe, PAB) as pair:
        generate(pipe, STEPS)
        for handle in pair.handles:
            with pytest.raises(ValueError, match=r"over|begin"):
                handle.transformer(
                    torch.zeros(1, 16, 3, 4, 8), torch.tensor([900.0]), torch.zeros(1, 512, 16), return_dict=False
                )


@pytest.mark.parametrize("name", ["wan t2v, two transformers", "ltx"])
def test_as_from_pretrained_loads_it_in_bfloat16(name: str, tmp_path: Path) -> None:
    """Which needs accelerate: parts of Wan stay in float32."""
    made = PIPELINES[name]()
    made.save_pretrained(tmp_path)
    pipe = type(made).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.dtype == torch.bfloat16
    expected = generate(pipe, STEPS)
    with accelerate(pipe, PABConfig()):
        assert relative_error(generate(pipe, STEPS), expected) < 2e-2
    assert torch.equal(generate(pipe, STEPS), expected)


@pytest.mark.parametrize("name", ["wan i2v", "ltx"])
def test_decoded_video(name: str) -> None:
    pipe = PIPELINES[name]()
    with accelerate(pipe, PAB):
        frames = np.asarray(generate(pipe, STEPS, output_type="np"))
    assert frames.shape[0] == 1
    assert np.isfinite(frames).all()


def test_slots_of_one_byte_an_element() -> None:
    pipe = PIPELINES["wan t2v"]()
    with accelerate(pipe, PAB) as handle:
        expected, wide = generate(pipe, STEPS), handle.report().cache_bytes
    with accelerate(pipe, dataclasses.replace(PAB, cache_dtype="int8")) as handle:
        assert relative_error(generate(pipe, STEPS), expected) < 1e-2
        assert handle.report().cache_bytes < 0.5 * wide


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["wan t2v, two transformers", "wan ti2v, text", "ltx", "ltx, image"])
def test_on_a_gpu_runs_of_graphs_are_the_plain_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32; without TF32, which the host's convolution of patches would use and our GEMM would not."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    pipe = PIPELINES[name]().to("cuda")
    with plain_runs(pipe, PAB, STEPS):
        expected = generate(pipe, STEPS)
    with accelerate(pipe, PAB) as handle:
        for _ in range(3):
            assert relative_error(generate(pipe, STEPS), expected) < 1e-4
        report = handle.report()
        assert report.eager is None
        assert report.graphs == report.captured > 0
