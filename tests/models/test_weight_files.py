"""Checkpoints of anyone: wrapped ones load, and every bad one is refused with file and key before anything is made."""

from __future__ import annotations

import json
import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pab_kernels.models import checkpoints, weight_files
from pab_kernels.models.checkpoints import load, random_weights

SMALL: dict[str, Any] = {"depth": 1, "hidden_size": 24, "num_heads": 2, "caption_channels": 16}
F32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
KEY = "t_block.1.bias"

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def whole() -> State:
    return {key: value.contiguous() for key, value in random_weights("open_sora", **F32, **SMALL).state_dict().items()}


@pytest.fixture
def state(whole: State) -> State:
    return dict(whole)


def loads(path: Path) -> State:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load("open_sora", path, **F32, **SMALL).state_dict()


def assert_equal(found: State, state: State) -> None:
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())


def renamed(state: State, name: Callable[[str], str]) -> State:
    return {name(key): value for key, value in state.items()}


@pytest.mark.parametrize(
    "name",
    [
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: f"_orig_mod.module.{key}",
        lambda key: f"model.module.{key}",
        lambda key: key.replace("spatial_blocks.0.", "spatial_blocks.0._orig_mod."),
        lambda key: key.replace("blocks.0.", "blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module."),
    ],
    ids=range(7),
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_names_of_wrappers_are_taken_off(name: Callable[[str], str], suffix: str, state: State, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(renamed(state, name), path)
    assert_equal(loads(path), state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda ema, other: {"ema": ema, "model": other, "opt": {"state": {}}, "step": 3},
        lambda ema, other: {"epoch": 3, "state_dict": ema, "args": {"lr": 1e-4, "name": "x"}},
        lambda ema, other: {"model": ema},
        lambda ema, other: {"module": renamed(ema, lambda key: f"module.{key}"), "lr": 1.0},
        lambda ema, other: {"ema": {}, "state_dict": ema},
        lambda ema, other: {key: torch.nn.Parameter(value) for key, value in ema.items()},
    ],
    ids=range(6),
)
def test_what_training_scripts_save_is_unwrapped(
    wrap: Callable[[State, State], Any], state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = {key: value + 1 for key, value in state.items()}
    document = wrap(state, other)
    torch.save(document, tmp_path / "model.pt")
    with caplog.at_level("INFO"):
        assert_equal(loads(tmp_path / "model.pt"), state)
    assert ("the weights are those of" in caplog.text) == (1 < len(document) < 5)


def test_the_only_folder_below_that_has_weights_is_taken(state: State, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for name in ("ema", "model"):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        if name == "ema":
            assert_equal(loads(tmp_path), state)
    with pytest.raises(ValueError, match="several folders of weights: ema, model; pass one of them"):
        loads(tmp_path)


def test_wrapped_names_that_collide_are_refused(state: State, tmp_path: Path) -> None:
    save_file({**state, f"_orig_mod.{KEY}": state[KEY].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{KEY} .*{KEY} without their wrappers"):
        loads(tmp_path)


# Tensors

BAD_TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "int64": lambda value: torch.zeros(value.shape, dtype=torch.int64),
    "bool": lambda value: torch.zeros(value.shape, dtype=torch.bool),
    "complex64": lambda value: torch.zeros(value.shape, dtype=torch.complex64),
    "float8_e4m3fn": lambda value: value.to(torch.float8_e4m3fn),
    "uint8": lambda value: torch.zeros(value.shape, dtype=torch.uint8),
}
BAD_TORCH_TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    **BAD_TENSORS,
    "quantized": lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
    "sparse": lambda value: value.to_sparse(),
    "meta": lambda value: value.to("meta"),
    "the file holds 4 bytes": lambda value: torch.zeros(1).expand(value.shape),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_other_than_floating_tensors_are_refused_in_safetensors(kind: str, state: State, tmp_path: Path) -> None:
    save_file({**state, KEY: BAD_TENSORS[kind](state[KEY])}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.safetensors: {KEY} is of dtype .*, must be one of F64, F32"):
        loads(tmp_path)


@pytest.mark.parametrize("kind", BAD_TORCH_TENSORS)
def test_other_than_plain_floating_tensors_are_refused_in_torch_files(kind: str, state: State, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about such tensors
        torch.save({**state, KEY: BAD_TORCH_TENSORS[kind](state[KEY])}, tmp_path / "model.pt")
        with pytest.raises(ValueError, match=r"model\.pt") as error:
            load("open_sora", tmp_path, **F32, **SMALL)
    assert KEY in str(error.value) or "more than tensors" in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_warned_of(value: float, state: State, tmp_path: Path) -> None:
    state[KEY] = state[KEY].clone()
    state[KEY][3] = value
    save_file(state, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=rf"model\.safetensors: not all numbers are finite in torch\.float32: {KEY}"):
        load("open_sora", tmp_path, **F32, **SMALL)


def test_weights_that_overflow_in_the_asked_dtype_are_warned_of(state: State, tmp_path: Path) -> None:
    save_file({**state, KEY: torch.full_like(state[KEY], 1e6)}, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=rf"finite in torch\.float16: {KEY}"):
        load("open_sora", tmp_path, dtype=torch.float16, device="cpu", **SMALL)


# Files

DOCUMENTS: dict[str, Any] = {
    "a list": [torch.zeros(1)],
    "a tensor": torch.zeros(1),
    "none": None,
    "empty": {},
    "keys that are numbers": {1: torch.zeros(1)},
    "keys that are pairs": {("a", "b"): torch.zeros(1)},
    "nothing known": {"net": {"a": torch.zeros(1)}, "step": 3},
    "too deep": {"state_dict": {"state_dict": {"a": torch.zeros(1)}}},
    "a mixture": {"a": torch.zeros(1), "b": 3},
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_torch_files_of_other_things_are_refused(name: str, tmp_path: Path) -> None:
    torch.save(DOCUMENTS[name], tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt must hold a dictionary"):
        load("open_sora", tmp_path, **F32, **SMALL)


def test_the_old_format_of_torch_is_named_and_the_way_out_works(state: State, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"model\.pt is in the format of torch before 1\.6.*torch\.save\(torch\.load"):
        loads(path)
    torch.save(torch.load(path, weights_only=True), path)
    assert_equal(loads(path), state)


class Evil:
    """A pickle that would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
def test_pickles_with_code_run_nothing(new: bool, state: State, tmp_path: Path) -> None:
    document = {**state, "x": Evil(tmp_path / "made")}
    torch.save(document, tmp_path / "model.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match=r"model\.pt"):
        loads(tmp_path / "model.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_cut_and_changed_files_never_end_otherwise(suffix: str, state: State, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    data = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=f"model{suffix}"):
            loads(path)
    path.write_bytes(bytes(len(data)))
    with pytest.raises(ValueError, match=f"model{suffix}"):
        loads(path)


HEADERS: dict[str, Any] = {
    "no object": [],
    "a shape that lies": {"a": {"dtype": "F32", "shape": [10**9, 10**6], "data_offsets": [0, 4]}},
    "a shape that overflows": {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}},
    "offsets beyond the end": {"a": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]}},
    "an unknown dtype": {"a": {"dtype": "F128", "shape": [1], "data_offsets": [0, 4]}},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 4]}},
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_safetensors_that_lie_are_refused(name: str, tmp_path: Path) -> None:
    header = json.dumps(HEADERS[name]).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        loads(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**40) + header + bytes(4))
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        loads(tmp_path)


# Shards


def shards(state: State, folder: Path, **changes: Any) -> Path:
    """Two shards and an index, with some entries of its weight_map changed."""
    folder.mkdir(exist_ok=True)
    names = sorted(state)
    weight_map: dict[str, Any] = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(names)}
    for shard in ("model-0.safetensors", "model-1.safetensors"):
        save_file({key: state[key] for key in names if weight_map[key] == shard}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map | changes}))
    return index


def test_an_index_leads_nowhere_else(state: State, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    save_file({KEY: state[KEY]}, elsewhere / "x.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.safetensors").symlink_to(elsewhere / "x.safetensors")
    (folder / "linked").symlink_to(elsewhere)
    for name in (
        "../elsewhere/x.safetensors",
        str(elsewhere / "x.safetensors"),
        "a/../../elsewhere/x.safetensors",
        "link.safetensors",
        "linked/x.safetensors",
        "../model/model-0.safetensors",
    ):
        shards(state, folder, **{KEY: name})
        with pytest.raises(ValueError, match=r"index\.json names '.*x?\.safetensors', which is not in its folder"):
            loads(folder)


def test_the_hubs_cache_of_links_is_followed(state: State, tmp_path: Path) -> None:
    blobs, folder = (
        tmp_path / "models--a--b" / "blobs",
        tmp_path / "models--a--b" / "snapshots" / "0123" / "transformer",
    )
    folder.mkdir(parents=True)
    blobs.mkdir()
    shards(state, folder)
    for i, shard in enumerate(folder.glob("*.safetensors")):
        shard.rename(blobs / str(i))
        shard.symlink_to(Path("..", "..", "..", "blobs", str(i)))
    assert_equal(loads(folder), state)


@pytest.mark.parametrize(
    "document",
    [
        "[]", "null", "3", "{}", '{"weight_map": null}', '{"weight_map": []}', '{"weight_map": {}}', "{", "\xff",
        '{"weight_map": {"a": 3}}', '{"weight_map": {"a": null}}', '{"weight_map": {"a": ["x.safetensors"]}}',
        '{"weight_map": {"a": ""}}', '{"weight_map": {"a": "."}}', '{"weight_map": {"a": "config.json"}}',
        '{"weight_map": {"a": "x\\u0000.safetensors"}}', "[" * 100_000,
    ],
)  # fmt: skip
def test_an_index_of_something_else_is_refused(document: str, state: State, tmp_path: Path) -> None:
    shards(state, tmp_path).write_text(document, encoding="latin-1")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        loads(tmp_path)


def test_shards_hold_what_the_index_says_and_nothing_twice(state: State, tmp_path: Path) -> None:
    first, second = sorted(state)[:2]
    shards(state, tmp_path / "a", **{first: "model-1.safetensors"})
    with pytest.raises(ValueError, match=rf"index\.json: {first} is not in model-1\.safetensors, where it should be"):
        loads(tmp_path / "a")
    shards(state, tmp_path / "b", absent="model-1.safetensors")
    with pytest.raises(ValueError, match=r"index\.json: absent is not in"):
        loads(tmp_path / "b")
    shards(state, tmp_path / "c")
    save_file({first: state[first], second: state[second]}, tmp_path / "c" / "model-1.safetensors")
    with pytest.raises(ValueError, match=rf"model-1\.safetensors: {first} is in model-0\.safetensors too"):
        loads(tmp_path / "c")
    shards(state, tmp_path / "d")
    (tmp_path / "d" / "b.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="several indexes"):
        loads(tmp_path / "d")


# config.json

SIZES = [0, -1, 1.5, 24.0, "24", True, [24], {"a": 1}, 10**6, 2**63, 10**400, float("nan"), float("inf")]


@pytest.mark.parametrize("value", SIZES, ids=lambda value: repr(value)[:10])
@pytest.mark.parametrize(
    ("family", "key"),
    [
        *(("open_sora", key) for key in ("depth", "hidden_size", "num_heads", "patch_size", "in_channels")),
        *(("open_sora", key) for key in ("caption_channels", "mlp_ratio", "model_max_length", "qk_norm")),
        *(("latte", key) for key in ("num_layers", "attention_head_dim", "sample_size", "video_length", "norm_eps")),
        *(("open_sora_plan_v110", key) for key in ("sample_size", "patch_size", "video_length", "activation_fn")),
        *(("open_sora_plan_v120", key) for key in ("sample_size", "sample_size_t", "interpolation_scale_t")),
    ],
)
def test_sizes_that_no_model_has_are_refused_before_anything_is_made(
    family: str, key: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if key in ("mlp_ratio", "norm_eps", "interpolation_scale_t") and value in (0, 1.5, 24.0):
        return
    if key == "qk_norm" and value is True:
        return
    if isinstance(value, str) and key == "activation_fn":
        value = 24
    monkeypatch.setattr(checkpoints, "_on_meta", lambda *args: pytest.fail("a model was made"))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({key: value}))
    with pytest.raises(ValueError, match=rf"config\.json: {key}: got .*, must be|config\.json cannot be read") as error:
        load(family, tmp_path, **F32)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("document", ["[]", "null", "3", '"x"', "{", "", "\xff\xfe", "[" * 100_000])
def test_a_config_of_something_else_is_refused(document: str, state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(document, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config\.json (cannot be read as JSON|must hold a mapping)"):
        loads(tmp_path)


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("latte", {"sample_size": 2048, "patch_size": 1}, "sample_size: got 2048, whose 4194304 positions"),
        ("open_sora", {"hidden_size": 25, "num_heads": 2}, "num_heads: got 2, must divide hidden_size 25"),
    ],
)
def test_settings_that_do_not_go_together(family: str, config: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        load(family, tmp_path, **F32)


def test_large_sizes_allocate_nothing_before_the_files_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 GiB by the config, a small file: what differs is told, and no table and no weight is made."""
    monkeypatch.setattr(checkpoints, "_with_tables", lambda *args: pytest.fail("tables were made"))
    monkeypatch.setattr(weight_files, "read_all", lambda *args: pytest.fail("weights were read"))
    save_file({"spatial_blocks.0.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"depth": 2, "hidden_size": 2**15, "num_heads": 16}))
    with pytest.raises(ValueError, match="does not fit STDiT3"):
        load("open_sora", tmp_path, **F32)


def test_build_checks_what_it_is_given() -> None:
    with pytest.raises(ValueError, match="depth: got 0, must be a whole number from 1 to 256"):
        checkpoints.build("open_sora", depth=0)
    with pytest.raises(TypeError, match="dept: STDiT3 has no such setting, must be one of depth, "):
        checkpoints.build("open_sora", dept=1)
