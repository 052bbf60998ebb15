"""Files that are whole or absent: atomic writes, hashes of inputs, the cache folder."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fbi.errors import InputError


def cache_root() -> Path:
    """The folder of everything that can be made again: `$FBI_CACHE`, or `~/.cache/fbi`."""
    return Path(os.environ.get("FBI_CACHE") or Path.home() / ".cache" / "fbi")


def content_hash(value: Any, length: int = 12) -> str:
    """The first `length` hex digits of the SHA-256 of `value` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def file_hash(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_directory(path: Path) -> Path:
    """Creates `path` and its parents; an `InputError` where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create the folder {path}: {error.strerror}; choose a writable place") from error
    return path


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[IO[str] | None]:
    """Holds a lock file for this process and those it hands the open file to; gives None where another holds it.

    The system drops the lock with the last of them, however they end. An `InputError` where the file cannot be made.
    """
    try:
        file = path.open("a")
    except OSError as error:
        raise InputError(f"cannot write in {path.parent}: {error.strerror}; choose a writable place") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all; an `InputError` where the disk refuses."""
    make_directory(path.parent)
    temporary: str | None = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = file.name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}; free some space or choose another place") from error


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file; an `InputError` that names the file where it is missing, unreadable or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Gives a temporary sibling of `path` to fill; on success it becomes `path`, on any failure it is removed.

    What a killed process left behind has a name that is never read, so that half a folder is never used.
    """
    make_directory(path.parent)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():  # another process was quicker: both hold the same content
            shutil.rmtree(temporary)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
