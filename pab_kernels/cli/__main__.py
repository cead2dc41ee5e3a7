"""`python -m pab_kernels.cli`."""

from pab_kernels.cli.main import app

app()
