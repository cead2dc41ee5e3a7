"""The `pab` command: one file a command, and the options that they share.

Arguments, messages and exit codes; what a command does is in the rooms below, all of which a file here may import."""

from pab_kernels.cli.main import app

__all__ = ["app"]
