"""QuEST's gradient alignment by depth (arXiv 2502.05003, section 4): how much of the gradient survives quantization.

Question: does the trust gradient with the Hadamard transform keep the gradient's direction through the layers where
trust alone and the plain straight-through estimator lose it? Alignment is the cosine to the gradient at the same
weights with activation quantization switched off.
Command: python -m experiments.quest_alignment runs/repro/fp-l4-be68137d --out docs/results
Expected: alignment falls towards the first layer; highest with Hadamard and trust. The published numbers are of a
30M model trained at 8 bits; here the weights are those of any finished run, such as the four-layer ones of `quest`.
Cost: about a minute on one core.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.mini import both
from fbi.analysis.codes import Ratio
from fbi.analysis.gradients import gradient_alignment
from fbi.data import Batches, prepare
from fbi.errors import InputError
from fbi.files import write_text
from fbi.loss import Loss
from fbi.model import Model
from fbi.model.axes import mesh_1x1
from fbi.policy import Policy
from fbi.report.table import Column, Table
from fbi.train.load import load
from fbi.train.rundir import read_run
from fbi.train.step import make_objective

PAPER = "QuEST, 2502.05003"
# label, method at a bit-width, and the paper's cosines at 8 bits: the last feed-forward layer, the first attention
METHODS = (
    ("Hadamard, trust", "quest:bits={b}", (0.988, 0.828)),
    ("trust", "quest:bits={b},block=0", (0.762, 0.053)),
    ("plain STE", "ste:bits={b}", (0.798, 0.009)),
    ("Hadamard, plain gradient", "quest:bits={b},surrogate=identity", None),
)
BITS = (8, 4, 2, 1)
SITES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")


def by_layer(found: Mapping[str, Ratio], layers: int) -> list[float]:
    """The mean cosine over the sites of each layer, the last layer first."""
    return [
        statistics.fmean(float(found[f"layers.{layer}.{site}"].value) for site in SITES)
        for layer in reversed(range(layers))
    ]


def aligned(model: Model, params: dict, batches: Sequence[jax.Array]) -> dict[str, Ratio]:
    """`gradient_alignment` of next-token prediction on each batch [b, t+1], pooled."""
    objective = make_objective(Loss.parse("ce"))

    @jax.jit
    def measure(at: dict, tokens: jax.Array) -> dict[str, Ratio]:
        loss = lambda some, p: objective(some, p, None, tokens, jnp.float32(1.0))[0]  # noqa: E731
        return gradient_alignment(model, at, loss)

    with jax.set_mesh(mesh_1x1()):
        parts = [measure(params, tokens) for tokens in batches]
    return {site: jax.tree.map(lambda *values: sum(values), *(part[site] for part in parts)) for site in parts[0]}


def table(directory: Path, count: int = 4, bits: Sequence[int] = BITS) -> Table:
    """A row a method and bit-width: cosine by layer on `count` batches of the run's own training data."""
    run = read_run(directory)
    source, params, _ = load(directory)
    if source.policy != Policy.parse("fp"):
        raise InputError(f"{directory} was trained under {run.policy!r}; give a run in full precision, policy=fp")
    batches = Batches(prepare(run.data), batch=run.data.batch, seed=run.data.seed + 1)
    tokens = [jnp.asarray(batches.batch_at(step)) for step in range(count)]
    rows = []
    for b in bits:
        for label, method, published in METHODS:
            model = Model(run.model, Policy.parse(both(method.format(b=b))))
            found = aligned(model, params, tokens)
            ends = [float(found[site].value) for site in (f"layers.{run.model.layers - 1}.mlp.down", "layers.0.attn.q")]
            paper = f"{published[0]:.3f} to {published[1]:.3f}" if published and b == 8 else None
            rows.append([label, b, *by_layer(found, run.model.layers), *ends, paper])
    layers = [Column(f"layer {layer}", ".3f") for layer in reversed(range(run.model.layers))]
    columns = [Column("activations"), Column("bits", "d"), *layers, Column("last down", ".3f"),
               Column("first q", ".3f"), Column(f"{PAPER}, 30M")]  # fmt: skip
    note = f"cosine to the gradient without activation quantization, {count} batches, weights of {directory.name}"
    return Table(columns, rows, "QuEST: alignment of the gradient by depth, last layer first", [note])


def main(arguments: list[str] | None = None) -> int:
    """Prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="directory of a finished run in full precision")
    parser.add_argument("--batches", type=int, default=4, help="batches that the gradients are taken on")
    parser.add_argument("--out", type=Path, help="directory for quest_alignment.md")
    options = parser.parse_args(arguments)
    made = table(options.run, options.batches)
    print(made.terminal())
    if options.out:
        write_text(options.out / "quest_alignment.md", made.markdown())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"quest_alignment: error: {error}")
