"""Loading checkpoints: every accepted layout, and an error for everything that does not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pab_kernels.models.checkpoints import CLASSES, FULL_SIZE, HUB_IDS, SIZES, build, load, random_weights

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
FAMILIES = tuple(CLASSES)
RECORDED = FAMILIES[:4]
"""Those of which there is a run of the original; Wan and LTX-Video are diffusers' own."""
SMALL: dict[str, Any] = {"depth": 1, "hidden_size": 24, "num_heads": 2, "caption_channels": 16}
F32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}

State = dict[str, torch.Tensor]


@pytest.fixture
def state() -> State:
    """Tensors of a small Open-Sora checkpoint."""
    return dict(random_weights("open_sora", **F32, **SMALL).state_dict())


def assert_holds(model: torch.nn.Module, state: State, dtype: torch.dtype = torch.float32) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert loaded[name].dtype == dtype, name
        torch.testing.assert_close(loaded[name], value.to(dtype), rtol=0, atol=0)
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))
    assert all(value.dtype == dtype for value in model.buffers())
    assert not model.training


@pytest.mark.parametrize("family", RECORDED)
def test_loads_the_recorded_weights(family: str, tmp_path: Path) -> None:
    with safe_open(GOLDENS / f"{family}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["model_config"])
        state = {key[6:]: file.get_tensor(key) for key in file.keys() if key.startswith("state.")}  # noqa: SIM118
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "Model", "dropout": 0.0, **config}))
    assert_holds(load(family, tmp_path, **F32), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casts_to_the_asked_dtype(dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "model.safetensors")
    assert_holds(load("open_sora", tmp_path, dtype=dtype, device="cpu", **SMALL), state, dtype)


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "pytorch_model.bin"])
def test_loads_torch_files(name: str, state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / name)
    assert_holds(load("open_sora", tmp_path / name, **F32, **SMALL), state)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_loads_shards(suffix: str, state: State, tmp_path: Path) -> None:
    names = sorted(state)
    weight_map = {name: f"model-{i % 3}-of-3.{suffix}" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        part = {name: state[name] for name in names if weight_map[name] == shard}
        save_file(part, tmp_path / shard) if suffix == "safetensors" else torch.save(part, tmp_path / shard)
    (tmp_path / f"model.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_holds(load("open_sora", tmp_path, **F32, **SMALL), state)

    (tmp_path / f"model-1-of-3.{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match="model-1-of-3"):
        load("open_sora", tmp_path, **F32, **SMALL)


def test_loaded_weights_do_not_lean_on_the_file(state: State, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(state, file)
    model = load("open_sora", file, **F32, **SMALL)
    file.write_bytes(bytes(file.stat().st_size))
    assert_holds(model, state)


def test_finds_the_transformer_folder_of_a_pipeline(state: State, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    save_file(state, tmp_path / "transformer" / "model.safetensors")
    assert_holds(load("open_sora", tmp_path, **F32, **SMALL), state)


def test_overrides_beat_config_json(state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "input_sq_size": 256, "drop_path": 0.0}))
    with caplog.at_level("INFO"):
        model: Any = load("open_sora", tmp_path, input_sq_size=128, **F32)
    assert model.input_sq_size == 128
    assert "no effect here: drop_path" in caplog.text


def test_lists_every_difference(state: State, tmp_path: Path) -> None:
    del state["t_block.1.bias"]
    state["extra.weight"] = torch.zeros(2)
    state["final_layer.linear.bias"] = torch.zeros(3)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit STDiT3") as error:
        load("open_sora", tmp_path, **F32, **SMALL)
    assert str(error.value).splitlines()[1:] == [
        "missing (1): t_block.1.bias",
        "unexpected (1): extra.weight",
        "wrong shape (1): final_layer.linear.bias is [3], must be [32]",
    ]


def test_counts_long_differences(state: State, tmp_path: Path) -> None:
    save_file({f"spatial_blocks.{i}": torch.zeros(1) for i in range(25)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="and 15 more") as error:
        load("open_sora", tmp_path, **F32, **SMALL)
    assert f"missing ({len(state)})" in str(error.value)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize("holds", FAMILIES)
@pytest.mark.parametrize("asked", FAMILIES)
def test_names_the_family_of_a_strange_checkpoint(asked: str, holds: str, tmp_path: Path) -> None:
    if asked == holds or {asked, holds} == {"wan_2_1", "wan_2_2"}:
        return
    state = {name: torch.zeros(1) for name in build(holds).state_dict()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"family .*'{holds}'.*, not '{asked}'"):
        load(asked, tmp_path, **F32)


def test_refuses_pickles_that_hold_more_than_tensors(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1), "code": Path("x")}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="more than tensors"):
        load("open_sora", tmp_path, **F32)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_refuses_damaged_files(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=name):
        load("open_sora", tmp_path, **F32)


def test_refuses_unclear_sources(state: State, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights file"):
        load("open_sora", tmp_path, **F32)
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        load("open_sora", "weights/model.safetensors", **F32)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"must end in one of \.safetensors"):
        load("open_sora", tmp_path / "notes.txt", **F32)
    for name in ("a", "b"):
        save_file(state, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors, b\.safetensors"):
        load("open_sora", tmp_path, **F32)


def test_refuses_unknown_families_and_dtypes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="family is 'sora', must be one of open_sora"):
        load("sora", tmp_path, **F32)
    with pytest.raises(TypeError, match="must be a floating"):
        load("open_sora", tmp_path, dtype=torch.int64, device="cpu")


@pytest.mark.parametrize("source", ["owner/name", "owner/name/sub/folder"])
def test_loads_from_the_hub(source: str, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path.joinpath(*source.split("/")[2:])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors")
    asked = []

    def download(repo: str, **kwargs: Any) -> str:
        asked.append((repo, kwargs["allow_patterns"][0]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_holds(load("open_sora", source, **F32, **SMALL), state)
    assert asked == [("owner/name", "sub/folder/*.safetensors*" if "sub" in source else "*.safetensors*")]


def test_says_what_to_download_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FileNotFoundError, match="no route to the hub") as error:
        load("latte", HUB_IDS["latte"], **F32)
    assert "hf download maxin-cn/Latte-1 --include 'transformer/*' --local-dir DIR" in str(error.value)
    assert "pass DIR/transformer as source" in str(error.value)


@pytest.mark.parametrize(
    ("family", "millions", "keys"),
    [
        ("open_sora", 1208, ["spatial_blocks.27.cross_attn.kv_linear.weight", "temporal_blocks.0.attn.q_norm.weight"]),
        ("latte", 1057, ["temporal_transformer_blocks.27.ff.net.0.proj.weight", "adaln_single.linear.bias"]),
        ("open_sora_plan_v110", 1057, ["transformer_blocks.27.attn2.to_out.0.bias", "scale_shift_table"]),
        ("open_sora_plan_v120", 2772, ["transformer_blocks.31.attn1.to_q.weight", "caption_projection.linear_2.bias"]),
        ("wan_2_1", 1419, ["blocks.29.attn2.norm_k.weight", "condition_embedder.time_embedder.linear_1.weight"]),
        ("wan_2_2", 5000, ["blocks.29.norm2.bias", "condition_embedder.time_proj.weight"]),
        ("ltx", 1923, ["transformer_blocks.27.attn1.norm_q.weight", "time_embed.linear.bias"]),
    ],
)
def test_full_size_models_on_the_meta_device(family: str, millions: int, keys: list[str]) -> None:
    random_state = torch.get_rng_state()
    model = build(family)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert set(keys) <= model.state_dict().keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_small_copies_of_the_full_layout_load(family: str, tmp_path: Path) -> None:
    """Same keys as at full size, but for the number of blocks, through a file."""
    full = build(family).state_dict().keys()
    one_layer: dict[str, Any] = {"depth" if family == "open_sora" else "num_layers": 1}
    one_layer["text_dim" if family.startswith("wan") else "caption_channels"] = 16
    narrow: dict[str, Any] = {"num_attention_heads": 1}
    if not family.startswith("wan"):
        narrow["cross_attention_dim"] = FULL_SIZE[family].get("attention_head_dim")
    config = {**one_layer, **({"hidden_size": 32} if family == "open_sora" else narrow)}
    state = dict(random_weights(family, **F32, **config).state_dict())
    assert {key for key in full if not re.search(r"blocks\.[1-9]", key)} == state.keys()
    save_file(state, tmp_path / "model.safetensors")
    assert_holds(load(family, tmp_path, **F32, **config), state)


@pytest.mark.parametrize("family", FAMILIES)
def test_meta_models_have_the_buffers_of_real_ones(family: str) -> None:
    config = {**FULL_SIZE[family], "depth" if family == "open_sora" else "num_layers": 1}
    real, meta = dict(CLASSES[family](**config).named_buffers()), dict(build(family, **config).named_buffers())
    assert real.keys() == meta.keys()
    for name, value in real.items():
        torch.testing.assert_close(meta[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "size", "billions"),
    [("wan_2_1", "14b", 14.3), ("wan_2_1", "i2v-14b", 16.4), ("wan_2_2", "14b", 14.3), ("wan_2_2", "i2v-14b", 14.3)],
)
def test_other_sizes(family: str, size: str, billions: float) -> None:
    model = build(family, **SIZES[family][size])
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 1) == billions


def test_parts_of_wan_stay_in_float32() -> None:
    small: dict[str, Any] = {"num_attention_heads": 1, "num_layers": 1, "ffn_dim": 32, "text_dim": 16}
    model = random_weights("wan_2_1", dtype=torch.bfloat16, device="cpu", **small)
    wide = {name for name, value in model.named_parameters() if value.dtype == torch.float32}
    assert wide == {
        "scale_shift_table",
        "blocks.0.scale_shift_table",
        *(f"blocks.0.norm2.{part}" for part in ("weight", "bias")),
        *(f"condition_embedder.time_embedder.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")),
    }
    assert {value.dtype for value in model.buffers()} == {torch.float32}, "the rotary tables"
    assert model.get_parameter("blocks.0.attn1.norm_q.weight").eq(1).all()


def test_random_weights_depend_on_the_seed_alone() -> None:
    one, same, other = (random_weights("open_sora", **F32, **SMALL, seed=seed) for seed in (0, 0, 1))
    assert_holds(one, dict(same.state_dict()))
    assert not torch.equal(one.state_dict()["t_block.1.weight"], other.state_dict()["t_block.1.weight"])
