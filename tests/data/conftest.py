import os
import random
from pathlib import Path

import pytest

from fbi.data import DataConfig, prepare

TEXT = "the state of union is a strong one and we shall keep it so for all who come after us in peace"


def _write_documents(folder: Path, count: int = 60, words: int = 120) -> Path:
    """`count` small text files of random sentences, the same on every call."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number:03}.txt").write_text(
            " ".join(draw.choices(TEXT.split(), k=words)) + f"\nNumber {number}.\n"
        )
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache for every test."""
    monkeypatch.setenv("FBI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text_folder(tmp_path):
    return _write_documents(tmp_path / "text")


@pytest.fixture
def config(text_folder):
    return DataConfig(corpus=f"text:{text_folder}", tokenizer="bpe:300", window=16, validation=0.2, test=0.1)


@pytest.fixture(scope="session")
def windows(tmp_path_factory):
    """Small prepared windows, for tests that only read."""
    home = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FBI_CACHE", str(home / "cache"))
        folder = _write_documents(home / "text")
        return prepare(DataConfig(f"text:{folder}", tokenizer="bpe:300", window=16, validation=0.2, test=0.1))


@pytest.fixture
def environment(cache):
    """The environment of a subprocess that shares this test's cache."""
    return os.environ | {"FBI_CACHE": str(cache)}
