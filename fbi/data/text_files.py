"""Documents from files: .txt, .md and .jsonl, plain or compressed, with errors that say where the fault is."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from fbi.errors import InputError

TEXT = (".txt", ".md")
LINES = (".jsonl",)
PACKED = ("", ".gz", ".zst")
SUFFIXES = tuple(kind + packed for kind in TEXT + LINES for packed in PACKED)
_CHUNK = 1 << 20  # bytes read at a time


def find_files(path: Path) -> list[Path]:
    """The text files at `path`: itself, or those anywhere below it in sorted order, hidden ones left out."""
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise InputError(f"{path} has an unknown suffix; valid: {', '.join(SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise InputError(f"no file or folder {path}; give the path of some text as text:PATH")
    found = (p.relative_to(path) for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
    files = sorted(p.as_posix() for p in found if not any(part.startswith(".") for part in p.parts))
    if not files:
        raise InputError(f"the folder {path} holds no text file; valid suffixes: {', '.join(SUFFIXES)}")
    return [path / name for name in files]


def read_documents(file: Path, field: str) -> Iterator[str]:
    """The documents of one file: all of a text file, or `field` of each line of a .jsonl file.

    Documents without any text (only white space) are left out, and so is a byte order mark.
    """
    if file.name.endswith(tuple(kind + packed for kind in LINES for packed in PACKED)):
        texts = _read_lines(file, field)
    else:
        texts = iter([_decode(b"".join(_chunks(file)), str(file), 0)])
    for text in texts:
        if text.strip():
            yield text.removeprefix("\ufeff")


def _read_lines(file: Path, field: str) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(_split_lines(_chunks(file)), start=1):
        place = f"{file}:{number}"
        text = _decode(line, place, offset).removeprefix("\ufeff")
        offset += len(line) + 1
        if text.strip():
            yield _field(text, field, place)


def _field(line: str, field: str, place: str) -> str:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deep"
        raise InputError(f"{place} is not JSON: {reason}; each line of a .jsonl file is one object") from error
    if not isinstance(record, dict):
        raise InputError(f"{place} is a JSON {type(record).__name__}; each line of a .jsonl file is one object")
    if field not in record:
        present = ", ".join(sorted(record)) or "none"
        raise InputError(f"{place} has no field {field!r}; fields present: {present}; choose one with data.field")
    text = record[field]
    if not isinstance(text, str):
        raise InputError(f"{place}: field {field!r} is of type {type(text).__name__}; a document must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may spell half of a surrogate pair, which no UTF-8 file can hold
        raise InputError(f"{place}: field {field!r} holds a lone surrogate at character {error.start}") from error
    return text


def _decode(data: bytes, place: str, offset: int) -> str:
    """`data` as text; `offset` is where it begins in the (uncompressed) file, for the error."""
    if (nul := data.find(0)) >= 0:
        raise InputError(f"{place} is not text: NUL at byte {offset + nul}; give UTF-8 text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place} is not UTF-8 text: {error.reason} at byte {offset + error.start}; convert it to UTF-8"
        ) from error


def _split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their newline; `bytes.splitlines` would also cut at other characters."""
    parts: list[bytes] = []
    for chunk in chunks:
        head, *rest = chunk.split(b"\n")
        parts.append(head)
        for line in rest:
            yield b"".join(parts)
            parts = [line]
    if last := b"".join(parts):
        yield last


def _chunks(file: Path) -> Iterator[bytes]:
    """The uncompressed bytes of a file, about a megabyte at a time."""
    try:
        if file.name.endswith(".gz"):
            with gzip.open(file) as stream:
                while chunk := stream.read(_CHUNK):
                    yield chunk
        else:
            with file.open("rb") as stream:
                raw = iter(lambda: stream.read(_CHUNK), b"")
                yield from _unpack_zst(file, raw) if file.name.endswith(".zst") else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{file} is not a whole gzip file: {error}; make or fetch it again") from error
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error


def _unpack_zst(file: Path, raw: Iterator[bytes]) -> Iterator[bytes]:
    """Every frame in turn; zstandard's own stream reader takes a truncated file for a whole one."""
    import zstandard

    unpacker = zstandard.ZstdDecompressor()
    frame = unpacker.decompressobj()
    try:
        for chunk in raw:
            while chunk:
                if frame.eof:
                    frame = unpacker.decompressobj()
                yield frame.decompress(chunk)
                chunk = frame.unused_data
    except zstandard.ZstdError as error:
        raise InputError(f"{file} is not a whole zstd file: {error}; make or fetch it again") from error
    if not frame.eof:
        raise InputError(f"{file} is not a whole zstd file: it ends early; make or fetch it again")
