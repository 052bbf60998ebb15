"""A folder of packed windows, read at random or as the token stream that they were cut from."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from fbi.data.pack import Progress, unigram_entropy, write_windows
from fbi.data.splits import SPLITS
from fbi.data.tokenizer import Tokenizer
from fbi.errors import InputError, unknown
from fbi.files import read_json, write_json

_READ = 4096  # records read at a time


class Windows:
    """The windows of each split, with the tokenizer that made them and `meta`, what `meta.json` says of them.

    `meta`: vocab, separator, dtype, window, corpus, tokenizer (hashes), unigram_entropy (nats per token of validation)
    and `splits`: per split documents, tokens, windows, bytes and the SHA-256 of its token stream.
    """

    def __init__(self, folder: str | Path):
        """`InputError` where the folder is not one that `prepare` made, or is damaged."""
        self.folder = Path(folder)
        self.meta: Mapping[str, Any] = read_json(self.folder / "meta.json")
        try:
            self.window: int = self.meta["window"]
            self.dtype = np.dtype(self.meta["dtype"])
            self._counts = {split: int(self.meta["splits"][split]["windows"]) for split in SPLITS}
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"meta.json lacks {error}") from error
        self._sources: dict[str, Any] = {}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the windows were made with."""
        return Tokenizer.load(self.folder / "tokenizer.json")

    @property
    def token_bytes(self) -> Int32[np.ndarray, " v"]:
        """Bytes of text of each token id, 0 for special tokens."""
        return self.tokenizer.token_bytes

    def count(self, split: str) -> int:
        """The number of windows of a split."""
        if split not in self._counts:
            raise unknown("split", split, SPLITS)
        return self._counts[split]

    def source(self, split: str) -> Any:
        """The split's records (bytes) as a random-access source, which Grain takes as it is."""
        count = self.count(split)
        if split not in self._sources:
            if not count:
                raise InputError(f"the {split} split of {self.folder} is empty; hold out a share of the documents")
            # the class that grain.sources.ArrayRecordDataSource wraps: importing Grain would import JAX
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            try:
                source = ArrayRecordDataSource(str(self.folder / f"{split}.array_record"))
            except (OSError, RuntimeError, ValueError) as error:
                raise self._damaged(error) from error
            if len(source) != count:
                raise self._damaged(f"{split} has {len(source)} windows, meta.json says {count}")
            self._sources[split] = source
        return self._sources[split]

    def read(self, split: str, index: int) -> Int32[np.ndarray, " t"]:
        """The window + 1 tokens of one window: `window` inputs and, one further, as many targets."""
        if not 0 <= index < self.count(split):
            raise InputError(f"window {index} of {split} does not exist; there are {self.count(split)}")
        return self._tokens(self.source(split)[index])

    def stream(self, split: str) -> Int32[np.ndarray, " n"]:
        """All tokens of a split in order, as they were before they were cut (less the dropped tail)."""
        source, count = self.source(split), self.count(split)
        tokens = np.empty(count * self.window + 1, np.int32)
        for start in range(0, count, _READ):
            rows = range(start, min(start + _READ, count))
            for index, record in zip(rows, source.__getitems__(rows), strict=True):
                tokens[index * self.window : (index + 1) * self.window + 1] = self._tokens(record)
        return tokens

    def _tokens(self, record: bytes) -> Int32[np.ndarray, " t"]:
        return np.frombuffer(record, self.dtype).astype(np.int32)

    def _damaged(self, reason: object) -> InputError:
        return InputError(f"{self.folder} is not a whole folder of windows: {reason}; delete it to make it again")


def write_folder(
    folder: Path,
    documents: Mapping[str, Any],
    tokenizer: Tokenizer,
    window: int,
    hashes: Mapping[str, str],
    empty_test: bool,
    progress: Progress | None,
) -> None:
    """Fills `folder` with what `Windows` reads.

    `documents`: per split, something with a length that iterates over strings; `hashes` go into `meta.json`;
    `empty_test`: whether a test split without a window is no error; `progress(done, total, "documents")`.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab <= 1 << 16 else "<u4")
    total, done = sum(len(documents[split]) for split in SPLITS), 0

    def tick(more: int) -> None:
        nonlocal done
        done += more
        if progress:
            progress(done, total, "documents")

    rows, counts = {}, {}
    for split in SPLITS:
        path = folder / f"{split}.array_record"
        rows[split], counts[split] = write_windows(path, documents[split], tokenizer, window, dtype, tick)
        if not rows[split]["windows"] and not (split == "test" and empty_test):
            share = "smaller shares held out" if split == "train" else f"a larger share (data.{split})"
            raise InputError(
                f"the {split} split has {rows[split]['tokens']} tokens in {rows[split]['documents']} document(s), less "
                f"than one window of {window} + 1; give more text, {share} or a smaller window"
            )
    tokenizer.save(folder / "tokenizer.json")
    meta = {
        "window": window,
        "vocab": tokenizer.vocab,
        "separator": tokenizer.separator,
        "dtype": dtype.str,
        "unigram_entropy": unigram_entropy(counts["train"], counts["validation"]),
        "splits": rows,
        **hashes,
    }
    write_json(folder / "meta.json", meta)
