import itertools
import json

import numpy as np
import pytest

from fbi.data import Windows, pack
from fbi.data.tokenizer import train_bpe
from fbi.data.windows import write_folder
from fbi.errors import InputError

DOCUMENTS = {
    "train": ["We the people.\n", "of the United States", "", "Grüße 🎉", "a" * 200],
    "validation": ["We the people of the United States form a more perfect union."],
    "test": ["one more line of text, quite enough"],
}


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(DOCUMENTS["train"], 270)


def build(folder, tokenizer, window=7, documents=DOCUMENTS, empty_test=False, progress=None):
    folder.mkdir()
    write_folder(folder, documents, tokenizer, window, {"corpus": "none"}, empty_test, progress)
    return Windows(folder)


def joined(tokenizer, texts):
    return [token for text in texts for token in [*tokenizer.encode(text), tokenizer.separator]]


@pytest.mark.parametrize("window", [2, 7, 30])
def test_windows_hold_the_documents_with_separators_and_predict_each_token_once(tmp_path, bpe, window):
    packed = build(tmp_path / "w", bpe, window)
    for split, texts in DOCUMENTS.items():
        want = joined(bpe, texts)
        rows = [packed.read(split, index) for index in range(packed.count(split))]
        assert packed.count(split) == (len(want) - 1) // window
        assert all(row.shape == (window + 1,) and row.dtype == np.int32 for row in rows)
        predicted = np.concatenate([row[1:] for row in rows])
        kept = len(rows) * window + 1
        assert [int(rows[0][0]), *predicted.tolist()] == want[:kept]
        assert len(want) - kept < window
        assert all(before[-1] == after[0] for before, after in itertools.pairwise(rows))
        np.testing.assert_array_equal(packed.stream(split), want[:kept])
        assert packed.meta["splits"][split]["bytes"] == sum(len(text.encode()) for text in texts)
        assert packed.meta["splits"][split]["tokens"] == len(want)
        assert packed.meta["splits"][split]["documents"] == len(texts)


def test_batching_and_cutting_of_long_documents_change_no_text(tmp_path, bpe, monkeypatch):
    text = "We the people\nof the United States " * 20
    plain = build(tmp_path / "plain", bpe, documents=DOCUMENTS | {"train": [text, "end"]})
    monkeypatch.setattr(pack, "_PIECE", 50)
    monkeypatch.setattr(pack, "_BATCH", 120)
    assert "".join(pack.split_long(text)) == text
    assert max(len(piece) for piece in pack.split_long(text)) <= 50
    cut = build(tmp_path / "cut", bpe, documents=DOCUMENTS | {"train": [text, "end"]})
    for packed in (plain, cut):
        assert bpe.decode(packed.stream("train")).startswith(text[:650])
        assert packed.meta["splits"]["train"]["documents"] == 2
        assert packed.meta["splits"]["train"]["bytes"] == len(text) + 3


def test_meta_says_what_the_windows_are(tmp_path, bpe):
    seen = []
    packed = build(tmp_path / "w", bpe, progress=lambda done, total, unit: seen.append((done, total, unit)))
    train, validation = packed.stream("train")[1:], packed.stream("validation")[1:]
    frequency = (np.bincount(train, minlength=bpe.vocab) + 1) / (len(train) + bpe.vocab)
    assert packed.meta["unigram_entropy"] == pytest.approx(-np.log(frequency)[validation].mean())
    assert (packed.meta["vocab"], packed.meta["separator"], packed.meta["dtype"]) == (bpe.vocab, 0, "<u2")
    assert packed.tokenizer.fingerprint == bpe.fingerprint
    np.testing.assert_array_equal(packed.token_bytes, bpe.token_bytes)
    assert seen[-1] == (7, 7, "documents")
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


def test_a_vocabulary_beyond_16_bits_is_stored_in_32(tmp_path, bpe):
    import tokenizers

    from fbi.data import Tokenizer

    spec = json.loads(bpe._text)
    spec["model"]["vocab"] |= {f"filler{number}": number for number in range(bpe.vocab, 70_000)}
    spec["model"]["vocab"]["Ġlast"] = 70_000
    inner = tokenizers.Tokenizer.from_str(json.dumps(spec))
    inner.add_tokens(["🎉🎉"])
    large = Tokenizer(inner.to_str())
    packed = build(tmp_path / "w", large, documents=DOCUMENTS | {"train": ["🎉🎉" * 20]})
    assert packed.meta["dtype"] == "<u4"
    assert packed.read("train", 0).tolist() == [70_001] * 8


def test_a_split_shorter_than_a_window_is_an_error_but_for_a_test_share_of_zero(tmp_path, bpe):
    for split in DOCUMENTS:
        short = DOCUMENTS | {split: ["no"]}
        with pytest.raises(InputError, match=f"the {split} split has 3 tokens in 1 document.s., less than one window"):
            build(tmp_path / split, bpe, documents=short)
    packed = build(tmp_path / "w", bpe, documents=DOCUMENTS | {"test": []}, empty_test=True)
    assert packed.count("test") == 0
    with pytest.raises(InputError, match=r"the test split of .* is empty"):
        packed.stream("test")


def test_unknown_splits_and_windows_are_errors(windows):
    with pytest.raises(InputError, match=r"unknown split 'valid' .did you mean 'validation'"):
        windows.read("valid", 0)
    for index in (-1, windows.count("test")):
        with pytest.raises(InputError, match=f"window {index} of test does not exist"):
            windows.read("test", index)


def test_a_damaged_folder_is_an_error_with_the_remedy(tmp_path, bpe):
    with pytest.raises(InputError, match=r"cannot read .*meta.json"):
        Windows(tmp_path)
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(InputError, match=r"is not a whole folder of windows.*delete it"):
        Windows(tmp_path)
    packed = build(tmp_path / "w", bpe)
    (tmp_path / "w" / "train.array_record").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"is not a whole folder of windows.*delete it"):
        packed.read("train", 0)
    (tmp_path / "w" / "validation.array_record").write_bytes((tmp_path / "w" / "test.array_record").read_bytes())
    with pytest.raises(InputError, match=r"validation has 4 windows, meta.json says"):
        packed.read("validation", 0)
