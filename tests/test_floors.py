"""The project's layout: rooms one above the other, no cycle, short files, and settings that load without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each room lies on one floor: a file imports from its own room and from those before it.
ROOMS = {
    "settings": [f"pab_kernels/{name}.py" for name in (
        "files", "strict_yaml", "config_values", "clock", "config", "schedule",
    )],
    "ops": ["pab_kernels/ops/*.py", "triton_ops/*.py"],
    "blocks": ["pab_kernels/blocks/*.py"],
    "models": ["models/*.py", "models/hosts/*.py"],
    "distributed": ["pab_kernels/distributed/*.py"],
    "runtime": ["pab_kernels/runtime/*.py"],
    "beside": ["pab_kernels/quality.py", "pab_kernels/figures.py", "pab_kernels/plain.py", "pab_kernels/tapped.py"],
    "pipelines": ["pab_kernels/pipelines/*.py"],
    "demo": ["pab_kernels/demo/*.py"],
    "workloads": ["pab_kernels/workloads.py"],
    "measure": ["pab_kernels/measure/*.py"],
    "tune": ["pab_kernels/tune/*.py"],
    "batch": ["pab_kernels/batch/*.py"],
    "cli": ["pab_kernels/cli/*.py"],
}  # fmt: skip
TOP = {"pab_kernels/__init__.py"}  # names every public home, but only imports them on use
LINES = 400
LONGER = {"tests/ops/test_hopper_attention.py"}  # is being split


def room_of_files() -> dict[str, int]:
    """Of each file the floor that its room lies on."""
    return {
        path.relative_to(ROOT).as_posix(): floor
        for floor, patterns in enumerate(ROOMS.values())
        for pattern in patterns
        for path in ROOT.glob(pattern)
    }


def sources() -> Iterator[Path]:
    """All files of code, each once."""
    for folder in ("pab_kernels", "models", "triton_ops", "csrc", "bench", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cu", ".cuh", ".cpp") and not any(part.is_symlink() for part in path.parents):
                yield path


def module_file(module: str) -> str | None:
    relative = module.replace("pab_kernels.triton_ops", "triton_ops").replace("pab_kernels.models", "models")
    stem = relative.replace(".", "/")
    for candidate in (f"{stem}.py", f"{stem}/__init__.py"):
        if (ROOT / candidate).is_file():
            return candidate
    return None


def imports(path: Path) -> set[str]:
    """The project's files that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import, must name its module in full"
            # The names may be modules of a package, or what a module defines.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if module_file(name)}
            found |= modules if modules == names else {*modules, str(node.module)}
    files = {module_file(name) for name in found if name.split(".")[0] == "pab_kernels"}
    return {file for file in files if file} - TOP - {path.relative_to(ROOT).as_posix()}


def test_every_file_has_a_room():
    files = {path.relative_to(ROOT).as_posix() for path in sources() if path.suffix == ".py"}
    files = {file for file in files if file.split("/")[0] in ("pab_kernels", "models", "triton_ops")}
    assert files - set(room_of_files()) == TOP


@pytest.mark.parametrize("file", sorted(room_of_files()))
def test_imports_come_from_lower_rooms_or_the_same(file):
    rooms = room_of_files()
    for target in imports(ROOT / file):
        assert rooms[target] <= rooms[file], f"{file} imports {target} from a higher room"


def test_no_file_imports_itself_by_way_of_others():
    graph = {file: imports(ROOT / file) for file in room_of_files()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"files import each other: {' from '.join(error.args[1])}")


def test_a_relative_import_is_noticed(tmp_path):
    path = tmp_path / "file.py"
    path.write_text("from . import config\n")
    with pytest.raises(AssertionError, match="a relative import"):
        imports(path)


def test_every_folder_says_what_may_be_in_it():
    """And what may not, or what it may import: two sentences at least."""
    folders = {path.parent for path in sources() if path.suffix == ".py"} - {ROOT / "pab_kernels"}
    for folder in sorted(folders):
        if "tests" in folder.relative_to(ROOT).parts:
            continue
        docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        assert docstring.count(".") >= 2, f"{folder}: its docstring {docstring!r} must say what may be in it"
        assert "import" in docstring, f"{folder}: its docstring must say what it may import"


def test_no_file_is_too_long_to_be_read_in_one_sitting():
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in sources()}
    assert {file: lines for file, lines in lengths.items() if lines > LINES and file not in LONGER} == {}


def test_the_reading_order_is_the_list_of_rooms():
    order = (ROOT / "CONTRIBUTING.md").read_text().partition("## Reading order")[2].partition("\n## ")[0]
    places = [
        order.index(f"`{name}")
        for name in (
            "config.py",
            "ops/",
            "blocks/",
            "models/",
            "distributed/",
            "runtime/",
            "quality.py",
            "pipelines/",
            "demo/",
            "workloads.py",
            "measure/",
            "tune/",
            "batch/",
            "cli/",
        )
    ]
    assert places == sorted(places)


def test_settings_and_schedules_load_without_torch():
    code = "import sys, pab_kernels.config, pab_kernels.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
