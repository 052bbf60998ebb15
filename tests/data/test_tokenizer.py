import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fbi.data import Tokenizer
from fbi.data.tokenizer import SEPARATOR, train_bpe
from fbi.errors import InputError

TEXTS = ["We the people of the United States.\n\n", "Grüße, 世界! 🎉👩‍👩‍👧\r\n", "x = [1, 2, 3]\t# code\n"] * 5


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 300)


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.sampled_from([SEPARATOR, f"a{SEPARATOR}\n\n b", "\r\n\t ", "👩‍👩‍👧é\u0301", *TEXTS]))
def test_text_comes_back_and_its_bytes_are_counted(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.separator not in ids
    assert bpe.token_bytes[ids].sum() == len(text.encode())
    assert bpe.encode_batch([text, "a"]) == [ids, bpe.encode("a")]


def test_the_separator_is_token_zero_and_stands_for_no_bytes(bpe):
    assert (bpe.separator, bpe.token_bytes[0], bpe.vocab) == (0, 0, 300)
    assert bpe.token_bytes[1:].min() == 1
    assert bpe.token_bytes.dtype == np.int32
    assert bpe.decode([0]) == SEPARATOR


def test_training_twice_gives_the_same_tokenizer(bpe, tmp_path):
    assert train_bpe(TEXTS, 300).fingerprint == bpe.fingerprint
    assert train_bpe(TEXTS, 299).fingerprint != bpe.fingerprint
    bpe.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.fingerprint == bpe.fingerprint
    assert again.encode("We the people") == bpe.encode("We the people")


def test_a_small_corpus_gives_fewer_tokens_than_asked_for():
    assert train_bpe(["ab"], 5000).vocab == 258


def changed(bpe, **parts):
    spec = json.loads(bpe._text)
    return spec | parts


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_a_tokenizer_with_padding_truncation_and_a_template_gives_the_bare_tokens(bpe, tmp_path):
    import tokenizers

    inner = tokenizers.Tokenizer.from_str(bpe._text)
    inner.enable_padding(length=50)
    inner.enable_truncation(2)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{SEPARATOR} $A {SEPARATOR}", special_tokens=[(SEPARATOR, 0)]
    )
    inner.save(str(tmp_path / "t.json"))
    loaded = Tokenizer.load(tmp_path / "t.json")
    assert loaded.encode(TEXTS[0]) == bpe.encode(TEXTS[0])
    assert loaded.encode_batch(TEXTS) == bpe.encode_batch(TEXTS)


def test_added_tokens_count_the_bytes_that_they_match(bpe):
    import tokenizers

    inner = tokenizers.Tokenizer.from_str(bpe._text)
    inner.add_tokens(["🎉🎉"])
    loaded = Tokenizer(inner.to_str())
    ids = loaded.encode("a🎉🎉b")
    assert loaded.vocab == bpe.vocab + 1
    assert len(ids) == 3
    assert loaded.token_bytes[ids].sum() == len("a🎉🎉b".encode())


def test_a_byte_fallback_tokenizer_counts_bytes_and_finds_its_separator(tmp_path):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {"▁": 259, "a": 260, "é": 261, "▁a": 262}
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": True}
            | dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
            for i, token in enumerate(["<unk>", "<s>", "</s>"])
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {"type": "BPE", "vocab": vocab, "merges": [["▁", "a"]], "byte_fallback": True, "unk_token": "<unk>"},
    }
    loaded = Tokenizer.load(write(tmp_path / "t.json", spec))
    text = "a aé 🎉"
    ids = loaded.encode(text)
    assert loaded.decode(ids) == text
    assert loaded.token_bytes[ids].sum() == len(text.encode())
    assert (loaded.separator, loaded.vocab) == (2, 263)
    assert list(loaded.token_bytes[:3]) == [0, 0, 0]


def test_files_that_are_no_tokenizer_are_one_line_errors(bpe, tmp_path):
    cases = {
        "is not JSON": '{"model": ',
        "is not a tokenizer.json": {"model": {"type": "BPE"}},
        "is not UTF-8": None,
        "no token that ends a document; it needs one of <|endoftext|>, </s>": changed(
            bpe, added_tokens=[], model=json.loads(bpe._text)["model"] | {"vocab": {"a": 0}, "merges": []}
        ),
    }
    for says, value in cases.items():
        file = tmp_path / "t.json"
        if value is None:
            file.write_bytes(b"\xff\xfe")
        else:
            write(file, value)
        with pytest.raises(InputError) as caught:
            Tokenizer.load(file)
        assert says in str(caught.value)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot read"):
        Tokenizer.load(tmp_path / "none.json")


def test_a_tokenizer_that_does_not_say_its_bytes_is_refused_when_they_are_asked_for():
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "<s>": 1, "a": 2}, unk_token="[UNK]"))
    inner.decoder = tokenizers.decoders.WordPiece()
    loaded = Tokenizer(inner.to_str())
    assert loaded.encode("a") == [2]
    with pytest.raises(InputError, match=r"WordPiece.*does not say which bytes"):
        _ = loaded.token_bytes
