"""Peak memory of the loss and its gradient, of whole logits and of logits in chunks; from the compiled programs.

    python benchmarks/loss_memory.py [--vocab 32000] [--batch 8] [--window 2048] [--dim 512] [--loss mix]

Final hidden states and heads of a student and a teacher go in, the loss and the gradient of the student's come out.
What counts is what the program needs beside those: the temporary arrays, as the compiler laid them out. Nothing is
run, so that this needs no such memory.
"""

import argparse

import jax
import jax.numpy as jnp

from fbi.loss import Loss, Outputs, Readout, chunked, read_out
from fbi.model.dense import Product
from fbi.train import mesh as meshes


def temporary(loss: Loss, options: argparse.Namespace, size: int) -> int:
    """Bytes of temporary arrays of the value and gradient, in chunks of `size` tokens; 0: whole logits."""
    logits = jax.P("data", None, "model")

    def total(x: jax.Array, w: jax.Array, known: jax.Array, head: jax.Array, labels: jax.Array) -> jax.Array:
        student = Product(x, w, jax.lax.stop_gradient(w))
        if not size:
            own, taught = (jnp.dot(*pair, out_sharding=logits) for pair in ((x, w), (known, head)))
            return loss(Outputs(own, labels, taught))[0]
        same = lambda y, product: y  # noqa: E731
        readouts = Readout(student, same), read_out(Product(known, head, head), same)
        return chunked(loss, Outputs(None, labels), *readouts, size)[0]

    b, t, d, v = options.batch, options.window, options.dim, options.vocab
    mesh = jax.sharding.get_mesh()
    hidden = jax.ShapeDtypeStruct((b, t, d), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("data")))
    head = jax.ShapeDtypeStruct((d, v), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(None, "model")))
    labels = jax.ShapeDtypeStruct((b, t), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P("data", None)))
    step = jax.jit(jax.value_and_grad(total, (0, 1)))
    found = step.lower(hidden, head, hidden, head, labels).compile().memory_analysis()
    assert found is not None  # a CPU tells
    return found.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("vocab", 32_000), ("batch", 8), ("window", 2048), ("dim", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--loss", default="mix")
    options = parser.parse_args()
    loss = Loss.parse(options.loss)
    print("| tokens in a chunk | temporary MiB | of whole |\n|---:|---:|---:|")
    with jax.set_mesh(meshes.make({"data": 1, "model": 1})):
        whole = temporary(loss, options, 0)
        print(f"| whole | {whole / 2**20:,.0f} | 1 |", flush=True)
        for size in (4096, 1024, 256):
            used = temporary(loss, options, size)
            print(f"| {size} | {used / 2**20:,.0f} | 1/{whole / used:.1f} |", flush=True)


if __name__ == "__main__":
    main()
