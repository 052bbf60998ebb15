"""How many bytes of text each token stands for, so that losses of unlike tokenizers compare as bits per byte."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int32

from fbi.errors import InputError

_SPACE = "▁"  # how SentencePiece tokenizers write a space


def count_bytes(spec: Mapping[str, Any], ids: Mapping[str, int], vocab: int) -> Int32[np.ndarray, " v"]:
    """Bytes of each token id; 0 for special tokens and for ids that no token has.

    `spec`: a tokenizer.json as a dict; `ids`: token to id, added tokens included. Exact for byte-level BPE. Where a
    tokenizer puts a space before each document (`add_prefix_space`, Metaspace), that space counts too. `InputError`
    where the tokens do not say their bytes (such as WordPiece, which loses the spaces).
    """
    kinds = set(_types({key: spec.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}))
    model = spec.get("model") or {}
    if "ByteLevel" in kinds:

        def size(token: str) -> int:
            return len(token)  # one character stands for one byte

    elif kinds & {"ByteFallback", "Metaspace"} or model.get("byte_fallback"):

        def size(token: str) -> int:
            byte = model.get("byte_fallback", True) and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
            return 1 if byte else len(token.replace(_SPACE, " ").encode())

    else:
        raise InputError(
            f"the tokenizer ({model.get('type', 'unknown')} with {', '.join(sorted(kinds)) or 'no decoder'}) does not "
            "say which bytes a token stands for; use a byte-level or a byte-fallback tokenizer"
        )
    counts = np.zeros(vocab, np.int32)
    for token, index in ids.items():
        counts[index] = size(token)
    for added in spec.get("added_tokens") or ():  # these match the text as it is, not its byte-level spelling
        counts[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    return counts


def _types(part: Any) -> Iterator[str]:
    """The `type` of every component below `part`."""
    if isinstance(part, Mapping):
        if isinstance(part.get("type"), str):
            yield part["type"]
        part = list(part.values())
    if isinstance(part, list):
        for child in part:
            yield from _types(child)
