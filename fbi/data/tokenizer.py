"""Text to token ids and back: a byte-level BPE of our own, or any tokenizer.json."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsInt

import numpy as np
from jaxtyping import Int32

from fbi.data.config import bpe_vocab
from fbi.data.corpus import Corpus
from fbi.data.token_bytes import count_bytes
from fbi.errors import InputError
from fbi.files import cache_root, content_hash, read_json, write_text

SEPARATOR = "<|endoftext|>"
SEPARATORS = (SEPARATOR, "</s>", "<|end_of_text|>", "<eos>", "<s>")  # the first that a tokenizer has ends a document
_TRAINER = 1  # version of the training below; a change trains every tokenizer anew
_BATCH = 64  # documents handed to the trainer at a time


class Tokenizer:
    """A `tokenizers` tokenizer that never adds, pads, cuts, or reads special tokens out of the text."""

    def __init__(self, text: str, name: str = "tokenizer"):
        """From the text of a tokenizer.json; `name` says in errors where it came from."""
        import tokenizers

        try:
            self._spec = json.loads(text)
            self._inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the Rust side raises bare Exception
            raise InputError(f"{name} is not a tokenizer.json: {str(error).splitlines()[0]}") from error
        self._inner.no_padding()
        self._inner.no_truncation()
        self._inner.encode_special_tokens = True  # a document that spells "<|endoftext|>" holds no separator
        ids = self._inner.get_vocab(with_added_tokens=True)
        found = next((mark for mark in SEPARATORS if mark in ids), None)
        if found is None:
            raise InputError(f"{name} has no token that ends a document; it needs one of {', '.join(SEPARATORS)}")
        self.separator = ids[found]
        self.vocab = max(ids.values()) + 1  # ids may have gaps
        self._ids, self._text = ids, text

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """From a tokenizer.json file; an `InputError` where it is missing or no tokenizer."""
        path = Path(path)
        return cls(json.dumps(read_json(path), ensure_ascii=False), str(path))

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer.json that `load` reads, whole or not at all."""
        write_text(Path(path), self._text)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no separator is added."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of token ids, special tokens spelled out; bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=False)

    @cached_property
    def token_bytes(self) -> Int32[np.ndarray, " v"]:
        """Bytes of text of each token id, 0 for special tokens; see `fbi.data.token_bytes`."""
        return count_bytes(self._spec, self._ids, self.vocab)

    @cached_property
    def fingerprint(self) -> str:
        """The hash of its tokenizer.json: equal for equal tokenizers, however the file is laid out."""
        return content_hash(self._spec)


def for_corpus(tokenizer: str, corpus: Corpus) -> Tokenizer:
    """The tokenizer of a config: loaded from a path, or `bpe:VOCAB` trained once on the corpus' train split."""
    vocab = bpe_vocab(tokenizer)
    if vocab is None:
        path = Path(os.path.expanduser(tokenizer))
        if not path.exists():
            raise InputError(
                f"cannot read {path}: no such file; a tokenizer is bpe:VOCAB or the path of a tokenizer.json"
            )
        return Tokenizer.load(path)
    path = cache_root() / "tokenizers" / f"{content_hash([_TRAINER, corpus.hash, vocab])}.json"
    if not path.exists():
        train_bpe(corpus.splits["train"], vocab).save(path)
    return Tokenizer.load(path)


def train_bpe(documents: Iterable[str], vocab: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab` tokens, id 0 the separator; a small corpus gives fewer.

    The same documents give the same tokenizer.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner: Any = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_batches(documents), trainer)
    return Tokenizer(inner.to_str(), f"bpe:{vocab}")


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for document in documents:
        batch.append(document)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    yield batch
