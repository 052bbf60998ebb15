import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest

from fbi.data import prepare
from fbi.errors import InputError

MAKE = """
import sys, time
from fbi.data import DataConfig, prepare, text_files
config = DataConfig("text:{folder}", tokenizer="bpe:300", window={window}, validation=0.2, test=0.1)
"""


def snapshot(folder):
    """Content of every file that the cache serves, by path."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def run(program, environment):
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


def test_preparing_again_makes_nothing_anew(config, cache, monkeypatch):
    first = prepare(config)
    before = {
        p: p.stat().st_mtime_ns for name in ("corpora", "tokenizers", "windows") for p in cache.glob(f"{name}/**/*")
    }
    monkeypatch.setattr("fbi.data.tokenizer.train_bpe", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr("fbi.data.text_files.read_documents", lambda *_: pytest.fail("read again"))
    second = prepare(dataclasses.replace(config, batch=5, seed=7))  # these change the order, not the windows
    assert second.folder == first.folder
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert len(before) > 10


def test_other_inputs_are_prepared_apart(config, text_folder):
    folders = {prepare(config).folder}
    folders.add(prepare(dataclasses.replace(config, window=8)).folder)
    folders.add(prepare(dataclasses.replace(config, tokenizer="bpe:280")).folder)
    folders.add(prepare(dataclasses.replace(config, test=0.2)).folder)
    (text_folder / "000.txt").write_text("something else entirely\n")
    folders.add(prepare(config).folder)
    assert len(folders) == 5


def test_a_tokenizer_file_is_taken_as_it_is(config, tmp_path):
    first = prepare(config)
    path = tmp_path / "mine.json"
    first.tokenizer.save(path)
    assert prepare(dataclasses.replace(config, tokenizer=str(path))).folder == first.folder
    with pytest.raises(InputError, match=r"cannot read .*none.json"):
        prepare(dataclasses.replace(config, tokenizer=str(tmp_path / "none.json")))


PAUSE = {
    "corpora": """
real = text_files.read_documents
calls = []
def slow(file, field):
    calls.append(file)
    if len(calls) == 100:  # the first 60 are the look at all files, the next 60 are written
        print("paused", file=sys.__stdout__, flush=True); time.sleep(60)
    return real(file, field)
text_files.read_documents = slow
prepare(config)
""",
    "windows": """
def pause(done, total, unit):
    print("paused", file=sys.__stdout__, flush=True); time.sleep(60)
prepare(config, pause)
""",
}


@pytest.mark.parametrize("stage", PAUSE)
def test_a_killed_preparation_is_made_again_and_gives_the_same(
    stage, config, text_folder, cache, tmp_path, environment
):
    program = MAKE.format(folder=text_folder, window=16) + PAUSE[stage]
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "paused\n"
        half = [p.name for p in (cache / stage).iterdir()]
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(half) == 1  # it was in the middle: the temporary folder, and not yet the whole one
    assert half[0].startswith(".")
    again = prepare(config)

    straight = tmp_path / "straight"
    done = run(
        MAKE.format(folder=text_folder, window=16) + "prepare(config)", environment | {"FBI_CACHE": str(straight)}
    )
    assert done.returncode == 0, done.stderr
    assert snapshot(again.folder) == snapshot(straight / "windows" / again.folder.name)
    assert len(snapshot(again.folder)) == 5


@pytest.mark.parametrize(("stage", "limit"), [("corpora", 4000), ("windows", 4000)])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_made(stage, limit, config, text_folder, cache, environment):
    for path in text_folder.iterdir():  # changed in an hour: no hash is kept, whose file would be the one too large
        os.utime(path, (time.time() + 3600,) * 2)
    if stage == "windows":
        prepare(config)
    limited = f"""
import resource
from fbi.errors import InputError
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    prepare(config)
except InputError as error:
    print(error); sys.exit(2)
"""
    before = snapshot(cache)
    done = run(MAKE.format(folder=text_folder, window=4) + limited, environment)
    assert done.returncode == 2, done.stderr
    assert done.stdout.count("\n") == 1
    assert "cannot write the " in done.stdout
    assert "File too large" in done.stdout
    assert "free some space or set FBI_CACHE" in done.stdout
    after = {name: value for name, value in snapshot(cache).items() if not name.startswith("hashes")}
    assert after == {name: value for name, value in before.items() if not name.startswith("hashes")}
    assert list(cache.rglob(".*")) == []
    assert prepare(dataclasses.replace(config, window=4)).window == 4


def test_a_cache_that_cannot_be_made_is_one_line(config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FBI_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="cannot create the folder"):
        prepare(config)


def test_two_processes_may_prepare_at_once(config, text_folder, environment):
    program = MAKE.format(folder=text_folder, window=16) + "print(prepare(config).folder)"
    command = [sys.executable, "-c", program]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert folders == {str(prepare(config).folder)}


def test_a_cached_preparation_takes_a_moment(config):
    prepare(config)
    start = time.perf_counter()
    prepare(config)
    assert time.perf_counter() - start < 0.5
