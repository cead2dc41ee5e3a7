"""The `pab` command: one file a command, and the options that they share."""

from pab_kernels.cli.main import app

__all__ = ["app"]
