"""Runs the `pab` command."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from pab_kernels.cli import app

RUNNER = CliRunner()
SHORT = ("--steps", 10, "--device", "cpu")


def pab(*arguments: object, code: int = 0) -> str:
    """Run a command; its output, with line breaks and styles of tables taken out."""
    result = RUNNER.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def refused(*arguments: object) -> str:
    """Run a command that must fail with exit code 2 and one line; the line."""
    output = pab(*arguments, code=2).strip()
    lines = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, output
    return lines[0]


def invoke(*arguments: object) -> Any:
    """A command's result with stdout and stderr apart."""
    return RUNNER.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
