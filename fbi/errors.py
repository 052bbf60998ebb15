"""Errors that a user's input caused: shown as one line, never as a traceback."""

import difflib
from collections.abc import Iterable

EXIT_INPUT = 2  # something was wrong with the input; one line on standard error says what
EXIT_STOPPED = 75  # stopped by a signal, the checkpoint is on disk: the same command continues
EXIT_LOST = 76  # a process of a run on several hosts died or hangs: the same command on every host continues


class InputError(ValueError):
    """Bad input: a file, a config, a flag or a checkpoint. Its text names the value, what is allowed and the remedy."""


def unknown(kind: str, value: object, allowed: Iterable[object]) -> InputError:
    """The error for a name that is not one of `allowed`, with the nearest valid name where there is one."""
    names = sorted(map(str, allowed))
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return InputError(f"unknown {kind} {str(value)!r}{hint}; valid: {', '.join(names) or 'none'}")
