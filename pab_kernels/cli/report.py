"""`pab report`: one page of several benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pab_kernels.cli import options
from pab_kernels.files import check_outputs


def report(
    files: Annotated[list[Path], typer.Argument(help="What `pab bench --json` wrote, a file for each workload.")],
    output: Annotated[Path, typer.Option(help="Folder for report.html and report.md.")] = Path("outputs/report"),
) -> None:
    """Make one page of several benchmarks.

    Example:

    pab report latte.json open_sora.json --output reports/h100
    """
    from pab_kernels.measure import report as pages
    from pab_kernels.measure import result_files

    with options.clean_errors():
        check_outputs({"output": [output / name for name in pages.FILES]}, inputs=files)
        results = [result_files.load(file) for file in files]
        options.console().print(f"wrote {pages.write(results, output)[0]}", soft_wrap=True)
