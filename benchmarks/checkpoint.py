"""What a checkpoint every 20 steps costs: stretches of training with one and without, in turns, in one process.

    python benchmarks/checkpoint.py [--pairs 5] [--every 20]

A stretch with a checkpoint begins with `Checkpoints.save` and ends when the file is whole, so that no stretch pays for
another's. The steps are those of `micro` with batches of 8 x 256 tokens; metrics are read one step late, as the loop
does. Medians over pairs; CPU time stands beside wall time, since on a busy machine only that holds still.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fbi import optim
from fbi.loss import Loss
from fbi.model import Model
from fbi.model.config import preset
from fbi.policy import Policy
from fbi.train import mesh as meshes
from fbi.train.checkpoint import Checkpoints
from fbi.train.step import State, init_state, make_step

BATCH, WINDOW = 8, 256


class Stretch(NamedTuple):
    """Seconds."""

    wall: float
    cpu: float
    held: float
    """Within `save`: what the loop waits for."""
    first: float
    """The first step: it waits for the copy of the state, which the devices make before it."""
    tail: float
    """After the last step, until the checkpoint was whole."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--policy", default="fbi")
    options = parser.parse_args()
    model, tx = Model(preset("micro"), Policy.parse(options.policy)), optim.build(optim.OptimizerConfig(), 10_000)
    mesh = meshes.make({"data": 1, "model": 1})
    jax.set_mesh(mesh)
    rows = np.random.default_rng(0).integers(0, model.config.vocab, (BATCH, WINDOW + 1)).astype(np.int32)
    tokens, progress = meshes.put_batch(rows, mesh), jax.device_put(np.float32(0))
    step: Any = make_step(model, Loss.parse("ce"), tx)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        state = init_state(model, tx, jax.random.key(0))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
        number = 0

        def stretch(state: State, save: bool) -> tuple[State, Stretch]:
            nonlocal number
            jax.block_until_ready(state)
            began, cpu, held, first, pending = time.perf_counter(), time.process_time(), 0.0, 0.0, None
            if save:
                number += 1
                checkpoints.save(number, state, {})
                held = time.perf_counter() - began
            for _ in range(options.every):
                state, sums = step(state, None, tokens, progress)
                if pending is not None:
                    jax.block_until_ready(pending)
                    first = first or time.perf_counter() - began - held
                pending = sums
            jax.block_until_ready(pending)
            trained = time.perf_counter()
            checkpoints.wait()
            ended = time.perf_counter()
            return state, Stretch(ended - began, time.process_time() - cpu, held, first, ended - trained)

        pairs: list[tuple[Stretch, Stretch]] = []
        for turn in range(options.pairs + 1):  # the first warms up
            order = (False, True) if turn % 2 else (True, False)
            found = {}
            for save in order:
                state, found[save] = stretch(state, save)
            if turn:
                pairs.append((found[False], found[True]))
                print(f"pair {turn}: {found[False].wall:.2f} s without, {found[True].wall:.2f} s with", flush=True)
        took = checkpoints.took or 0.0
        checkpoints.close()
    median = lambda values: statistics.median(list(values))  # noqa: E731
    plain = median(a.wall for a, _ in pairs)
    print(f"state {size:.0f} MB; a step {1e3 * plain / options.every:.0f} ms; written in {took:.2f} s")
    print(f"share of wall time {100 * median(b.wall / a.wall - 1 for a, b in pairs):+.2f} %, "
          f"of CPU time {100 * median(b.cpu / a.cpu - 1 for a, b in pairs):+.2f} %")  # fmt: skip
    print(f"within save {1e3 * median(b.held for _, b in pairs):.0f} ms "
          f"({100 * median(b.held for _, b in pairs) / plain:.2f} %); "
          f"the step after it {1e3 * median(b.first - a.first for a, b in pairs):+.0f} ms; "
          f"still writing after the last step {1e3 * median(b.tail for _, b in pairs):.0f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
