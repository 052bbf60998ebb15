import gzip
import json

import pytest
import zstandard

from fbi.data.text_files import find_files, read_documents
from fbi.errors import InputError

PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def documents(path, field="text"):
    return [text for file in find_files(path) for text in read_documents(file, field)]


@pytest.mark.parametrize("packed", PACK)
def test_text_and_json_lines_are_read_plain_and_compressed(tmp_path, packed):
    lines = "\n".join(json.dumps({"text": text}) for text in ("one\u2028", "two\x00", "", " \n")) + "\n\n"
    (tmp_path / f"b.jsonl{packed}").write_bytes(PACK[packed](lines.encode()))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / f"c.md{packed}").write_bytes(PACK[packed]("\ufeff# Grüße 🎉\r\n".encode()))
    (tmp_path / f"a.txt{packed}").write_bytes(PACK[packed](b"a" * 3_000_000))
    (tmp_path / "d.txt").write_bytes(b"")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "e.txt").write_text("no")
    (tmp_path / "f.py").write_text("no")
    assert documents(tmp_path) == ["a" * 3_000_000, "one\u2028", "two\x00", "# Grüße 🎉\r\n"]


def test_frames_after_one_another_are_one_file(tmp_path):
    for suffix, pack in list(PACK.items())[1:]:
        file = tmp_path / f"a.txt{suffix}"
        file.write_bytes(pack(b"one ") + pack(b"two"))
        assert documents(file) == ["one two"]


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.doc", b"text", "a.doc has an unknown suffix; valid: .txt, .txt.gz"),
        ("a.txt", b"fine\xff", "a.txt is not UTF-8 text: invalid start byte at byte 4"),
        ("a.txt", b"fine\x00", "a.txt is not text: NUL at byte 4"),
        ("a.txt.gz", gzip.compress(b"fi\x00", mtime=0), "a.txt.gz is not text: NUL at byte 2"),
        ("a.jsonl", GOOD + b"\xff", "a.jsonl:2 is not UTF-8 text: invalid start byte at byte 17"),
        ("a.jsonl", GOOD + b"{oops}\n", "a.jsonl:2 is not JSON: Expecting property name"),
        ("a.jsonl", GOOD + b"[" * 100_000, "a.jsonl:2 is not JSON: too deep"),
        ("a.jsonl", GOOD + b"[1]\n", "a.jsonl:2 is a JSON list"),
        ("a.jsonl", GOOD + b'{"b": 1, "a": 2}\n', "a.jsonl:2 has no field 'text'; fields present: a, b; choose one"),
        ("a.jsonl", GOOD + b"{}\n", "a.jsonl:2 has no field 'text'; fields present: none"),
        ("a.jsonl", GOOD + b'{"text": 3}\n', "a.jsonl:2: field 'text' is of type int; a document must be a string"),
        ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n', "a.jsonl:2: field 'text' holds a lone surrogate at character 0"),
        ("a.txt.gz", b"not gzip", "a.txt.gz is not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "a.txt.gz is not a whole gzip file"),
        ("a.txt.zst", b"not zstd", "a.txt.zst is not a whole zstd file"),
        ("a.txt.zst", PACK[".zst"](b"text" * 99)[:-3], "a.txt.zst is not a whole zstd file"),
        ("a.txt.zst", b"", "a.txt.zst is not a whole zstd file: it ends early"),
    ],
)
def test_a_bad_file_is_one_line_that_says_where(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        documents(tmp_path / name)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_path_and_an_empty_folder_are_errors(tmp_path):
    with pytest.raises(InputError, match=r"no file or folder .*nowhere"):
        find_files(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no text file; valid suffixes: .txt"):
        find_files(tmp_path)


def test_an_unreadable_file_is_an_error(tmp_path):
    file = tmp_path / "a.txt"
    file.symlink_to(tmp_path / "gone.txt")
    with pytest.raises(InputError, match=r"cannot read .*a.txt: No such file"):
        list(read_documents(file, "text"))
