"""What was measured of linears in fp8 is kept: the next run decides alike."""

from __future__ import annotations

import logging

import pytest
import torch

from pab_kernels.runtime import fp8_trials
from pab_kernels.runtime.fp8_trials import Shape, Trial, keep, kept_at, recall

GPU = torch.device("cuda")
SHAPE, TRIAL = Shape("qkv", 100, 16, 48), Trial(1.0, 0.5)


@pytest.fixture(autouse=True)
def _gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU A")


def test_the_first_measurement_of_a_shape_holds():
    assert recall(GPU) == {}
    keep(GPU, SHAPE, TRIAL)
    keep(GPU, SHAPE, Trial(1.0, 2.0))
    keep(GPU, Shape("mlp", 7, 16, 64), Trial(0.25, 0.5))
    assert recall(GPU) == {SHAPE: TRIAL, Shape("mlp", 7, 16, 64): Trial(0.25, 0.5)}


@pytest.mark.parametrize("other", ["gpu", "torch", "package"])
def test_another_machine_measures_itself(other, monkeypatch):
    keep(GPU, SHAPE, TRIAL)
    if other == "gpu":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU B")
    elif other == "torch":
        monkeypatch.setattr(torch, "__version__", "0.0")
    else:
        monkeypatch.setattr(fp8_trials.metadata, "version", lambda name: "0.0")
    assert recall(GPU) == {}


def test_lines_that_are_no_measurements_are_skipped(caplog):
    keep(GPU, SHAPE, TRIAL)
    with kept_at().open("a") as file:
        file.write("{\n[]\n{}\nnull\n")
    with caplog.at_level(logging.WARNING):
        assert recall(GPU) == {SHAPE: TRIAL}
    assert len(caplog.records) == 4


def test_a_folder_that_cannot_be_written_is_said(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PAB_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        keep(GPU, SHAPE, TRIAL)
    assert "could not be kept" in caplog.text
    assert recall(GPU) == {}


def test_a_cpu_keeps_nothing():
    keep(torch.device("cpu"), SHAPE, TRIAL)
    assert not kept_at().exists()


def test_where_it_lies(monkeypatch):
    monkeypatch.delenv("PAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(kept_at()) == "/somewhere/pab_kernels/fp8_linears.jsonl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert kept_at().parts[-3:] == (".cache", "pab_kernels", "fp8_linears.jsonl")
