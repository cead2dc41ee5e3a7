"""A tiny demo model, and a batch of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import demo  # noqa: F401

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = ("red", "green", "blue", "white", "yellow", "orange")


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes rows to a .jsonl file; without any, 24 prompts in two numbers of steps."""

    def write(*rows: dict[str, Any]) -> Path:
        given = rows or tuple(
            {"prompt": f"a {colour} {shape}", "seed": i, "steps": 2 + (i % 2)}
            for i, (colour, shape) in enumerate((colour, shape) for colour in COLOURS for shape in SHAPES)
        )
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in given))
        return path

    return write


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster of the one who runs the tests, and one thread everywhere: on a CPU their number decides last bits."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "RAY_ADDRESS" not in os.environ
