"""Settings files as others write them, and as nobody should: read as meant, or refused with path and key."""

import os
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pab_kernels import PABConfig, strict_yaml

GOOD = "spatial_broadcast: true\nspatial_threshold: [100, 800]\nspatial_range: 2\n"


def read(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return PABConfig.from_yaml(path)


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + GOOD.encode(),
        GOOD.encode("utf-16"),
        b"\xfe\xff" + GOOD.encode("utf-16-be"),
        GOOD.replace("\n", "\r\n"),
        "# für Latte, 猫\n" + GOOD,
        GOOD.replace("[100, 800]", "[1e2, 8e2]"),
        GOOD.replace("[100, 800]", "[1.E2, +8.0e+2]"),
        GOOD.replace("[100, 800]", "[0100, 0800]"),
        "---\n" + GOOD + "...\n",
    ],
    ids=range(9),
)
def test_files_of_others_are_read(data, tmp_path):
    config = read(tmp_path / "pab.yaml", data)
    assert (config.spatial_threshold, config.spatial_range) == ((100, 800), 2)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (("# für\n" + GOOD).encode("cp1252"), "not in UTF-8 .byte 3 is 0xfc.: save it as UTF-8"),
        (b"\xff\xfe\x00", "not in UTF-8"),
        (GOOD.encode("utf-32"), "not valid YAML|not in UTF-8"),
        (b"\x00" * 100, "not valid YAML"),
        (GOOD + "spatial_range: 3\n", "line 4: the key 'spatial_range' is there twice"),
        ("mlp_spatial_broadcast_config:\n  7: {block: [0], block: [1], skip_count: 1}\n", "line 2: the key 'block' is"),
        ("mlp_spatial_broadcast_config: {7: {}, 7: {}}\n", "line 1: the key 7 is there twice"),
        (GOOD + "<<: {spatial_range: 3}\n", "the key 'spatial_range' is there twice"),
        ("a: &a [1]\nb: *a\n", r"line 2: the alias \*a is not allowed"),
        ("a: &a [*a]\n", r"line 1: the alias \*a is not allowed"),
        ("a: " + "[" * 100_000, "line 1: more than 16 levels deep"),
        ("a: " + "{b: " * 50_000, "line 1: more than 16 levels deep"),
        ("# " + "x" * 300_000 + "\n" + GOOD, "more than 256 KiB"),
        (GOOD + "linear_precision: !!bool 3\n", "not valid YAML"),
        (GOOD + "cross_range: !!int \n", "not valid YAML"),
        (GOOD + "cross_range: !!timestamp x\n", "not valid YAML"),
        (GOOD + "cross_range: !!python/name:os.getcwd\n", "not valid YAML"),
        (GOOD + "? [1, 2]\n: 3\n", "not valid YAML"),
        (GOOD + f"cross_range: {'9' * 5000}\n", "not valid YAML.*digits"),
        (GOOD + f"cross_range: {'9' * 400}\n", "cross_range: got 999.*at most 2147483647"),
        (GOOD + "cross_range: 1:30\n", "cross_range: got '1:30'"),
        (GOOD + "cross_range: 0x10\n", "cross_range: got '0x10'"),
        (GOOD + "cross_range: 2001-01-01\n", "cross_range: got datetime.date"),
        (GOOD + "---\n" + GOOD, "not valid YAML.*single document"),
        ("linear_exclude: !!set {a}\nspatial_range: 0", "spatial_range: got 0"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value[:20],
)
def test_bad_files_are_refused_at_once_with_path_and_key(data, words, tmp_path):
    path = tmp_path / "pab.yaml"
    start = time.perf_counter()
    with pytest.raises((ValueError, TypeError), match=rf"(?s)^{path}: .*({words})"):
        read(path, data)
    assert time.perf_counter() - start < 5


def test_a_small_file_that_grows_is_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 9)]
    with pytest.raises(ValueError, match=r"the alias .* is not allowed"):
        read(tmp_path / "pab.yaml", "\n".join(lines))


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        PABConfig.from_yaml(tmp_path)
    with pytest.raises(FileNotFoundError):
        PABConfig.from_yaml(tmp_path / "absent.yaml")
    if os.geteuid():
        (tmp_path / "closed.yaml").touch(mode=0)
        with pytest.raises(ValueError, match="cannot be read: Permission denied"):
            PABConfig.from_yaml(tmp_path / "closed.yaml")


def test_every_character_may_be_in_a_comment(tmp_path):
    config = PABConfig.preset("latte")
    text = "".join(map(chr, [*range(0x300), 0x2028, 0xD800, 0xFEFF, 0xFFFE, 0x1F436])) + "\n\r\n: [x\x85# - !!python"
    config.to_yaml(tmp_path / "pab.yaml", text)
    assert PABConfig.from_yaml(tmp_path / "pab.yaml") == config


@given(st.text(max_size=200) | st.text(alphabet="+-.:_0123456789eExXoOinfaINFA", max_size=8))
@example("0e0")
@example("010")
@example("1:30")
def test_comments_and_patterns_come_back(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "comment.yaml"
    config = PABConfig(linear_exclude=(text,))
    config.to_yaml(path, text)
    assert PABConfig.from_yaml(path) == config


@given(st.binary(max_size=300) | st.text(alphabet="abc:&*!{}[]<>-?|%@`#,'\" \n\t019.", max_size=60))
def test_any_bytes_are_read_or_refused_with_the_path(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    try:
        read(path, data)
    except (ValueError, TypeError) as error:
        assert str(error).startswith(f"{path}: ")  # noqa: PT017  # any other error fails


def test_the_bounds_leave_room_for_settings():
    assert strict_yaml.MOST_BYTES > 100_000
