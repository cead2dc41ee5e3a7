"""What all commands share: errors, exit codes, help, completion."""

import inspect
import os
import re
import shlex
import subprocess
import sys
from typing import Any

import pytest
import torch
import typer

from pab_kernels.cli import app, measured, options
from pab_kernels.pipelines.demo import DemoPipeline
from tests.cli_tools import invoke, pab


@pytest.mark.parametrize(
    ("error", "code"),
    [(torch.OutOfMemoryError("no room for 3 GiB"), 1), (OSError("disk full"), 1), (ValueError("x: got 1"), 2)],
    ids=lambda value: type(value).__name__,
)
def test_errors_end_with_one_line_and_their_code(error, code, demo, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(DemoPipeline, "__call__", fail)
    arguments = ("generate", "--model", demo, "--device", "cpu", "--output", tmp_path / "v.gif", "--quiet")
    result = invoke(*arguments)
    assert result.exit_code == code
    assert result.output == f"error: {error}\n"
    monkeypatch.setenv("PAB_DEBUG", "1")
    assert invoke(*arguments).exception is error


def test_a_bug_keeps_its_traceback(demo, tmp_path, monkeypatch):
    bug = RuntimeError("shapes do not fit")
    monkeypatch.setattr(DemoPipeline, "__call__", lambda *args, **kwargs: (_ for _ in ()).throw(bug))
    assert invoke("generate", "--model", demo, "--device", "cpu", "--output", tmp_path / "v.gif").exception is bug


@pytest.mark.parametrize("command", ["generate", "bench", "report", "info", "schedule", "verify"])
def test_help_shows_examples_that_the_command_line_understands(command, monkeypatch):
    output = pab(command, "--help")
    examples = [line.strip() for line in output.splitlines() if line.strip().startswith(f"pab {command}")]
    assert examples
    parser: Any = typer.main.get_command(app)
    for example in examples:
        words = shlex.split(example.split(" > ")[0])[2:]
        parser.commands[command].make_context(command, words)  # raises for an unknown option


def _numbers() -> list[Any]:
    """Every option of every command that is a whole number or a float, as its annotation says."""
    parser: Any = typer.main.get_command(app)
    found = []
    for registered in app.registered_commands:
        callback: Any = registered.callback
        command = parser.commands[callback.__name__]
        for option in command.params:
            annotation = str(inspect.signature(callback).parameters[option.name].annotation)
            if re.search(r"\b(int|float)\b", annotation if "Annotated" in annotation else _shared(annotation)):
                found.append(pytest.param(command, option, id=f"{command.name} {option.name}"))
    return found


def _shared(annotation: str) -> str:
    """What stands behind a name such as options.Guidance."""
    module, _, name = annotation.rpartition(".")
    return str(getattr({"options": options, "measured": measured}[module], name)) if module else annotation


@pytest.mark.parametrize(("command", "option"), _numbers())
def test_a_number_that_is_none_is_refused_by_every_option(command, option):
    """What is infinite, no number, or less than nothing; a seed is any number, a frame may be counted from the end."""
    required = [word for each in command.params if each.required for word in (each.opts[0], "1") if word[0] in "-1"]
    bad = ["nan", "inf", "-inf", "1e400"] + ["-1"] * (option.name not in ("seed", "from_frame", "guidance"))
    for value in bad:
        with pytest.raises(typer.BadParameter) as caught:
            command.make_context(command.name, [*required, option.opts[0], value])
        assert option.opts[0] in caught.value.format_message()
        assert caught.value.exit_code == 2


def test_help_names_the_exit_codes():
    assert "Exit codes: 0 done" in pab("--help")


def test_the_shell_completes_presets():
    environment = {
        **os.environ,
        "_PAB_COMPLETE": "complete_bash",
        "COMP_WORDS": "pab generate --pab la",
        "COMP_CWORD": "3",
    }
    command = [sys.executable, "-c", "from pab_kernels.cli import app; app(prog_name='pab')"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert result.stdout.split() == ["latte"], result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--model", "x" * 300),
        ("generate", "--pab", "x" * 300),
        ("generate", "--model", "open_sora", "--weights", "x" * 300),
        ("schedule", "--config", "x" * 300),
        ("schedule", "--config", "."),
        ("compare", ".", "."),
        ("report", "."),
        ("verify", "."),
        ("generate", "--output", "/proc/self/v.gif"),
        ("schedule", "--preset", "latte", "--plot", "x" * 300),
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)
def test_paths_that_lead_nowhere_end_with_one_line_and_code_2(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.output.startswith("error: ")


def test_names_are_no_markup_and_no_escapes(tmp_path):
    name = "[red]x[/red] [/] :cat: \x1b[31m.yaml"
    line = invoke("schedule", "--config", tmp_path / name).output
    assert "[red]x[/red] [/] :cat: \\x1b[31m.yaml" in line


def test_ctrl_c_ends_any_command_with_130(demo, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(DemoPipeline, "__call__", interrupted)
    result = invoke("generate", "--model", demo, "--device", "cpu", "--output", tmp_path / "v.gif", "--quiet")
    assert (result.exit_code, result.output) == (130, "error: interrupted\n")
    assert not list(tmp_path.iterdir())
