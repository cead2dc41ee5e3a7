"""What is asked for: reading, checking, naming and ordering rows, without a model."""

import itertools
import json

import pytest

from pab_kernels.batch.rows import fingerprint, plan, read_rows

DEFAULTS = {
    "negative_prompt": "",
    "seed": 0,
    "resolution": None,
    "duration": None,
    "aspect": None,
    "size": None,
    "steps": 30,
    "guidance": 7.0,
    "settings": "open_sora",
    "changes": {},
}


def planned(*rows, identity=None, **defaults):
    return plan(rows, "open_sora", {**DEFAULTS, **defaults}, identity or {"version": "1"})


def test_three_kinds_of_files_mean_the_same(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": "a dog", "seed": 3, "resolution": "144p"}, {"prompt": "a cat", "seed": None, "resolution": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "a.csv").write_text("prompt,seed,resolution\na dog,3,144p\na cat,,\n")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    plans = [planned(*read_rows(tmp_path / f"a.{kind}")) for kind in ("jsonl", "csv", "parquet")]
    assert plans[0] == plans[1] == plans[2]
    assert [(row.prompt, row.seed, row.size.height) for row in plans[0]] == [("a dog", 3, 144), ("a cat", 0, 480)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "prompt: got None, must be text"),
        ({"prompt": "  "}, "prompt: got '  ', must be text"),
        ({"prompt": 3}, "prompt: got 3, must be text"),
        ({"prompt": "\ud800"}, "surrogates not allowed"),
        ({"prompt": "a", "sed": 3}, "sed: is no column"),
        ({"prompt": "a", "seed": "x"}, "seed: got 'x', must be an integer"),
        ({"prompt": "a", "seed": 2**64}, "must fit 64 bits"),
        ({"prompt": "a", "seed": True}, "seed: got True, must be an integer"),
        ({"prompt": "a", "steps": 0}, r"steps: num_inference_steps must be in \[1, 1000\], got 0"),
        ({"prompt": "a", "guidance": "much"}, "guidance: .* must be a number"),
        ({"prompt": "a", "resolution": "481p"}, "resolution: got '481p'"),
        ({"prompt": "a", "duration": 3}, "duration: got '3'"),
        ({"prompt": "a", "settings": "none.yaml"}, "pab: got 'none.yaml'"),
        ({"prompt": "a", "negative_prompt": 1}, "negative_prompt: got 1, must be text"),
        ("cannot be read as JSON: x", "cannot be read as JSON: x"),
    ],
    ids=str,
)
def test_a_bad_row_says_why_and_the_others_stay(row, message):
    bad, good = planned({"prompt": "a dog"}, row)
    assert (good.number, good.error) == (1, None)
    assert bad.number == 2
    with pytest.raises(ValueError, match=message):
        raise ValueError(bad.error)


def test_a_file_that_is_none_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    for name, content in (("a.txt", b"x"), ("a.jsonl", b"\n"), ("a.csv", b"prompt\n\xff\n"), ("a.parquet", b"PAR1")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="prompts: "):
            read_rows(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "b.jsonl")


def test_lines_that_are_no_rows_are_kept_as_what_is_wrong_with_them(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt"\n[1]\n\xff\n' + b"[" * 100_000 + b"\n")
    rows = read_rows(tmp_path / "a.jsonl")
    assert rows[0] == {"prompt": "a"}
    assert all(isinstance(row, str) for row in rows[1:])
    assert len(rows) == 5
    (tmp_path / "a.csv").write_text("prompt,seed\na,1,2\n")
    assert read_rows(tmp_path / "a.csv") == ["more values than columns"]


def test_the_id_is_of_all_that_decides_the_result_and_of_nothing_else(tmp_path):
    base = {"prompt": "a dog"}
    (same,) = planned({**base, "seed": 0, "steps": 30.0, "resolution": "480p", "guidance": 7})
    assert same.id == planned(base)[0].id
    other = [
        *(planned({**base, **change})[0].id for change in (
            {"prompt": "a dog "}, {"negative_prompt": "x"}, {"seed": 1}, {"steps": 31}, {"guidance": 7.5},
            {"resolution": "240p"}, {"duration": "4s"}, {"aspect": "1:1"}, {"settings": "off"},
        )),
        planned(base, identity={"version": "2"})[0].id,
        planned(base, changes={"cache_dtype": "fp8"})[0].id,
    ]  # fmt: skip
    assert len({same.id, *other}) == 12
    from pab_kernels.config import PABConfig

    for name in ("one.yaml", "two.yaml"):
        PABConfig.preset("open_sora").to_yaml(tmp_path / name)
    assert planned({**base, "settings": str(tmp_path / "one.yaml")})[0].id == same.id


def test_rows_of_a_shape_follow_each_other_and_equal_ones_are_one():
    rows = [
        {"prompt": f"{i}", "resolution": ("144p", "240p")[i % 2], "settings": ("off", "open_sora")[i // 2 % 2]}
        for i in range(12)
    ]
    found = planned(*rows, rows[0])
    assert len(found) == 12
    shapes = [row.shape for row in found]
    assert sum(a != b for a, b in itertools.pairwise(shapes)) == 3
    assert [row.number for row in found if row.shape == shapes[0]] == sorted(
        row.number for row in found if row.shape == shapes[0]
    )


def test_weights_are_told_apart_by_what_is_in_them(tmp_path):
    path = tmp_path / "a" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(bytes(3 * 2**20))
    before, alone = fingerprint(str(path.parent)), fingerprint(str(path))
    assert fingerprint("maxin-cn/Latte-1") == "maxin-cn/Latte-1"
    assert fingerprint(None) is None
    with path.open("r+b") as file:
        file.seek(2**20 + 7)
        file.write(b"x")
    assert fingerprint(str(path.parent)) != before
    assert fingerprint(str(path)) != alone
