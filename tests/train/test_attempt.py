"""What a read that fails says, and what it leaves behind."""

import contextlib
import gc
import sys
import threading
import time

import jax.numpy as jnp
import pytest

from fbi.train.attempt import Damaged, attempt
from fbi.train.checkpoint import Checkpoints


@contextlib.contextmanager
def busy():
    """Threads that keep the interpreter from whoever waits for it."""
    over = threading.Event()

    def spin():
        while not over.is_set():
            sum(range(1000))

    threads = [threading.Thread(target=spin) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_a_read_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    state = {"params": {f"w{i}": jnp.full((32, 32), i) for i in range(100)}}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {"position": 3})
    checkpoints.close()
    assert checkpoints.read(1, state)[1] == {"position": 3}
    for path in (tmp_path / "1" / "params" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    left: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: left.append(str(found.exc_value)))
    with busy():
        for _ in range(4):
            with pytest.raises(Damaged, match="its params cannot be read"):
                checkpoints.read(1, state)
        time.sleep(0.5)
    gc.collect()
    assert left == []


def test_what_the_machine_lacks_is_no_damage():
    def read():
        raise MemoryError("no memory")

    with pytest.raises(MemoryError):
        attempt(read)


def test_damage_names_the_first_cause():
    def read():
        try:
            raise ValueError("chunk 3 is cut\nand more")
        except ValueError as error:
            raise RuntimeError("while reading") from error

    with pytest.raises(Damaged, match=r"^chunk 3 is cut$"):
        attempt(read)
