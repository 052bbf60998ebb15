"""What the experiments share at small scale: one model, one corpus, one budget, so that they share runs as well.

nano (two layers of width 128) on the Addresses of the Union, 400 steps of 1,024 tokens, three paired seeds. At this
size a run takes about a minute on one core; effects below about 0.01 nats drown in the spread over seeds.
"""

import dataclasses

from fbi.data.config import DataConfig
from fbi.experiment import seeds, variants
from fbi.model.config import preset
from fbi.optim.config import OptimizerConfig
from fbi.train.run import Execution, Run

SEEDS = 3
MINI = Run(model=preset("nano"), policy="fp", data=DataConfig(batch=8), optimizer=OptimizerConfig(lr=3e-3), steps=400)
EXECUTION = Execution(eval_every=0, checkpoint_every=400, keep_last=1, log_every=20, unroll=1, diagnose_every=100)
TEACHER = "@fp-s{seed}"


def block(weight: str, activation: str = "none") -> str:
    """The policy that gives every linear layer of the blocks these two methods."""
    given = ";".join(f"{operand}={text}" for operand, text in (("w", weight), ("a", activation)) if text != "none")
    return f"layers.*.attn.{{q,k,v,o}}: {given} | layers.*.mlp.*: {given}"


def both(method: str) -> str:
    """The policy that gives every linear layer of the blocks one method, for its weight and its input."""
    return block(method, method)


def mini(named: dict[str, dict]) -> list[Run]:
    """Variants of the small run, each with every seed."""
    return seeds(variants(MINI, named), SEEDS)


def policies(named: dict[str, str]) -> list[Run]:
    """The small run under each policy, with every seed."""
    return mini({name: {"policy": policy} for name, policy in named.items()})


def full_precision() -> list[Run]:
    """What every experiment compares with, and every student's teacher: one per seed."""
    return policies({"fp": "fp"})


def scaled(run: Run, **changes) -> Run:
    """A run at paper scale: fields of the run and of its data (window, batch, corpus, tokenizer) replaced."""
    data = {name: changes.pop(name) for name in ("window", "batch", "corpus", "tokenizer") if name in changes}
    return dataclasses.replace(run, data=dataclasses.replace(run.data, **data), **changes)
