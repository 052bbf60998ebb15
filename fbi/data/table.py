"""A teacher's likeliest next tokens at every position of every training window, on disk, read by window index.

A table is a folder: `plan.json` says what it is to be, `shards/00000.array_record` and so on hold one record a window
in the order of the windows, `meta.json` stands there once it is whole. It holds whatever order or epoch reads it.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fbi.data.loader import Batches
from fbi.data.windows import Windows
from fbi.errors import InputError, unknown
from fbi.fields import later
from fbi.files import content_hash, read_json

FORMAT = 1
PLAN, META = "plan.json", "meta.json"
DTYPES = {"float16": "<f2", "float32": "<f4"}  # of log-probabilities


class Rows(NamedTuple):
    """What a table says of a batch of windows: arrays of NumPy or of JAX."""

    indices: Any
    """[b, t, k] token ids, the likeliest first, then those drawn; uint16, or uint32 for a vocabulary above 65,536."""
    logp: Any
    """[b, t, k] their log-probabilities in nats, of drawn ones the estimated; float16 or float32."""
    tail: Any
    """[b, t] the logarithm of the probability of all other tokens together, in the type of `logp`; none where drawn
    tokens stand for them."""


class Taught(NamedTuple):
    """A batch with what a table says of it."""

    tokens: Any
    """[b, t + 1]"""
    rows: Rows


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a window is written: all ids, all log-probabilities, all tails."""

    window: int
    vocab: int
    k: int
    dtype: str = "float16"
    drawn: int = later(0)
    """Of the k: how many are drawn from the tail, the others being the likeliest."""

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise unknown("type of log-probabilities", self.dtype, DTYPES)
        if not 1 <= self.k <= self.vocab:
            raise InputError(f"k={self.k} must be at least 1 and at most the vocabulary of {self.vocab} tokens")
        if not 0 <= self.drawn < self.k:
            raise InputError(f"drawn={self.drawn} must be at least 0 and below k={self.k}, of which it is a part")

    @property
    def index(self) -> np.dtype:
        """The type of token ids."""
        return np.dtype("<u2" if self.vocab <= 1 << 16 else "<u4")

    @property
    def value(self) -> np.dtype:
        """The type of log-probabilities."""
        return np.dtype(DTYPES[self.dtype])

    @property
    def bytes_per_token(self) -> int:
        """Of a record, for each prediction, before the file compresses it."""
        return self.k * (self.index.itemsize + self.value.itemsize) + self.value.itemsize

    def pack(self, rows: Rows) -> list[bytes]:
        """A record for each window; a log-probability below what the type holds becomes the least that it holds."""
        least = np.finfo(self.value).min
        with np.errstate(over="ignore"):  # what overflows is cut to `least`
            logp, tail = (np.maximum(np.asarray(x).astype(self.value), least) for x in (rows.logp, rows.tail))
        parts = zip(np.asarray(rows.indices).astype(self.index), logp, tail, strict=True)
        return [b"".join(part.tobytes() for part in window) for window in parts]

    def unpack(self, records: Sequence[bytes]) -> Rows:
        """The inverse of `pack`."""
        rows, t, k = len(records), self.window, self.k
        size = t * self.bytes_per_token
        data = np.frombuffer(b"".join(records), np.uint8).reshape(rows, size)
        first, second = t * k * self.index.itemsize, size - t * self.value.itemsize

        def part(low: int, high: int, dtype: np.dtype, *shape: int) -> np.ndarray:
            return np.ascontiguousarray(data[:, low:high]).view(dtype).reshape(rows, *shape)

        return Rows(
            part(0, first, self.index, t, k), part(first, second, self.value, t, k), part(second, size, self.value, t)
        )


def source_of(windows: Windows, masked: bool) -> dict[str, Any]:
    """What names the positions that a table is of: text, tokens, windows, and where attention stopped."""
    return {
        "corpus": windows.meta["corpus"],
        "tokenizer": windows.meta["tokenizer"],
        "window": windows.window,
        "windows": windows.count("train"),
        "tokens_sha256": windows.meta["splits"]["train"]["sha256"],
        "mask_documents": masked,
    }


