"""The `pab` command: every command under its name."""

from __future__ import annotations

import sys

import typer

from pab_kernels.cli import options
from pab_kernels.cli.batch import batch
from pab_kernels.cli.bench import bench
from pab_kernels.cli.compare import compare
from pab_kernels.cli.decode import decode
from pab_kernels.cli.generate import generate
from pab_kernels.cli.info import info
from pab_kernels.cli.profile import profile
from pab_kernels.cli.quality import quality
from pab_kernels.cli.report import report
from pab_kernels.cli.schedule import schedule
from pab_kernels.cli.tune import tune
from pab_kernels.cli.verify import verify

app = typer.Typer(
    help="Pyramid Attention Broadcast: faster video diffusion transformers, without training.",
    epilog=options.EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (generate, batch, decode, profile, tune, quality, compare, bench, report, info, schedule, verify):
    app.command(cls=options.Command)(command)


if __name__ == "__main__":
    sys.exit(app())
