import pytest

from fbi.data.tokenizer import train_bpe

WORDS = "the cat sat on a mat and the dog ran to the house of an old man who saw it and said so to all of us"


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of 280 tokens: any text is encoded, and some words are one token."""
    return train_bpe([WORDS] * 3, 280)
