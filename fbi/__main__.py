"""`python -m fbi`, the same as `fbi`; what executors start."""

from fbi.launch.leash import follow

follow()

from fbi.cli import entry  # noqa: E402  (the tie comes first: importing takes a moment)

entry()
