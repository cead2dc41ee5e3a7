"""PABConfig: its keys, files, presets and errors."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pab_kernels.config import KINDS, PRESETS, MlpWindow, PABConfig
from pab_kernels.config_values import short

EXAMPLE = Path(__file__).parent.parent / "examples" / "pab.yaml"
ON = {"spatial_broadcast": True, "spatial_threshold": [100, 800], "spatial_range": 2}
WINDOWS = {720: {"block": [0, 1], "skip_count": 2}}


def test_documents_example_loads_unchanged():
    config = PABConfig.from_yaml(EXAMPLE)
    assert config.to_dict() == yaml.safe_load(EXAMPLE.read_text())


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"spatial_rage": 2}, ValueError, ["spatial_rage", "spatial_range"]),
        ({"zzz": 2}, ValueError, ["zzz", "cross_threshold"]),
        ({"spatial_range": 0}, ValueError, ["spatial_range", "0", "at least 1"]),
        ({"cross_range": 2.0}, TypeError, ["cross_range", "2.0", "integer"]),
        ({"cross_range": True}, TypeError, ["cross_range", "True", "integer"]),
        ({"temporal_threshold": [800, 100]}, ValueError, ["temporal_threshold", "[800, 100]", "lo < hi"]),
        ({"temporal_threshold": [100, 100]}, ValueError, ["temporal_threshold", "lo < hi"]),
        ({"temporal_threshold": [100]}, TypeError, ["temporal_threshold", "[100]", "two numbers"]),
        ({"temporal_threshold": "ab"}, TypeError, ["temporal_threshold", "'ab'", "two numbers"]),
        ({"temporal_threshold": [float("nan"), 3]}, ValueError, ["temporal_threshold", "lo < hi"]),
        ({"spatial_broadcast": "yes"}, TypeError, ["spatial_broadcast", "'yes'", "true or false"]),
        ({"spatial_broadcast": 1}, TypeError, ["spatial_broadcast", "1", "true or false"]),
        ({"spatial_broadcast": True, "spatial_range": 2}, ValueError, ["spatial_threshold", "missing"]),
        ({"spatial_broadcast": True, "spatial_threshold": [1, 2]}, ValueError, ["spatial_range", "missing"]),
        ({"spatial_block": [5, 2]}, ValueError, ["spatial_block", "[5, 2]", "first < end"]),
        ({"spatial_block": 3}, TypeError, ["spatial_block", "3", "two integers"]),
        ({"mlp_broadcast": True}, ValueError, ["mlp_threshold", "missing"]),
        ({"stack_broadcast": True, "stack_range": 2}, ValueError, ["stack_threshold", "missing"]),
        ({"stack_block": [2, 2]}, ValueError, ["stack_block", "[2, 2]", "first < end"]),
        ({"guidance_broadcast": True, "guidance_threshold": [1, 2]}, ValueError, ["guidance_range", "missing"]),
        ({"guidance_block": [0, 2]}, ValueError, ["guidance_block", "unknown key"]),
        ({"cross_order": 2}, ValueError, ["cross_order", "2", "0 or 1"]),
        ({"stack_order": True}, TypeError, ["stack_order", "True", "0 or 1"]),
        ({"mlp_broadcast": True, "mlp_temporal_broadcast_config": WINDOWS, "mlp_order": 1}, ValueError, ["mlp_order"]),
        (
            {"mlp_broadcast": True, "mlp_temporal_broadcast_config": WINDOWS}
            | {"stack_broadcast": True, "stack_threshold": [1, 2], "stack_range": 2},
            ValueError,
            ["stack_broadcast", "mlp_threshold"],
        ),
        ({"mlp_spatial_broadcast_config": [1]}, TypeError, ["mlp_spatial_broadcast_config", "[1]"]),
        ({"mlp_spatial_broadcast_config": {"x": {}}}, TypeError, ["mlp_spatial_broadcast_config", "'x'"]),
        ({"mlp_spatial_broadcast_config": {7: {"block": [0]}}}, TypeError, ["[7]", "skip_count"]),
        ({"mlp_spatial_broadcast_config": {7: {"block": [-1], "skip_count": 1}}}, ValueError, ["[7].block", "-1"]),
        ({"mlp_spatial_broadcast_config": {7: {"block": [0], "skip_count": 0}}}, ValueError, ["[7].skip_count", "0"]),
        (
            {"mlp_broadcast": True, "mlp_spatial_broadcast_config": WINDOWS, "mlp_range": 2, "mlp_threshold": [1, 2]},
            ValueError,
            ["mlp_broadcast", "one form"],
        ),
        ({"linear_precision": "int8"}, ValueError, ["linear_precision", "'int8'", "fp8, fp8-all"]),
        ({"linear_exclude": "spatial.0.*"}, TypeError, ["linear_exclude", "'spatial.0.*'", "list"]),
        ({"linear_exclude": [0]}, TypeError, ["linear_exclude", "[0]", "list"]),
        ({"attention_precision": "int8"}, ValueError, ["attention_precision", "'int8'", "fp8"]),
        ({"cache_dtype": "fp16"}, ValueError, ["cache_dtype", "'fp16'", "fp8, int8"]),
        ({"cache_dtype": ["fp8"]}, ValueError, ["cache_dtype", "['fp8']", "fp8, int8"]),
        ({"spatial_range": 10**400}, ValueError, ["spatial_range", "1000", "at most 2147483647"]),
        ({"spatial_range": 10**5000}, ValueError, ["spatial_range", "very many digits", "at most 2147483647"]),
        ({"spatial_threshold": [0, 10**400]}, ValueError, ["spatial_threshold", "at most 2147483647"]),
        ({"spatial_threshold": [-(10**400), 0]}, ValueError, ["spatial_threshold", "at least -2147483647"]),
        ({"spatial_threshold": [True, 2]}, TypeError, ["spatial_threshold", "True", "two numbers"]),
        ({"spatial_threshold": ["1e2", 800]}, TypeError, ["spatial_threshold", "'1e2'", "two numbers"]),
        ({"mlp_block": [0, 10**400]}, ValueError, ["mlp_block", "at most 2147483647"]),
        ({"mlp_spatial_broadcast_config": {10**400: WINDOWS[720]}}, ValueError, ["key 1000", "at most 2147483647"]),
        ({"mlp_spatial_broadcast_config": {"7" * 5000: WINDOWS[720]}}, TypeError, ["key '777", "integer timestep"]),
        ({"mlp_spatial_broadcast_config": {7: {"block": [0], "skip_count": 2**40}}}, ValueError, ["[7].skip_count"]),
        ({"mlp_spatial_broadcast_config": {7: {"block": 3, "skip_count": 1}}}, ValueError, ["[7].block", "3", "list"]),
        ({"mlp_spatial_broadcast_config": {7: WINDOWS[720], "7": WINDOWS[720]}}, ValueError, ["timestep 7", "twice"]),
        ({"x" * 9999: 1}, ValueError, ["unknown key"]),
        ([1, 2], TypeError, ["settings", "list", "mapping"]),
    ],
    ids=lambda value: short(value)[:60],
)
def test_bad_input_names_key_value_and_what_is_allowed(settings, error, words):
    with pytest.raises(error) as caught:
        PABConfig.from_dict(settings)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "just words\n", "", "a: [1,\n", "spatial_range: 0\n", "1: 2\n"])
def test_bad_files_name_the_file(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises((TypeError, ValueError), match=r"bad\.yaml"):
        PABConfig.from_yaml(path)


def test_yaml_is_read_safely(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("!!python/object/apply:os.getcwd []\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        PABConfig.from_yaml(path)


def test_frozen_and_hashable():
    config = PABConfig.from_dict(ON | {"mlp_broadcast": True, "mlp_spatial_broadcast_config": WINDOWS})
    assert hash(config) == hash(PABConfig.from_dict(config.to_dict()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.spatial_range = 3  # type: ignore[misc]


def test_timestep_keys_may_be_json_strings():
    as_text = {"720": WINDOWS[720]}
    both = [PABConfig.from_dict({"mlp_broadcast": True, "mlp_spatial_broadcast_config": w}) for w in (as_text, WINDOWS)]
    assert both[0] == both[1]


@pytest.mark.parametrize("family", PRESETS)
def test_presets_round_trip(family, tmp_path):
    config = PABConfig.preset(family)
    config.to_yaml(tmp_path / "c.yaml")
    assert PABConfig.from_yaml(tmp_path / "c.yaml") == config
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize(
    ("family", "variant", "threshold", "ranges"),
    [
        ("open_sora", None, (450, 930), (2, 4, 6)),
        ("open_sora", "579", (450, 930), (5, 7, 9)),
        ("open_sora_plan_v110", None, (100, 850), (2, 4, 6)),
        ("open_sora_plan_v110", "357", (100, 850), (3, 5, 7)),
        ("open_sora_plan_v120", None, (100, 850), (2, None, 6)),
        ("latte", None, (100, 800), (2, 3, 6)),
        ("latte", "469", (100, 800), (4, 6, 9)),
    ],
)
def test_preset_values(family, variant, threshold, ranges):
    config = PABConfig.preset(family, variant)
    for kind, every in zip(KINDS, ranges, strict=True):
        assert getattr(config, f"{kind}_broadcast") is (every is not None)
        assert getattr(config, f"{kind}_range") == every
        assert getattr(config, f"{kind}_threshold") == (None if every is None else threshold)


@pytest.mark.parametrize(("family", "variant", "word"), [("late", None, "latte"), ("latte", "999", "347")])
def test_unknown_preset(family, variant, word):
    with pytest.raises(ValueError, match=word):
        PABConfig.preset(family, variant)


numbers = st.integers(-10, 1100) | st.floats(-10, 1100)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            **{f"{kind}_threshold": st.lists(numbers, min_size=2, max_size=2) for kind in KINDS},
            **{f"{kind}_range": st.integers(-2, 12) for kind in KINDS},
            **{f"{kind}_broadcast": st.booleans() for kind in KINDS},
            "spatial_block": st.lists(st.integers(-1, 30), min_size=2, max_size=2),
        },
    )
)
def test_accepted_settings_survive_a_round_trip_and_keep_their_promises(settings):
    try:
        config = PABConfig.from_dict(settings)
    except ValueError:
        return
    assert PABConfig.from_dict(config.to_dict()) == config
    for kind in KINDS:
        threshold, every = getattr(config, f"{kind}_threshold"), getattr(config, f"{kind}_range")
        assert threshold is None or threshold[0] < threshold[1]
        assert every is None or every >= 1
        assert not getattr(config, f"{kind}_broadcast") or (threshold is not None and every is not None)
        assert (0 in config.blocks(kind)) <= getattr(config, f"{kind}_broadcast")


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ((7.5, (0,), 1), TypeError, ["timestep", "7.5"]),
        (("7", (0,), 1), TypeError, ["timestep", "'7'"]),
        ((7, (), 1), ValueError, ["block", "()"]),
        ((7, 3, 1), ValueError, ["block", "3"]),
        ((7, (-1,), 1), ValueError, ["block", "-1"]),
        ((7, ("0",), 1), TypeError, ["block", "'0'"]),
        ((7, (0,), 0), ValueError, ["skip_count", "0"]),
        ((7, (0,), True), TypeError, ["skip_count", "True"]),
    ],
)
def test_fields_of_mlp_windows_are_checked(fields, error, words):
    with pytest.raises(error) as caught:
        MlpWindow(*fields)
    assert all(word in str(caught.value) for word in words)
    window = MlpWindow(7, (0,), 1)
    with pytest.raises(ValueError, match="timestep 7 is there twice"):
        PABConfig(mlp_spatial_broadcast_config=(window, window))


def test_numbers_of_numpy_become_plain_ones(tmp_path):
    config = PABConfig(
        spatial_broadcast=True,
        spatial_threshold=np.array([100, 800]),  # type: ignore[arg-type]
        spatial_range=np.int64(2),
        spatial_block=(np.int32(0), np.int32(5)),
        temporal_threshold=(np.float32(0.5), np.float64(1.5)),
        mlp_spatial_broadcast_config=(MlpWindow(np.int64(720), np.arange(2), np.uint8(2)),),  # type: ignore[arg-type]
    )
    config.to_yaml(tmp_path / "pab.yaml")
    assert PABConfig.from_yaml(tmp_path / "pab.yaml") == config
    assert json.loads(json.dumps(config.to_dict())) is not None
    assert type(config.spatial_range) is int
    assert isinstance(config.temporal_threshold, tuple)
    assert type(config.temporal_threshold[0]) is float
