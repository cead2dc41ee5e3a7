"""Slots in host memory give the numbers of slots on the device, whenever the copies come; MLP slots share memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pab_kernels import PABConfig, Schedule, accelerate
from pab_kernels.plain import PlainPAB
from pab_kernels.runtime import cache, slots
from pab_kernels.runtime.cache import BroadcastCache, SlotPool
from pab_kernels.runtime.plan import storage
from pab_kernels.runtime.slots import STAGES, HostSlots, SlotKey, SlotLayout
from tests.latte_tools import call, inputs, tiny_latte

TIMESTEPS = [900.0, 700.0, 600.0, 500.0, 400.0, 50.0]


def attention(**ranges: int) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for kind, every in ranges.items():
        settings |= {f"{kind}_broadcast": True, f"{kind}_threshold": (100, 800), f"{kind}_range": every}
    return settings


MLP = {"mlp_broadcast": True, "mlp_threshold": (100, 800), "mlp_range": 2}
WINDOWS: dict[str, Any] = {
    "mlp_broadcast": True,
    "mlp_spatial_broadcast_config": {900: {"block": [0], "skip_count": 1}, 600: {"block": [1], "skip_count": 1}},
    "mlp_temporal_broadcast_config": {600: {"block": [0], "skip_count": 2}},
}
TWICE: dict[str, Any] = {
    "mlp_broadcast": True,
    "mlp_spatial_broadcast_config": {900: {"block": [0, 1], "skip_count": 2}, 700: {"block": [0], "skip_count": 3}},
}
SECOND_BLOCK = {f"{kind}_block": (1, 2) for kind in ("spatial", "cross")}
CONFIGS = {
    name: PABConfig.from_dict(settings)
    for name, settings in {
        "all at once": attention(spatial=2, temporal=2, cross=2) | MLP,
        "staggered": attention(spatial=2, temporal=3, cross=4) | MLP,
        "attention": attention(spatial=2, temporal=4, cross=3),
        "cross": attention(cross=2),
        "one slot": attention(spatial=2) | SECOND_BLOCK,
        "two slots": attention(spatial=2, cross=2) | SECOND_BLOCK,
        "mlp": MLP,
        "mlp by timestep": attention(spatial=2) | WINDOWS,
        "mlp kept twice": TWICE,
    }.items()
}


class LateCopies:
    """A copy stream whose copies come as late as they may: when somebody waits for one, or at the join."""

    def __init__(self, device: torch.device) -> None:
        self._pending: list[Callable[[], object]] = []
        self._done = 0

    def fork(self) -> None:
        pass

    def join(self) -> None:
        self._run_to(len(self._pending))

    def copy(self, to: Tensor, source: Tensor, after: Any) -> Any:
        def run() -> None:
            if after is not None:
                after.wait()
            to.copy_(source)

        self._pending.append(run)
        return _End(self, len(self._pending))

    def _run_to(self, end: int) -> None:
        while self._done < end:
            self._done += 1
            self._pending[self._done - 1]()


class _End:
    def __init__(self, stream: LateCopies, end: int) -> None:
        self._stream, self._end = stream, end

    def wait(self) -> None:
        self._stream._run_to(self._end)


def run(model: Any, begin: Callable[[list[float]], object], timesteps: list[float] = TIMESTEPS) -> Tensor:
    begin(timesteps)
    latents, text = inputs()
    steps = []
    for t in timesteps:
        latents = latents - 0.1 * call(model, latents, text, t)[:, :4]
        steps.append(latents)
    return torch.stack(steps)


@pytest.fixture
def on_host(monkeypatch):
    """A CPU's slots behind staging tensors, as a GPU's slots in host memory."""
    monkeypatch.setattr(cache, "DeviceSlots", HostSlots)


@pytest.mark.parametrize("copies", ["at once", "late"])
@pytest.mark.parametrize("name", CONFIGS)
def test_host_slots_give_the_numbers_of_device_slots(name, copies, monkeypatch):
    model = tiny_latte()
    with accelerate(model, CONFIGS[name]) as handle:
        expected = run(model, handle.begin)
    monkeypatch.setattr(cache, "DeviceSlots", HostSlots)
    if copies == "late":
        monkeypatch.setattr(slots, "CopyStream", LateCopies)
    with accelerate(model, CONFIGS[name]) as handle:
        for _ in range(2):
            assert torch.equal(run(model, handle.begin), expected)
        report = handle.report()
    count = len(set(storage_of(model, CONFIGS[name]).values()))
    assert report.host_bytes == count * slot_bytes()
    gates = report.cache_bytes - min(STAGES, count) * slot_bytes()
    assert 0 <= gates < slot_bytes(), "all else on the device are the gates"


def slot_bytes() -> int:
    batch, frames, tokens, channels = 2, 3, 16, 16
    return batch * frames * tokens * channels * 4


def storage_of(model: Any, config: PABConfig, timesteps: list[float] = TIMESTEPS) -> dict[SlotKey, int]:
    with accelerate(model, config) as handle:
        return storage(handle._adapter.stack, Schedule(config, timesteps))


def test_a_step_that_fails_leaves_the_staging_tensors_usable(on_host, monkeypatch):
    model = tiny_latte()
    monkeypatch.setattr(slots, "CopyStream", LateCopies)
    with accelerate(model, CONFIGS["staggered"]) as handle:
        expected = run(model, handle.begin)
        with monkeypatch.context() as patch:
            patch.setattr("pab_kernels.blocks.branches.cross_attention", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(model, handle.begin)
        assert torch.equal(run(model, handle.begin), expected)


def test_too_little_host_memory_is_told_before_it_is_taken(on_host, monkeypatch):
    monkeypatch.setattr(slots, "available_host_memory", lambda: 2**20)
    key = SlotKey("cross", 0)
    device = torch.device("cpu")
    with pytest.raises(MemoryError, match=r"needs 4\.0 GiB of host memory for 1 slots of .*; 0\.0 GiB are available"):
        BroadcastCache({key: 0}, SlotLayout((1, 1, 2**20, 2**10), torch.float32), device, device)


@pytest.mark.parametrize("asked", ["cuda", "gpu", "cuda:1", "meta"])
def test_slots_lie_on_the_transformers_device_or_the_cpu(asked):
    with pytest.raises(ValueError, match=f"cache_device: got '{asked}', must be cpu"):
        accelerate(tiny_latte(), PABConfig(), cache_device=asked)


@pytest.mark.parametrize("asked", [None, "cpu", torch.device("cpu")])
def test_on_a_cpu_host_slots_are_the_slots(asked):
    model = tiny_latte()
    with accelerate(model, CONFIGS["staggered"], cache_device=asked) as handle:
        run(model, handle.begin)
        assert handle.report().host_bytes == 0


# MLP slots that share memory


def test_mlp_slots_of_different_windows_share_memory_and_give_the_plain_forms_numbers():
    model = tiny_latte()
    config = PABConfig.from_dict(WINDOWS)
    storage = storage_of(model, config)
    # Spatial blocks stand at positions 0 and 2, temporal at 1 and 3. Blocks 1 and 0 of 600 are alive together.
    assert storage == {SlotKey("mlp_spatial", 0): 0, SlotKey("mlp_temporal", 1): 0, SlotKey("mlp_spatial", 2): 1}
    with PlainPAB(model, config) as plain:
        expected = run(model, plain.begin)
    with accelerate(model, config) as handle:
        torch.testing.assert_close(run(model, handle.begin), expected, atol=2e-5, rtol=2e-5)
        assert handle.caches[0].slots.nbytes == 2 * slot_bytes()
    assert (expected - run(model, lambda _: None)).abs().max() > 1e-3, "the config must really broadcast"


def test_a_run_with_other_timesteps_gets_slots_of_its_own():
    """Here the windows overlap, so that the memory of the first run does not do."""
    model, config, timesteps = tiny_latte(), PABConfig.from_dict(WINDOWS), [900.0, 600.0, 500.0, 50.0]
    expected = []
    for ts in (TIMESTEPS, timesteps):
        with PlainPAB(model, config) as plain:
            expected.append(run(model, plain.begin, ts))
    assert len(set(storage_of(model, config, timesteps).values())) == 3
    with accelerate(model, config) as handle:
        for ts, want in ((TIMESTEPS, expected[0]), (timesteps, expected[1]), (TIMESTEPS, expected[0])):
            torch.testing.assert_close(run(model, handle.begin, ts), want, atol=2e-5, rtol=2e-5)


def test_windows_whose_timesteps_do_not_occur_have_no_slots():
    config = PABConfig.from_dict(
        {"mlp_broadcast": True, "mlp_spatial_broadcast_config": {901: {"block": [0], "skip_count": 1}}}
    )
    with pytest.warns(UserWarning, match="901"):
        assert storage_of(tiny_latte(), config) == {}


def test_a_slot_overwritten_by_its_sharer_is_not_read():
    one, two = SlotKey("mlp_spatial", 0), SlotKey("mlp_spatial", 1)
    device = torch.device("cpu")
    shared = BroadcastCache({one: 0, two: 0}, SlotLayout((1, 1, 2, 4), torch.float32), device, device)
    shared.mark_written([one])
    shared.require([one])
    shared.mark_written([two])
    shared.require([two])
    with pytest.raises(ValueError, match="slot mlp_spatial of block 0: read before"):
        shared.require([one])
    shared.invalidate()
    with pytest.raises(ValueError, match="slot mlp_spatial of block 1: read before"):
        shared.require([two])


def test_caches_of_a_pool_use_the_same_slots_in_turn():
    pool, device, key = SlotPool(), torch.device("cpu"), SlotKey("spatial", 0)

    def cache(forward: str, channels: int = 4) -> BroadcastCache:
        layout = SlotLayout((1, 1, 2, channels), torch.float32)
        return BroadcastCache({key: 0}, layout, device, device, pool=pool, forward=forward)

    first, second, other, wider = cache("cond"), cache("cond"), cache("uncond"), cache("cond", 8)
    assert first.slots is second.slots
    assert len({id(each.slots) for each in (first, other, wider)}) == 3
    first.mark_written([key])
    first.require([key])
    other.mark_written([key])
    first.require([key])
    with pytest.raises(ValueError, match="slot spatial of block 0: read before"):
        second.require([key])
    second.mark_written([key])
    second.require([key])
    with pytest.raises(ValueError, match="slot spatial of block 0: read before"):
        first.require([key])
    first.mark_written([])  # a step that writes nothing takes nothing away
    second.require([key])
    first.mark_written([key])
    first.require([key])


def test_slots_of_a_pool_go_with_the_last_cache_that_has_them():
    pool, device, key = SlotPool(), torch.device("cpu"), SlotKey("spatial", 0)
    caches = [
        BroadcastCache({key: 0}, SlotLayout((1, 1, 2, 4), torch.float32), device, device, pool=pool) for _ in range(2)
    ]
    slots = weakref.ref(caches[0].slots)
    caches.pop()
    gc.collect()
    assert slots() is not None
    caches.pop()
    gc.collect()
    assert slots() is None


# On a GPU

LAYERS = 3


def gpu_run(model: Any, handle: Any, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    x, y = torch.randn(2, 4, 16, 64, 64, **options), torch.randn(2, 60, 4096, **options)
    handle.begin(TIMESTEPS)
    outputs = []
    for t in torch.tensor(TIMESTEPS, device="cuda"):
        outputs.append(model(x, timestep=t.expand(2), encoder_hidden_states=y, return_dict=False)[0])
        x = x - 0.1 * outputs[-1][:, :4]
    return torch.stack(outputs)


def gpu_latte() -> Any:
    from pab_kernels.models.checkpoints import random_weights

    model: Any = random_weights("latte", dtype=torch.bfloat16, device="cuda", seed=0, num_layers=LAYERS)
    return model.eval().requires_grad_(False)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("name", CONFIGS)
def test_on_a_gpu_host_slots_give_the_bits_of_device_slots_in_less_memory(name, cuda_graphs, device):
    model = gpu_latte()
    results, peaks, reports = [], [], []
    for cache_device in (None, "cpu"):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with accelerate(model, CONFIGS[name], cuda_graphs=cuda_graphs, cache_device=cache_device) as handle:
            # Every variant comes up several times, so that graphs are captured and replayed back to back.
            results.append(torch.stack([gpu_run(model, handle, seed).cpu() for seed in (0, 0, 1, 2)]))
            reports.append(handle.report())
            assert reports[-1].eager == (None if cuda_graphs else "switched off")
        peaks.append(torch.cuda.max_memory_allocated())
    assert results[0].isfinite().all()
    assert torch.equal(*results)
    slot = 2 * 16 * 1024 * 1152 * 2
    count = reports[1].host_bytes // slot
    saved = reports[0].cache_bytes - reports[1].cache_bytes
    assert saved == max(count - STAGES, 0) * slot
    assert peaks[0] - peaks[1] >= 0.95 * saved - 2**20


@pytest.mark.gpu
def test_on_a_gpu_closing_takes_no_more_memory_than_running(device):
    """The weights are there twice while they are given back, so the slots must be gone by then."""
    model = gpu_latte()
    with accelerate(model, CONFIGS["staggered"]) as handle:
        gpu_run(model, handle)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    assert torch.cuda.max_memory_allocated() <= before


@pytest.mark.gpu
def test_on_a_gpu_the_loop_waits_for_no_copy_and_the_memory_is_unpinned_at_the_end(device):
    model = gpu_latte()
    generator = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    x, y = torch.randn(2, 4, 16, 64, 64, **options), torch.randn(2, 60, 4096, **options)
    steps = torch.tensor(TIMESTEPS, device="cuda")
    with accelerate(model, CONFIGS["staggered"], cache_device="cpu") as handle:
        for _ in range(3):
            gpu_run(model, handle)
        handle.begin(TIMESTEPS)
        model(x, timestep=steps[0].expand(2), encoder_hidden_states=y)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for t in steps[1:]:
                model(x, timestep=t.expand(2), encoder_hidden_states=y)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        store = handle.caches[0].slots
        assert isinstance(store, HostSlots)
        value = next(iter(store._values.values()))
        assert value.is_pinned()
        del store
    assert not value.is_pinned()
