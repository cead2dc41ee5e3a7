"""The build: its package list is what is on disk, and the compiled module, where there is one, says what it is."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from pab_kernels.ops import backends

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pab_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def packages_in(folder: Path, name: str) -> set[str]:
    """Dotted names of the packages at and under `folder`, through symlinks."""
    if not (folder / "__init__.py").exists():
        return set()
    return {name}.union(*(packages_in(child, f"{name}.{child.name}") for child in folder.iterdir() if child.is_dir()))


def test_packages_are_those_on_disk(setup_py):
    assert set(setup_py.PACKAGES) == packages_in(ROOT / "pab_kernels", "pab_kernels")
    assert len(setup_py.PACKAGES) == len(set(setup_py.PACKAGES))


def test_symlinks_lead_to_the_folders_at_the_top():
    for name in ("models", "triton_ops"):
        link = ROOT / "pab_kernels" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / name


def test_source_distribution_lists_the_sources_of_the_kernels():
    manifest = (ROOT / "MANIFEST.in").read_text()
    suffixes = {path.suffix for path in (ROOT / "csrc").iterdir()}
    assert all(f"*{suffix}" in manifest for suffix in suffixes)
    assert "CMakeLists.txt" in manifest


def test_types_are_shipped():
    assert (ROOT / "pab_kernels" / "py.typed").exists()
    assert (ROOT / "pab_kernels" / "_C.pyi").exists()


@pytest.fixture
def no_cuda(monkeypatch, tmp_path):
    """An environment in which nothing points to an nvcc."""
    for variable in ("PAB_SKIP_CUDA", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def nvcc(no_cuda, monkeypatch, tmp_path) -> Path:
    """Something executable by that name, in CUDA_HOME."""
    path = tmp_path / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return path


def test_without_nvcc_the_kernels_are_left_out(setup_py, no_cuda):
    assert setup_py.why_no_kernels() == "no nvcc found"


def test_with_nvcc_the_kernels_are_built(setup_py, nvcc):
    assert setup_py.find_nvcc() == str(nvcc)
    assert setup_py.why_no_kernels() is None


def test_the_kernels_can_be_left_out_on_purpose(setup_py, nvcc, monkeypatch):
    monkeypatch.setenv("PAB_SKIP_CUDA", "1")
    assert setup_py.why_no_kernels() == "PAB_SKIP_CUDA is set"


@pytest.mark.skipif(backends._C is None, reason="the CUDA kernels were left out of this build")
def test_build_info():
    info = backends._C.build_info()
    assert set(info) == {"cuda", "architectures", "compiler", "kernels"}
    assert "temporal_attention" in info["kernels"]
    assert info["architectures"]
    assert int(info["cuda"].split(".")[0]) >= 12
