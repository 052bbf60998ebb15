"""The time of each diagnostic as a share of a training step, on the nano model: medians of interleaved rounds.

    python benchmarks/diagnostics.py [--rounds 7] [--policy fbi]

At `diagnose_every=100` a diagnostic that takes as long as two steps adds 2 % to a run.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from fbi import optim
from fbi.analysis import Diagnostics
from fbi.analysis.batch import activations, alignment
from fbi.analysis.names import NAMES
from fbi.loss import Loss
from fbi.model import Model
from fbi.model.config import PRESETS
from fbi.policy import Policy
from fbi.train import mesh as meshes
from fbi.train.run import Execution
from fbi.train.step import init_state, make_objective, make_step

BATCH, WINDOW = 32, 128


def main() -> None:
    """Prints a row for each diagnostic, and one for the default ones together."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--policy", default="fbi")
    options = parser.parse_args()
    model, loss = Model(PRESETS["nano"], Policy.parse(options.policy), unroll=4), Loss.parse("ce")
    tx = optim.build(optim.OptimizerConfig(), 100)
    mesh = meshes.make({"data": 1, "model": 1})
    rows = np.random.default_rng(0).integers(0, 1024, (BATCH, WINDOW + 1)).astype(np.int32)
    jax.set_mesh(mesh)
    state, progress = init_state(model, tx, jax.random.key(0)), jax.device_put(np.float32(0))
    tokens, step = meshes.put_batch(rows, mesh), make_step(model, loss, tx)
    batch = {"activations": activations(model, lambda x: None), "alignment": alignment(model, make_objective(loss))}
    kinds = {name: Diagnostics(model, name, batch) for name in NAMES}
    kinds["default: " + Execution().diagnostics] = Diagnostics(model, Execution().diagnostics, batch)
    times: dict[str, list[float]] = {name: [] for name in ("step", *kinds)}
    for _ in range(options.rounds + 1):
        for name, diagnostics in kinds.items():
            began = time.perf_counter()
            held = diagnostics.before(state["params"], None, tokens, progress)
            diagnostics.rows(diagnostics.after(held, state["params"], progress), 1)
            times[name].append(time.perf_counter() - began)
        began = time.perf_counter()
        state, sums = step(state, None, tokens, progress)
        jax.block_until_ready(sums)
        times["step"].append(time.perf_counter() - began)
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}  # the first compiles
    for name, seconds in medians.items():
        print(f"{name:45} {1e3 * seconds:8.1f} ms  {seconds / medians['step']:6.2f} steps")


if __name__ == "__main__":
    main()
