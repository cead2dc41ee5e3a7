"""Loading of video autoencoders: official layouts, strictness, other families, bad settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from pab_kernels.models import autoencoders
from pab_kernels.models.hosts.tiles import Tiling, chunks, over_space
from tests.vae_tools import TINY_VAE, tiny_vae

FAMILIES = list(TINY_VAE)


def save_vae(family: str, folder: Path) -> Any:
    """As its authors publish it; returns the model."""
    vae = tiny_vae(family)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in vae.state_dict().items()}
    if family == "open_sora":
        save_file(state, folder / "model.safetensors")
    else:
        ema = {f"module.{name}": value for name, value in state.items()}
        ema["module.loss.logvar"] = torch.zeros(1)
        torch.save({"epoch": 3, "state_dict": {"gen_model": {}}, "ema_state_dict": ema}, folder / "checkpoint.ckpt")
    config = {**autoencoders.FULL_SIZE[family], **TINY_VAE[family], "_class_name": "X", "hidden_unknown": 3}
    (folder / "config.json").write_text(json.dumps(config))
    return vae


def load(family: str, source: Path | str) -> Any:
    return autoencoders.load(family, source, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_official_folders_load(family, tmp_path):
    vae = save_vae(family, tmp_path / "weights" / "vae")
    loaded = load(family, tmp_path / "weights")
    for name, value in vae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    latents = torch.randn(1, 4, 2, 2, 2)
    assert torch.equal(loaded.decode(latents), vae.decode(latents))
    assert getattr(loaded, "tiling", None) == autoencoders.TILINGS.get(family)


def test_the_generator_is_taken_where_there_is_no_average(tmp_path):
    vae = tiny_vae("open_sora_plan_v120")
    config = {**autoencoders.FULL_SIZE["open_sora_plan_v120"], **TINY_VAE["open_sora_plan_v120"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {"gen_model": vae.state_dict(), "dics_model": {"weight": torch.zeros(2)}}
    torch.save({"state_dict": state, "ema_state_dict": {}}, tmp_path / "checkpoint.ckpt")
    loaded = load("open_sora_plan_v120", tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in vae.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("other", FAMILIES)
def test_folders_of_another_family_are_refused(family, other, tmp_path):
    if family == other:
        return
    save_vae(other, tmp_path)
    with pytest.raises(ValueError, match=f"vae: .* holds {other}, must hold the one of {family}"):
        load(family, tmp_path)


def test_folders_of_other_things_are_refused(tmp_path):
    image: Any = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2)
    image.save_pretrained(tmp_path / "image")
    with pytest.raises(ValueError, match="holds an image autoencoder of diffusers"):
        load("open_sora", tmp_path / "image")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no video autoencoder"):
        load("open_sora", tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        load("open_sora", tmp_path / "absent")
    with pytest.raises(ValueError, match="family is 'latte'"):
        load("latte", tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_size": 64}, "does not fit CausalVAE:\nwrong shape"),
        ({"num_res_blocks": 2}, "missing .*block.1"),
        ({"num_res_blocks": 10**6}, "must be 1 to 8 and 1 to 32|must be a whole number"),
        ({"hidden_size": 33}, "make no autoencoder"),
        ({"hidden_size_mult": 3}, "make no autoencoder"),
        ({"hidden_size_mult": [2, 1]}, "decoder_spatial_upsample|must be one for each of 2"),
        ({"decoder_attention": "AttnBlock3D"}, "a block is 'AttnBlock3D', but this host only has AttnBlock3DFix there"),
        ({"attn_resolutions": [16]}, "attn_resolutions is"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(change, match, tmp_path):
    save_vae("open_sora_plan_v110", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match):
        load("open_sora_plan_v110", tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"vae_temporal": {"type": "VAE_Temporal_XL"}}, "vae_temporal_type is 'VAE_Temporal_XL'"),
        ({"vae_temporal": {"filters": 8, "depth": 2}}, "vae_temporal: got depth"),
        ({"cal_loss": True}, "cal_loss is True"),
        ({"vae_2d": {"type": "VideoAutoencoderKLTemporalDecoder"}}, "vae_2d_type"),
    ],
    ids=str,
)
def test_settings_of_open_sora_that_do_not_fit_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        autoencoders.build("open_sora", **{**TINY_VAE["open_sora"], **change})


def test_samples_come_from_a_seed():
    for family in FAMILIES:
        vae, video = tiny_vae(family), torch.rand(1, 3, 5, 16, 16) * 2 - 1
        first, again, other = (vae.encode(video, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        mean = vae.encode(video)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert not torch.equal(first, mean)
        assert first.shape == mean.shape


def test_chunks_share_a_frame():
    assert chunks(17, 17) == [(0, 17)]
    assert chunks(18, 17) == [(0, 17), (16, 18)]
    assert chunks(15, 8) == [(0, 8), (7, 15)]
    assert chunks(1, 8) == [(0, 1)]


def test_tiles_blend_into_what_is_there():
    x = torch.arange(6.0).view(1, 1, 1, 1, 6).expand(1, 1, 1, 6, 6)
    doubled = over_space(lambda tile: tile.repeat_interleave(2, 3).repeat_interleave(2, 4), x, 4, 3, 2, 6)
    assert torch.equal(doubled, x.repeat_interleave(2, 3).repeat_interleave(2, 4))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"tile_latent_min_size": 0}, "tile_latent_min_size: got 0"),
        ({"tile_latent_min_size_t": 1}, "tile_latent_min_size_t: got 1, must be at least 2"),
        ({"tile_overlap_factor": 1.0}, "tile_overlap_factor: got 1.0"),
    ],
)
def test_tiles_that_cannot_be_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        Tiling(**settings)


def test_tiles_that_overlap_by_a_part_of_a_latent_are_warned_of(caplog):
    vae = tiny_vae("open_sora_plan_v120")
    vae.tiling = Tiling(32, 4, 29, 8, 0.125)
    assert "overlap by a part of one" in caplog.text
    assert vae.decode(torch.randn(1, 4, 1, 2, 10)).shape[-1] == 92  # as the original
