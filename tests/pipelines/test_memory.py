"""Memory told from shapes alone: against the published slot sizes, and against what a run really holds."""

import dataclasses
from typing import Any

import pytest
import torch

from pab_kernels import PABConfig, accelerate
from pab_kernels.pipelines.memory import ModelShape, PlannedRun, check_fits, estimate, gib, smaller_runs
from pab_kernels.pipelines.sizes import family_size, model_size, open_sora_size
from pab_kernels.runtime import cache
from pab_kernels.runtime.slots import STAGES, HostSlots
from tests.pipeline_tools import SMALLEST, TINY, tiny_pipeline


def planned(family: str, *, rows: int = 2, config: PABConfig | None = None, **size: Any) -> PlannedRun:
    video = family_size(family, **size)
    assert video is not None
    config = PABConfig.preset(family) if config is None else config
    return PlannedRun.of(family, video, config, rows // 2, model_size(family, size.get("size")))


@pytest.mark.parametrize(
    ("family", "size", "expected"),
    [
        ("open_sora", {"resolution": "144p"}, 1.0),
        ("open_sora", {"resolution": "240p"}, 2.9),
        ("open_sora", {"resolution": "360p"}, 6.6),
        ("open_sora", {"resolution": "480p"}, 11.5),
        ("open_sora", {"resolution": "720p"}, 26.0),
        ("open_sora", {"resolution": "480p", "duration": "8s"}, 45.9),
        ("latte", {}, 5.9),
        ("open_sora_plan_v110", {"size": "65x512x512"}, 6.3),
        ("open_sora_plan_v120", {"size": "29x480p"}, 5.3),
        ("open_sora_plan_v120", {"size": "93x480p"}, 15.8),
        # Computed: blocks x 2 branches x 2 forwards x tokens x channels x 2 bytes; for LTX-Video one forward of 2 rows.
        ("wan_2_1", {}, 30 * 2 * 2 * 32760 * 1536 * 2 / 2**30),
        ("wan_2_1", {"size": "14b", "resolution": "720p"}, 40 * 2 * 2 * 75600 * 5120 * 2 / 2**30),
        ("wan_2_2", {}, 30 * 2 * 2 * 27280 * 3072 * 2 / 2**30),
        ("wan_2_2", {"size": "14b", "resolution": "480p"}, 40 * 2 * 2 * 32760 * 5120 * 2 / 2**30),
        ("ltx", {}, 28 * 2 * 2 * 6930 * 2048 * 2 / 2**30),
    ],
)
def test_slots_have_the_known_sizes(family, size, expected):
    assert gib(estimate(planned(family, **size)).slots) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("family", "billions"),
    [
        ("open_sora", 1.208),
        ("latte", 1.057),
        ("open_sora_plan_v110", 1.057),
        ("open_sora_plan_v120", 2.772),
        ("wan_2_1", 1.419),
        ("wan_2_2", 5.0),
        ("ltx", 1.923),
    ],
)
def test_weights_have_the_size_of_the_released_models(family, billions):
    assert estimate(planned(family)).weights / 2e9 == pytest.approx(billions, rel=0.01)


def test_fp8_slots_are_what_makes_14b_at_720p_fit():
    """An H200 has 139 GiB. Wan 2.2's two transformers lie there together, and one has slots at a time."""
    h200 = 139 * 2**30
    large = planned("wan_2_1", size="14b", resolution="720p")
    with pytest.raises(ValueError, match=r"needs 152\.\d GiB .*; --cache-dtype fp8 \(95\.\d GiB\)"):
        check_fits(large, h200)
    check_fits(dataclasses.replace(large, config=dataclasses.replace(large.config, cache_dtype="fp8")), h200)
    pair = estimate(planned("wan_2_2", size="14b", resolution="720p"))
    assert pair.weights == pytest.approx(2 * estimate(large).weights, rel=1e-3)
    assert pair.slots == estimate(large).slots


def test_an_image_has_keys_and_values_too():
    text, image = (estimate(planned("wan_2_1", size=size)).text for size in ("14b", "i2v-14b"))
    assert image / text == pytest.approx((512 + 257) / 512)


@pytest.mark.parametrize(
    ("family", "options", "latent"),
    [
        ("wan_2_1", {}, (21, 60, 104)),
        ("wan_2_1", {"size": "i2v-14b", "resolution": "720p"}, (21, 90, 160)),
        ("wan_2_2", {}, (31, 44, 80)),
        ("wan_2_2", {"size": "14b"}, (21, 90, 160)),
        ("ltx", {}, (21, 15, 22)),
        ("ltx", {"resolution": "704p"}, (16, 22, 38)),
    ],
)
def test_latents_of_diffusers_families(family, options, latent):
    size = family_size(family, **options)
    assert size is not None
    assert size.latent == latent


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("wan_2_1", {"size": "5b"}, "size: got '5b', must be one of 1.3b, 14b, i2v-14b"),
        ("wan_2_1", {"resolution": "144p"}, "resolution: got '144p', must be one of 480p, 720p"),
        ("ltx", {"size": "2b"}, "size: got '2b' for ltx, which does not take it: it takes --resolution"),
    ],
)
def test_sizes_that_diffusers_families_do_not_have(family, options, message):
    with pytest.raises(ValueError, match=message):
        family_size(family, **options)


def test_kinds_and_blocks_that_never_broadcast_have_no_slots():
    full = estimate(planned("open_sora"))
    off = estimate(planned("open_sora", config=PABConfig()))
    assert full.slot_count == 112
    assert off.slot_count == 0
    assert off.slots == 0
    assert off.total == full.total - full.slots
    some = PABConfig(spatial_broadcast=True, spatial_threshold=(450, 930), spatial_range=2, spatial_block=(0, 7))
    assert estimate(planned("open_sora", config=some)).slot_count == 7


