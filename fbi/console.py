"""Runs one command: arguments are parsed apart from running it; bad input is one line and an exit code."""

import contextlib
import functools
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence

import tyro

from fbi.errors import EXIT_INPUT, EXIT_STOPPED, InputError


def run(commands: Mapping[str, Callable[..., None]], description: str, arguments: Sequence[str]) -> int:
    """Runs the command that `arguments` name and returns the exit code: 0, 2 for bad input, 75 after a signal."""
    try:
        _parse_and_run(commands, description, arguments)
    except SystemExit as end:
        return int(end.code or 0)
    except InputError as error:
        return _fail(str(error))
    except BrokenPipeError:  # whoever read the output has enough of it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if os.environ.get("FBI_DEBUG"):
            raise
        return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except KeyboardInterrupt:
        print("fbi: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        from fbi.train.loop import Stopped

        if not isinstance(error, Stopped):
            raise
        print(f"fbi: {error}", file=sys.stderr)
        return EXIT_STOPPED
    return 0


def _parse_and_run(commands: Mapping[str, Callable[..., None]], description: str, arguments: Sequence[str]) -> None:
    """Runs the command; a flag that does not parse becomes an `InputError` of one line."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            command = tyro.extras.subcommand_cli_from_dict(
                {name: _deferred(function) for name, function in commands.items()},
                prog="fbi",
                description=description,
                args=arguments,
                config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes),
            )
        except SystemExit as end:
            if not end.code:
                raise
            words = " ".join(re.sub(r"[─│╭╮╰╯┌┐└┘]", " ", said.getvalue()).split())
            raise InputError(words or "the arguments do not parse; see fbi --help") from None
    command()
    sys.stdout.flush()


def _deferred(function: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The function with its signature, which when called returns the call to make: parsing comes apart from running."""

    @functools.wraps(function)
    def bound(*args, **kwargs):
        return functools.partial(function, *args, **kwargs)

    return bound


def _fail(text: str) -> int:
    print("fbi: error: " + " ".join(text.split()), file=sys.stderr)
    return EXIT_INPUT
