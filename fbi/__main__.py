"""`python -m fbi`, the same as `fbi`."""

from fbi.cli import entry

entry()
