"""What a checkpoint every 20 steps costs: stretches of training with one and without, in turns, in one process.

    python benchmarks/checkpoint.py [--pairs 30] [--every 20] [--steps 4]

A stretch with a checkpoint begins with `Checkpoints.save` and ends when the file is whole, so that no stretch pays for
another's; it is shorter than the steps between checkpoints, as the noise of steps that no checkpoint touches would hide
what it costs. The steps are those of `micro`, of batches of 8 x 256 tokens; metrics are read one step late as in the
loop. Medians of the differences of pairs, with the error of the median; CPU time stands beside wall time, since on a
busy machine that holds stiller.
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
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--steps", type=int, default=4, help="steps of a stretch")
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
            for _ in range(options.steps):
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
                cost = found[True].wall - found[False].wall
                print(f"pair {turn}: {found[False].wall:.2f} s without, {cost:+.2f} s with", flush=True)
        took = checkpoints.took or 0.0
        checkpoints.close()
    median = lambda values: statistics.median(list(values))  # noqa: E731
    print(f"state {size:.0f} MB; a step {1e3 * median(a.wall for a, _ in pairs) / options.steps:.0f} ms; "
          f"written in {took:.2f} s")  # fmt: skip
    for name in ("wall", "cpu"):
        every = median(getattr(a, name) for a, _ in pairs) / options.steps * options.every
        costs = [getattr(b, name) - getattr(a, name) for a, b in pairs]
        low, _, high = statistics.quantiles(costs, n=4)
        error = 1.25 * (high - low) / 1.35 / len(costs) ** 0.5  # of a median of normal values, by their quartiles
        print(f"{name}: {median(costs):+.3f} s a checkpoint (quartiles {low:+.3f}, {high:+.3f}): "
              f"{100 * median(costs) / every:.2f} +- {100 * error / every:.2f} % of {options.every} steps")  # fmt: skip
    print(f"within save {1e3 * median(b.held for _, b in pairs):.0f} ms; "
          f"the step after it {1e3 * median(b.first - a.first for a, b in pairs):+.0f} ms; "
          f"still writing after the last step {1e3 * median(b.tail for _, b in pairs):.0f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
