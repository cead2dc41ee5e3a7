"""The runtime on a GPU: graphs, kernel counts, no synchronisation, no allocation; the same numbers as eager steps."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pab_kernels import PABConfig, accelerate
from pab_kernels.models.checkpoints import random_weights

pytestmark = pytest.mark.gpu

TIMESTEPS = [900.0, 700.0, 600.0, 500.0, 400.0, 50.0]
PAB = PABConfig(
    spatial_broadcast=True, spatial_threshold=(100, 800), spatial_range=2,
    temporal_broadcast=True, temporal_threshold=(100, 800), temporal_range=2,
    cross_broadcast=True, cross_threshold=(100, 800), cross_range=2,
)  # fmt: skip
LAYERS = 3


def latte() -> Any:
    model: Any = random_weights("latte", dtype=torch.bfloat16, device="cuda", seed=0, num_layers=LAYERS)
    return model.eval().requires_grad_(False)


def latents(batch: int = 2, size: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(batch, 4, 16, size, size, generator=generator, device="cuda", dtype=torch.bfloat16)


def text(length: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(batch, length, 4096, generator=generator, device="cuda", dtype=torch.bfloat16)


def run(model: Any, handle: Any, x: torch.Tensor, y: torch.Tensor, timesteps=TIMESTEPS) -> torch.Tensor:
    handle.begin(timesteps)
    steps = torch.tensor(timesteps, device="cuda")
    outputs = []
    for t in steps:
        outputs.append(model(x, timestep=t.expand(len(x)), encoder_hidden_states=y, return_dict=False)[0])
        x = x - 0.1 * outputs[-1][:, :4]
    return torch.stack(outputs)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def test_graphs_give_the_numbers_of_eager_steps_for_new_prompts_seeds_and_timesteps(device):
    model = latte()
    with accelerate(model, PAB, cuda_graphs=False) as handle:
        want = [
            run(model, handle, latents(), text(60)),
            run(model, handle, latents(seed=1), text(40, seed=1)),
            run(model, handle, latents(seed=2), text(63, seed=2), [t - 3 for t in TIMESTEPS]),
        ]
    with accelerate(model, PAB) as handle:
        for _ in range(3):
            first = run(model, handle, latents(), text(60))
        graphs = handle.report().graphs
        assert graphs == len(set(handle.schedule or ()))
        assert error(first, want[0]) < 1e-2
        assert error(run(model, handle, latents(seed=1), text(40, seed=1)), want[1]) < 1e-2
        again = run(model, handle, latents(seed=2), text(63, seed=2), [t - 3 for t in TIMESTEPS])
        assert error(again, want[2]) < 1e-2
        assert handle.report().graphs == graphs, "new prompts, seeds and timesteps replay the graphs there are"


def test_runtime_agrees_with_the_eager_host(device):
    model = latte()
    x, y = latents(), text(60)
    t = torch.full((2,), 500.0, device="cuda")
    want = model(x, timestep=t, encoder_hidden_states=y, return_dict=False)[0]
    with accelerate(model, PABConfig()) as handle:
        handle.begin([500, 500, 500])
        for _ in range(3):
            got = model(x, timestep=t, encoder_hidden_states=y, return_dict=False)[0]
            assert error(got, want) < 2e-2


def test_no_synchronisation_and_no_allocation_in_the_loop(device):
    model = latte()
    x, y = latents(), text(60)
    steps = torch.tensor(TIMESTEPS, device="cuda")
    with accelerate(model, PAB) as handle:
        for _ in range(3):
            run(model, handle, x, y)
        handle.begin(TIMESTEPS)
        model(x, timestep=steps[0].expand(2), encoder_hidden_states=y)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for i in range(1, len(TIMESTEPS)):
                model(x, timestep=steps[i].expand(2), encoder_hidden_states=y)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        after = torch.cuda.memory_stats()
        # The caller's own copy of each prediction is all that the loop asks the allocator for, and it is reused.
        assert after["num_device_alloc"] == before["num_device_alloc"]
        assert after["reserved_bytes.all.current"] == before["reserved_bytes.all.current"]


def test_a_broadcast_block_launches_three_kernels(device):
    """The pass, MLP up with GELU in its epilogue, MLP down: for each block, when all its attention is broadcast."""
    model = latte()
    x, y = latents(), text(60)
    counts = {}
    for layers in (1, LAYERS):
        part: Any = random_weights("latte", dtype=torch.bfloat16, device="cuda", seed=0, num_layers=layers)
        with accelerate(part, PAB, cuda_graphs=False) as handle:
            handle.begin([700.0, 600.0, 500.0, 400.0])
            steps = [torch.full((2,), t, device="cuda") for t in (700.0, 600.0, 500.0, 400.0)]
            for t in steps[:3]:
                part(x, timestep=t, encoder_hidden_states=y)
            assert handle.schedule is not None
            last = handle.schedule[3]
            assert last.spatial
            assert last.temporal
            assert last.cross
            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
                part(x, timestep=steps[3], encoder_hidden_states=y)
                torch.cuda.synchronize()
        kernels = Counter(e.name for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA)
        counts[layers] = sum(n for name, n in kernels.items() if "Memcpy" not in name and "Memset" not in name)
    blocks = 2 * (LAYERS - 1)
    assert counts[LAYERS] - counts[1] == 3 * blocks, kernels
    del model, part


def test_shapes_and_texts_alternate_without_new_captures_and_the_oldest_shape_goes(device):
    model = latte()
    with accelerate(model, PAB, keep_shapes=2) as handle:
        for size in (32, 16):
            for length in (60, 100):
                for _ in range(2):
                    run(model, handle, latents(size=size), text(length))
        variants = len(set(handle.schedule or ()))
        expected = [run(model, handle, latents(size=size), text(100)) for size in (32, 16)]
        report = handle.report()
        assert (report.shapes, report.captured, report.graphs) == (2, 4 * variants, 2 * variants)
        for _ in range(3):
            for size, want in zip((32, 16), expected, strict=True):
                run(model, handle, latents(size=size), text(60, seed=3))
                assert torch.equal(run(model, handle, latents(size=size), text(100)), want)
        assert handle.report().captured == 4 * variants, "shapes that are kept replay the graphs there are"
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        two = torch.cuda.memory_allocated()
        for _ in range(2):
            run(model, handle, latents(size=16, batch=1), text(60, batch=1))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_allocated() < two, "the slots and graphs of the largest shape are gone"
        assert torch.equal(run(model, handle, latents(size=16), text(100)), expected[1])
        assert handle.report().shapes == 2


def failing_embed(monkeypatch, failures: int) -> None:
    """The host waits for the GPU, which a capture must not, in the first `failures` captures."""
    from pab_kernels.models.latte import LatteAdapter

    embed, left = LatteAdapter.embed, [failures]

    def waits(self, call):
        if torch.cuda.is_current_stream_capturing() and left[0]:
            left[0] -= 1
            torch.cuda.current_stream().synchronize()
        return embed(self, call)

    monkeypatch.setattr(LatteAdapter, "embed", waits)


@pytest.mark.parametrize("failures", [1, 100])
def test_a_failed_capture_is_freed_and_tried_once_more(device, monkeypatch, failures):
    model = latte()
    with accelerate(model, PAB, cuda_graphs=False) as handle:
        want = run(model, handle, latents(), text(60))
    failing_embed(monkeypatch, failures)
    with accelerate(model, PAB) as handle:
        reserved = []
        for _ in range(5):
            got = run(model, handle, latents(), text(60))
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            reserved.append(torch.cuda.memory_reserved())
        assert error(got, want) < 1e-2
        report = handle.report()
        variants = len(set(handle.schedule or ()))
        assert report.graphs == (variants if failures == 1 else 0)
        assert ("capture failed" in (report.eager or "")) == (failures > 1)
        assert reserved[-1] == reserved[-2], "no attempt leaves memory behind"
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(1, device=device).isfinite()


def test_fused_weights_and_slots_are_freed_with_the_handle_still_there(device):
    model = latte()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated()
    handle = accelerate(model, PAB)
    for _ in range(3):
        run(model, handle, latents(), text(60))
    handle.close()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()  # one a stream, which would stay with torch
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() - before < 2**25, "fused weights alone are 60 MB"
    assert handle.report().calls == len(TIMESTEPS)


def test_a_timestep_that_is_not_the_next_gives_nan_at_once_and_an_error_at_the_next_call(device):
    model = latte()
    x, y = latents(), text(60)

    def at(t: float) -> torch.Tensor:
        return model(x, timestep=torch.full((2,), t, device="cuda"), encoder_hidden_states=y, return_dict=False)[0]

    with accelerate(model, PAB) as handle:
        handle.begin(TIMESTEPS)
        for t in TIMESTEPS[:3]:
            assert at(t).isfinite().all()
        assert at(444.0).isnan().all(), "each call brings a tensor of its own, so only the GPU knows"
        torch.cuda.synchronize()
        with pytest.raises(ValueError, match="NaN since a call that did not fit its plan"):
            at(400.0)
        handle.begin(TIMESTEPS)
        with pytest.raises(ValueError, match="timestep: got 700"):
            at(700.0)
        steps = torch.tensor(TIMESTEPS, device="cuda")
        handle.begin(TIMESTEPS)
        model(x, timestep=steps[0].expand(2), encoder_hidden_states=y)
        with pytest.raises(ValueError, match="timestep: got 500"):
            model(x, timestep=steps[3].expand(2), encoder_hidden_states=y)
