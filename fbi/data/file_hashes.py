"""Hashes of the user's files: the content is the truth, a file that did not change is not read again."""

import json
import time
from pathlib import Path

from fbi.errors import InputError
from fbi.files import cache_root, content_hash, file_hash, write_json

# A file may be written twice within one tick of its clock: a hash is kept only once its file has been still this long.
_STILL_NS = 2_000_000_000


def of_files(root: Path, files: list[Path]) -> dict[str, str]:
    """The SHA-256 of each file by its path relative to `root`, in the order given.

    A hash is looked up by (absolute path, size, time of change) and computed where that is new.
    """
    memory_file = cache_root() / "hashes" / f"{content_hash(str(root.resolve()))}.json"
    try:
        memory = dict(json.loads(memory_file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # none yet, or damaged: it can be made again
        memory = {}
    known, hashes = {}, {}
    for file in files:
        name = file.relative_to(root).as_posix()
        try:
            status = file.stat()
            stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            row = memory.get(name, {})
            hashes[name] = row["sha256"] if row.get("stamp") == stamp else file_hash(file)
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror}") from error
        if time.time_ns() - max(stamp[1:]) > _STILL_NS:
            known[name] = {"stamp": stamp, "sha256": hashes[name]}
    if memory | known != memory:
        write_json(memory_file, memory | known)
    return hashes
