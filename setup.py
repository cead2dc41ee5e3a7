"""Build of pab_kernels: the packages, and the CUDA kernels in csrc/ where there is an nvcc.

Environment
-----------
PAB_CUDA_ARCHS
    Architectures to compile for, in CMake's syntax, for example ``80;90a``. CMakeLists.txt has the default.
PAB_SKIP_CUDA
    Set to 1 to leave the CUDA kernels out although there is an nvcc.
CUDACXX, CUDA_HOME, CUDA_PATH
    Where nvcc is, if not on PATH.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# Listed one by one: pab_kernels/models and pab_kernels/triton_ops are symlinks to the folders at the top.
PACKAGES = [
    "pab_kernels",
    "pab_kernels.batch",
    "pab_kernels.blocks",
    "pab_kernels.cli",
    "pab_kernels.demo",
    "pab_kernels.distributed",
    "pab_kernels.measure",
    "pab_kernels.models",
    "pab_kernels.models.hosts",
    "pab_kernels.ops",
    "pab_kernels.pipelines",
    "pab_kernels.runtime",
    "pab_kernels.triton_ops",
    "pab_kernels.tune",
]


def find_nvcc() -> str | None:
    """Path of nvcc: what the environment names, else what is on PATH, else None."""
    named = os.environ.get("CUDACXX")
    if named:
        return shutil.which(named)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
        if nvcc:
            return nvcc
    return shutil.which("nvcc")


def find_tool(name: str, directory: str) -> str | None:
    """A build tool: from the Python package of that name, whose `directory` constant says where, else from PATH."""
    try:
        folder = getattr(importlib.import_module(name), directory)
    except (ImportError, AttributeError):
        folder = None
    return (shutil.which(name, path=str(folder)) if folder else None) or shutil.which(name)


class CMakeBuild(build_ext):
    """Compile csrc/ with CMake, into wherever setuptools wants the extension."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        if cmake is None:
            raise RuntimeError("cmake: not found, must be installed to compile the CUDA kernels")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        # A cache from another environment holds paths that are gone; configuring takes seconds.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        arguments = [
            f"-DCMAKE_CUDA_COMPILER={find_nvcc()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        archs = os.environ.get("PAB_CUDA_ARCHS")
        if archs:
            arguments.append(f"-DPAB_CUDA_ARCHS={archs}")
        ninja = find_tool("ninja", "BIN_DIR")
        if ninja:
            arguments += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), *arguments], check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel"], check=True)
        if not target.exists():
            raise RuntimeError(f"CMake built no {target.name}, found {[p.name for p in target.parent.glob('_C*')]}")


def why_no_kernels() -> str | None:
    """Why the CUDA kernels are left out, or None where they are built."""
    if os.environ.get("PAB_SKIP_CUDA", "0") not in ("", "0"):
        return "PAB_SKIP_CUDA is set"
    if find_nvcc() is None:
        return "no nvcc found"
    return None


def main() -> None:
    reason = why_no_kernels()
    # pip runs this file several times, but builds once: say it then.
    if reason and {"bdist_wheel", "build", "build_ext", "editable_wheel", "install"} & set(sys.argv):
        print(f"pab_kernels: {reason}, the CUDA kernels are left out")
    setup(
        packages=PACKAGES,
        package_data={"pab_kernels": ["py.typed", "*.pyi"], "pab_kernels.demo": ["weights/*"]},
        ext_modules=[] if reason else [Extension("pab_kernels._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
    )


if __name__ == "__main__":
    main()
