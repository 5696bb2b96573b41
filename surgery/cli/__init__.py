"""The `surgery` command: parses, calls, prints. Exit status 0 done, 1 failed, 2 bad input."""

from .main import main

__all__ = ["main"]
