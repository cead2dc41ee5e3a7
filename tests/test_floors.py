"""The project's layout: a file imports only from lower floors, and settings load without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    ["pab_kernels/files.py", "pab_kernels/strict_yaml.py", "pab_kernels/config_values.py", "pab_kernels/clock.py"],
    ["pab_kernels/config.py", "pab_kernels/schedule.py"],
    ["pab_kernels/ops/quantized.py", "pab_kernels/ops/reference.py", "pab_kernels/ops/checks.py"],
    ["triton_ops/*.py"],
    ["pab_kernels/ops/*.py"],
    ["pab_kernels/blocks/*.py"],
    ["models/*.py", "models/hosts/*.py"],
    ["pab_kernels/runtime/*.py"],
    ["pab_kernels/quality.py", "pab_kernels/figures.py", "pab_kernels/plain.py", "pab_kernels/tapped.py"],
    ["pab_kernels/pipelines/*.py", "pab_kernels/demo/*.py"],
    ["pab_kernels/workloads.py"],
    ["pab_kernels/measure/*.py"],
    ["pab_kernels/tune/*.py"],
    ["pab_kernels/cli/*.py"],
]
TOP = {"pab_kernels/__init__.py"}  # names every public home, but only imports them on use


def floor_of_files() -> dict[str, int]:
    """Of each file the first floor that names it: a file that others need lies below the rest of its room."""
    floors: dict[str, int] = {}
    for floor, patterns in enumerate(FLOORS):
        for pattern in patterns:
            for path in ROOT.glob(pattern):
                floors.setdefault(path.relative_to(ROOT).as_posix(), floor)
    return floors


def module_file(module: str) -> str | None:
    relative = module.replace("pab_kernels.triton_ops", "triton_ops").replace("pab_kernels.models", "models")
    stem = relative.replace(".", "/")
    for candidate in (f"{stem}.py", f"{stem}/__init__.py"):
        if (ROOT / candidate).is_file():
            return candidate
    return None


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "pab_kernels"}


def test_every_file_has_a_floor():
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in ("pab_kernels", "models", "triton_ops")
        for path in (ROOT / folder).rglob("*.py")
        if not any(part.is_symlink() for part in path.parents)
    }
    assert files - set(floor_of_files()) == TOP


@pytest.mark.parametrize("file", sorted(floor_of_files()))
def test_imports_come_from_lower_or_the_same_floor(file):
    floors = floor_of_files()
    for module in imports(ROOT / file):
        target = module_file(module)
        if target is not None and target not in TOP and target != file:
            assert floors[target] <= floors[file], f"{file} imports {target} from a higher floor"


def test_settings_and_schedules_load_without_torch():
    code = "import sys, pab_kernels.config, pab_kernels.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