_REMEDY = {
    "tokenizer": "use the tokenizer.json that the table was made with as data.tokenizer",
    "mask_documents": "set data.mask_documents as it is there",
    "window": "set data.window as it is there",
}


def is_table(folder: str | Path) -> bool:
    """Whether a folder is a table, finished or not, and not a run."""
    return bool(str(folder)) and any((Path(folder) / name).exists() for name in (PLAN, META))


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / "shards" / f"{number:05}.array_record"


class Table:
    """A finished table. `meta`: source, layout, teacher, shards, bytes_per_token; `hash` names all of it."""

    def __init__(self, folder: str | Path):
        """`InputError` where the folder is no table, an unfinished or a damaged one."""
        self.folder = Path(folder)
        if not (self.folder / META).exists():
            there = is_table(self.folder)
            raise InputError(
                f"{self.folder} is {'an unfinished' if there else 'no'} table of a teacher: it has no {META}; "
                f"`fbi teach` {'with the same arguments finishes it' if there else 'makes one'}"
            )
        self.meta: Mapping[str, Any] = read_json(self.folder / META)
        try:
            if self.meta["format"] != FORMAT:
                raise InputError(
                    f"{self.folder} is a table of format {self.meta['format']}, this version of fbi reads {FORMAT}; "
                    "make it again"
                )
            self.layout = Layout(**self.meta["layout"])
            self._shards = [(shard_path(self.folder, i), row["bytes"]) for i, row in enumerate(self.meta["shards"])]
            self.windows = int(self.meta["source"]["windows"])
        except (KeyError, TypeError) as error:
            raise self._damaged(f"{META} lacks {error}") from error
        self._source: Any = None

    @property
    def hash(self) -> str:
        """Twelve hex digits that name the content: source, layout, teacher, the SHA-256 of every shard."""
        return content_hash(dict(self.meta))

    def check(self, windows: Windows, masked: bool) -> None:
        """Refuses other data than those that the table is of, and files that are not those that were written."""
        for path, size in self._shards:
            found = path.stat().st_size if path.exists() else 0
            if found != size:
                raise self._damaged(f"{path.name} has {found} bytes, {META} says {size}")
        here, there = source_of(windows, masked), self.meta["source"]
        for name, value in here.items():
            if there.get(name) != value:
                raise InputError(
                    f"table {self.folder} was made for other data: {name} is {there.get(name)} there, {value} here; "
                    f"{_REMEDY.get(name, 'use the data it was made for')}, or make a table of this with fbi teach"
                )

    def rows(self, indices: Sequence[int]) -> Rows:
        """What the teacher said of these training windows."""
        if self._source is None:
            self._source = self._open()
        try:
            return self.layout.unpack(self._source.__getitems__(indices))
        except (OSError, RuntimeError, ValueError) as error:
            raise self._damaged(error) from error

    def _open(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        try:
            source = ArrayRecordDataSource([str(path) for path, _ in self._shards])
        except (OSError, RuntimeError, ValueError) as error:
            raise self._damaged(error) from error
        if len(source) != self.windows:
            raise self._damaged(f"it has {len(source)} windows, {META} says {self.windows}")
        return source

    def _damaged(self, reason: object) -> InputError:
        line = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
        return InputError(
            f"table {self.folder} is damaged: {line}; delete {META} and the shard, and `fbi teach` makes it again"
        )


class TaughtBatches:
    """`Batches` with what a table says of the same windows, read ahead together."""

    def __init__(self, batches: Batches, table: Table):
        self._batches, self._table = batches, table
        self.position = batches.position

    def batch_at(self, step: int) -> Taught:
        """This host's rows of a step's batch."""
        return Taught(self._batches.batch_at(step), self._table.rows(self._batches.indices_at(step)))

    def iterate(self, start_step: int = 0) -> Iterator[Taught]:
        """The batches from `start_step` on, without end."""
        return self._batches.iterate(start_step, self.batch_at)
