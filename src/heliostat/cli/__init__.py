"""The command line: `heliostat COMMAND`. Starts without torch; a command loads what it needs when it runs."""

from heliostat.cli.root import app, main

__all__ = ["app", "main"]
