"""Documents to windows of tokens: joined, each followed by the separator, and cut to one length."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from fbi.data.tokenizer import Tokenizer
from fbi.errors import InputError
from fbi.files import cache_root

Progress = Callable[[int, int, str], None]  # (done, total, unit)

_PIECE = 1 << 20  # characters tokenised at once: an encoding takes many times the memory of its text
_BATCH = 1 << 22  # characters handed to the tokenizer's threads together


def write_windows(
    path: Path,
    documents: Iterable[str],
    tokenizer: Tokenizer,
    window: int,
    dtype: np.dtype,
    tick: Callable[[int], None],
) -> tuple[dict[str, Any], Int[np.ndarray, " v"]]:
    """Writes an ArrayRecord file whose record k holds tokens [k * window, k * window + window + 1), in `dtype`.

    So every token but the first is predicted exactly once; what is left over at the end, less than a window of
    predictions, is dropped. `tick(n)` is told of every n documents done. Gives the split's row of `meta.json` (of
    `tokens`, all; of `bytes`, those of the text) and how often each token is predicted.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    row = {"documents": 0, "tokens": 0, "windows": 0, "bytes": 0}
    counts = np.zeros(tokenizer.vocab, np.int64)
    digest = hashlib.sha256()
    left = np.empty(0, dtype)
    try:
        writer = ArrayRecordWriter(str(path), "group_size:1")  # one record a group: what random access wants
        for tokens, texts, size in _tokens(documents, tokenizer):
            row["documents"] += texts
            row["tokens"] += len(tokens)
            row["bytes"] += size
            left = np.concatenate([left, np.asarray(tokens, dtype)])
            many = max(0, (len(left) - 1) // window)
            for k in range(many):
                writer.write(left[k * window : k * window + window + 1].tobytes())
            predicted = left[1 : many * window + 1]
            if many and not row["windows"]:
                digest.update(left[:1].tobytes())
            digest.update(predicted.tobytes())
            counts += np.bincount(predicted, minlength=tokenizer.vocab)
            row["windows"] += many
            left = left[many * window :]
            tick(texts)
        writer.close()  # tells of a full disk, which `write` may not
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"cannot write the windows below {cache_root()}: {error}; free some space or set FBI_CACHE"
        ) from error
    return row | {"sha256": digest.hexdigest()}, counts


def unigram_entropy(train: Int[np.ndarray, " v"], validation: Int[np.ndarray, " v"]) -> float:
    """Nats per token of the validation tokens under the train tokens' frequencies, one added to each count.

    What a model gets that knows the frequencies and nothing of the context: a run that learns is below it.
    """
    smooth = train + 1.0
    return float(-np.sum(validation * np.log(smooth / smooth.sum())) / validation.sum())


def split_long(text: str) -> Iterator[str]:
    """The text in pieces of bounded length, cut after a line end where there is one."""
    start = 0
    while len(text) - start > _PIECE:
        stop = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        yield text[start:stop]
        start = stop
    yield text[start:]


def _tokens(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[list[int], int, int]]:
    """Runs of (tokens with separators, documents that end in them, bytes of text)."""
    batch: list[tuple[str, bool]] = []  # piece, whether a document ends with it
    size = 0
    for text in documents:
        pieces = list(split_long(text))
        for number, piece in enumerate(pieces, start=1):
            batch.append((piece, number == len(pieces)))
            size += len(piece)
            if size >= _BATCH:
                yield _encode(batch, tokenizer)
                batch, size = [], 0
    if batch:
        yield _encode(batch, tokenizer)


def _encode(batch: list[tuple[str, bool]], tokenizer: Tokenizer) -> tuple[list[int], int, int]:
    tokens: list[int] = []
    for ids, (_, end) in zip(tokenizer.encode_batch([piece for piece, _ in batch]), batch, strict=True):
        tokens += ids
        if end:
            tokens.append(tokenizer.separator)
    return tokens, sum(end for _, end in batch), sum(len(piece.encode()) for piece, _ in batch)