@pytest.mark.parametrize("on_host", [False, True], ids=["device", "host"])
@pytest.mark.parametrize("family", ["open_sora", "open_sora_plan_v110", "open_sora_plan_v120"])
def test_what_a_run_holds_is_what_was_told(family, on_host, monkeypatch):
    if on_host:  # on a CPU: staging tensors as a GPU has them
        monkeypatch.setattr(cache, "DeviceSlots", HostSlots)
    pipe = tiny_pipeline(family)
    config = PABConfig.preset(family)
    size = open_sora_size(**SMALLEST) if family == "open_sora" else pipe.size()
    planned_run = PlannedRun(family, size, config, 4, torch.float32, on_host)
    told = estimate(planned_run, ModelShape.of(family, **TINY[family]))
    with accelerate(pipe, config) as handle:
        pipe(["a cat", "a dog"], num_inference_steps=4, **(SMALLEST if family == "open_sora" else {}))
        report = handle.report()
    assert told.slots == report.cache_bytes
    assert told.host == report.host_bytes
    assert (told.host > 0) == on_host
    assert told.slot_count == report.slots
    tensors = (*pipe.transformer.parameters(), *pipe.transformer.buffers())
    assert told.weights == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(
    ("windows", "slots"),
    [
        ([(700, [0], 3), (650, [0], 3)], 2),  # the second begins while the first still hands on
        ([(700, [0, 1], 1), (500, [2], 1)], 2),  # the second's slot lies where one of the first's was
        ([(700, [0], 1), (500, [0], 1)], 1),
        ([(123, [0], 1)], 0),
    ],
)
def test_mlp_slots_are_those_of_a_run_whose_timesteps_are_known(windows, slots):
    keyed = {t: {"block": blocks, "skip_count": skip} for t, blocks, skip in windows}
    config = PABConfig.from_dict({"mlp_broadcast": True, "mlp_spatial_broadcast_config": keyed})
    run = planned("open_sora", config=config, resolution="144p")
    assert estimate(run).slot_count == len({index for _, blocks, _ in windows for index in blocks})
    run = dataclasses.replace(run, timesteps=(750.0, 700.0, 650.0, 600.0, 550.0, 500.0, 450.0))
    assert estimate(run).slot_count == slots


def test_activations_grow_with_the_video():
    short, long = (estimate(planned("open_sora", duration=duration)).activations for duration in ("2s", "8s"))
    assert 3.5 < long / short < 4.5
    # Three streams, and the MLP's four or the QKV's three with attention's one.
    stream = 2 * 15 * 1590 * 1152 * 2
    assert 7 * stream < short < 7.2 * stream


def test_text_counts_for_each_row_and_block():
    one, two = (estimate(planned("open_sora", rows=rows)).text for rows in (2, 4))
    assert two == 2 * one
    assert one == 56 * 2 * 320 * 2 * 1152 * 2


def test_a_run_that_fits_is_let_through():
    run = planned("latte")
    assert check_fits(run, 80 * 2**30) == estimate(run)


def test_a_run_that_does_not_fit_is_refused_with_what_would():
    run = planned("open_sora", rows=4, resolution="480p", duration="8s")
    with pytest.raises(ValueError, match=r"needs 100\.\d GiB .*91.7 in 112 slots.* but 79.0 GiB are free") as refused:
        check_fits(run, 79 * 2**30)
    message = str(refused.value)
    for advice in ("--pab off", "one prompt at a time", "--duration 4s", "--resolution 360p", "no cross_broadcast"):
        assert advice in message
    assert "--duration 16s" not in message
    assert "_block of [0, 14]" in message


def test_slots_in_host_memory_are_a_remedy_where_the_host_has_room():
    run = planned("open_sora", resolution="480p", duration="8s")
    on_host = dataclasses.replace(run, cache_on_host=True)
    need, moved = estimate(run), estimate(on_host)
    assert moved.host == 112 * run.rows * 60 * 1590 * 1152 * 2
    assert moved.total == need.total - moved.host * (112 - STAGES) // 112
    room = need.total - 2**30
    with pytest.raises(
        ValueError, match=r"fit: --cache-device cpu \(\d+\.\d GiB and 45\.9 in host memory\); no spatial"
    ):
        check_fits(run, room, host_free=moved.host)
    with pytest.raises(ValueError, match="fit: no spatial"):
        check_fits(run, room, host_free=moved.host - 1)
    assert check_fits(on_host, room, host_free=moved.host) == moved
    with pytest.raises(ValueError, match=r"and 45\.9 GiB of host memory, of which 1\.0 are free.* fit: .*--pab off"):
        check_fits(on_host, 79 * 2**30, host_free=2**30)


def test_what_lies_beside_the_run_counts():
    run = planned("latte", config=PABConfig())
    free = estimate(run).total
    assert check_fits(run, free)
    with pytest.raises(ValueError, match=r"9\.0 others"):
        check_fits(run, free, extra=9 * 2**30)


def test_where_nothing_fits_the_refusal_says_so():
    with pytest.raises(ValueError, match="No smaller run of this family would fit"):
        check_fits(planned("open_sora_plan_v120", size="93x720p"), 2**30)


def test_smaller_runs_are_smaller():
    run = planned("open_sora", rows=4, duration="4s", aspect="1:1")
    model = ModelShape.of("open_sora")
    need = estimate(run, model).total
    names = [name for name, smaller in smaller_runs(run) if estimate(smaller, model).total < need]
    assert len(names) == len(list(smaller_runs(run)))
    assert "--duration 2s" in names
    assert "--resolution 480p" not in names
    assert not list(smaller_runs(planned("latte", config=PABConfig())))
