"""Twelve tiny runs: four configurations, three seeds; three of them learn from three others.

Question: does a launcher carry each out once, to the same numbers, although it loses one in the middle?
Command: make test-cluster
Expected: yes.
Cost: seconds a run.
"""

import os

import fbi
from fbi.experiment import grid, overlay, seeds
from fbi.train.run import Execution

STEPS = 60
EXECUTION = Execution(checkpoint_every=10, eval_every=20, log_every=5, mesh=os.environ.get("FBI_TEST_MESH", "data=1"))
SMALL = ["vocab=300", "dim=64", "layers=1", "heads=2", "kv_heads=2", "head_dim=32", "ff=128"]


def runs() -> list[fbi.Run]:
    base = overlay(
        fbi.Run(name="tiny", steps=STEPS),
        [f"model.{field}" for field in SMALL]
        + [f"data.corpus=text:{os.environ['FBI_TEST_CORPUS']}", "data.tokenizer=bpe:300", "data.window=32"]
        + ["data.batch=8", "data.validation=0.2", "optimizer.lr=0.01"],
    )
    alone = grid(base, {"policy": ["fp", "fbi", "bitnet-b158"]})
    taught = overlay(base, ["name=tiny-taught", "policy=fbi", "loss=ad", "teacher=@tiny-fp-s{seed}"])
    return seeds([*alone, taught], 3)
