"""Dashboards get the numbers of metrics.jsonl, read back from their own files."""

import json
import struct
import sys

import pytest
from support import tiny, write_corpus

import fbi
from fbi.errors import InputError
from fbi.train.run import Execution
from fbi.train.sinks import names, numbers, opened


def events(folder):
    """(step, name, value) of every scalar in a folder; a record is length, checksum, data, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += 16 + length
    return found


def test_tensorboard_has_what_the_record_has(tmp_path):
    run = tiny(write_corpus(tmp_path / "corpus"), steps=6)
    execution = Execution(mesh="data=1", log_every=2, eval_every=3, sinks="tensorboard")
    fbi.train(run, tmp_path / "run", execution)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    wanted = sorted((row["step"], name, value) for row in rows for name, value in numbers(row).items())
    found = sorted(events(tmp_path / "run" / "tensorboard"))
    assert [(step, name) for step, name, _ in found] == [(step, name) for step, name, _ in wanted]
    assert [value for *_, value in found] == pytest.approx([value for *_, value in wanted], rel=1e-6)
    assert (6, "eval/validation/loss") in [(step, name) for step, name, _ in found]


def test_a_row_becomes_named_numbers():
    row = {
        "kind": "scales",
        "step": 3,
        "site": "layers.0.mlp.up",
        "alpha": {"mean": 0.5, "std": 1},
        "note": "x",
        "on": True,
    }
    assert numbers(row) == {"scales/layers.0.mlp.up/alpha/mean": 0.5, "scales/layers.0.mlp.up/alpha/std": 1.0}
    assert numbers({"kind": "train", "step": 1, "loss": 2, "skipped": None}) == {"train/loss": 2.0}


def test_unknown_and_missing_sinks_are_one_line(tmp_path, monkeypatch):
    assert names(" tensorboard, trackio ") == ["tensorboard", "trackio"]
    with pytest.raises(InputError, match=r"unknown sink 'wandb'; valid: tensorboard, trackio"):
        names("tensorboard,wandb")
    monkeypatch.setitem(sys.modules, "trackio", None)
    run = tiny(tmp_path)
    with pytest.raises(InputError, match=r"pip install 'fbi\[dashboards\]'"), opened("trackio", run, tmp_path):
        pass
