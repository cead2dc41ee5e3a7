"""`pab quality` on a tiny model."""

import csv
import re

from pab_kernels.config import PABConfig
from tests.cli_tools import SHORT, pab, refused


def test_quality_of_settings(demo, tmp_path):
    PABConfig.preset("latte", "469").to_yaml(tmp_path / "mine.yaml")
    arguments = ("--model", demo, *SHORT, "--videos", 2, "--pab", "latte:347", "--pab", tmp_path / "mine.yaml")
    output = pab("quality", *arguments, "--csv", tmp_path / "q.csv")
    assert re.search(r"\| latte:347 \| 3/4/7 in 100 to 800 +\| +\d+\.\d\d", output)
    assert re.search(r"\| mine.yaml \| 4/6/9 in 100 to 800 +\|", output)
    rows = list(csv.DictReader((tmp_path / "q.csv").open()))
    assert [(row["settings"], row["video"]) for row in rows] == [
        ("latte:347", "0"), ("latte:347", "1"), ("mine.yaml", "0"), ("mine.yaml", "1"),
    ]  # fmt: skip
    assert "pab: got 'off'" in refused("quality", "--model", demo, "--pab", "off")
