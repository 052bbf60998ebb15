"""What commands left, and what is asserted of it."""

from pathlib import Path
from typing import NamedTuple

ONE_DEVICE = ("--mesh", "data=1")
EXECUTION = (*ONE_DEVICE, "--log-every", "1", "--checkpoint-every", "1")


class Ended(NamedTuple):
    """What a command left: its exit code and its words."""

    code: int
    out: str
    err: str


def assignments(*settings: str) -> list[str]:
    """a=1, b=2 -> --set a=1 --set b=2."""
    return [word for setting in settings for word in ("--set", setting)]


def listing(folder: Path) -> set[str]:
    """Every path below a folder, hashes of the user's files aside."""
    paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    return {path for path in paths if not path.startswith("hashes")}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; the lock, which every command opens, aside."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def refused(ended: Ended, *says: str) -> str:
    """Asserts that a command ended for bad input: code 2, one line that says all of `says`; returns the line."""
    assert ended.code == 2, ended
    assert ended.err.startswith("fbi: error: "), ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.endswith("\n")
    assert "Traceback" not in ended.err + ended.out
    for words in says:
        assert words in ended.err
    return ended.err
