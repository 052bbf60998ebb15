"""What a token costs when a whole model decodes with MLPs that skip half of their experts, against dense decoding.

    python benchmarks/sparse_decode.py [--models llama-7b,smollm2-135m] [--sparsity 0.5] [--rounds 9]

Greedy decoding of one sequence after 64 tokens in a cache of 512, a compiled step at a time with the cache donated;
weights are random, and routers such that each token uses about the wanted share of experts. `llama-7b` has two layers
of LLaMA-7B, and 2/32 of its vocabulary, so that the head keeps its share of the whole; `smollm2-135m` is whole. Dense
candidates: the model without routers as XLA multiplies it, and the kernel with every expert on; the faster is the
baseline. Variants take turns, a ratio is the median over rounds of the ratio within a round. The share of the FFN is
what is missing from a token that skips all experts; by Amdahl's law no more than that share times the sparsity can be
won. LTE, arXiv 2402.06126, section 5.4, reports about a quarter less time at half of the experts.
"""

import argparse
import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from sparse_ffn import EXPERT, bandwidth, load

from fbi.model import Model
from fbi.model.axes import mesh_1x1
from fbi.model.config import PRESETS, ModelConfig
from fbi.serve.decode import decode_step, sparse, unstacked

LAYERS = 2  # of 32
LLAMA = PRESETS["llama2-7b"]
MODELS = {
    "llama-7b": dataclasses.replace(LLAMA, layers=LAYERS, vocab=LLAMA.vocab * LAYERS // LLAMA.layers, expert=EXPERT),
    "smollm2-135m": dataclasses.replace(PRESETS["smollm2-135m"], expert=EXPERT),
}
ROOM, START, TOKENS = 512, 64, 4  # of the cache; where decoding begins; tokens of one measurement


class Decoding:
    """A model that adds a token at a time to one sequence."""

    def __init__(self, model: Model, params: Any):
        self.params, self.step, self.position = params, decode_step(model), START
        self.caches = model.empty_cache(1, ROOM)
        self.token = jnp.ones((1, 1), jnp.int32)
        self.seconds()  # compiled, and its weights seen

    def seconds(self) -> float:
        """Of one token, over a few."""
        began = time.perf_counter()
        for _ in range(TOKENS):
            logits, self.caches = self.step(self.params, self.token, self.caches, jnp.int32(self.position))
            self.token = jnp.argmax(logits, -1)[:, None].astype(jnp.int32)
            self.position = START + (self.position + 1 - START) % (ROOM - START)
        jax.block_until_ready((self.token, self.caches))
        return (time.perf_counter() - began) / TOKENS


def shifted(params: Any, share: float) -> Any:
    """Parameters whose routers use about this share of experts: their logits are standard normal for normed inputs."""
    level = 100.0 if share == 1 else -100.0 if share == 0 else statistics.NormalDist().inv_cdf(share)

    def moved(path: Any, leaf: jax.Array) -> jax.Array:
        names = [entry.key for entry in path]
        return jnp.full_like(leaf, level) if names[-2:] == ["router", "bias"] else leaf

    return jax.tree_util.tree_map_with_path(moved, params)


def size(params: Any, config: ModelConfig) -> tuple[int, int]:
    """Bytes of all weights that a token multiplies, and of those the MLPs'; of an untied embedding it reads one row."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    names = [([entry.key for entry in path], leaf.nbytes) for path, leaf in flat]
    read = sum(n for path, n in names if config.tied or path[0] != "embed")
    return read, sum(n for path, n in names if "mlp" in path and "router" not in path)


def measure(name: str, sparsity: float, method: str, rounds: int) -> None:
    """Prints the table of one model."""
    config = MODELS[name]
    plain = dataclasses.replace(config, expert=0)
    routed = Model(dataclasses.replace(config, routing="hard"))
    params = routed.init(0)
    served, packed = sparse(routed, params, method)
    whole, mlps = size(packed, config)
    alone = jax.tree.map(lambda leaf: leaf, params)  # dictionaries of its own, the same arrays
    for part in [alone[key] for key in alone if key.startswith("layers_")]:
        del part["mlp"]["router"]
    dense, apart = unstacked(Model(plain), alone)
    del params, alone  # stacks; what follows has copies
    variants = {"dense, XLA": Decoding(dense, apart)}
    for share, label in (
        (1.0, "kernel, all"),
        (1 - sparsity, f"kernel, {100 * (1 - sparsity):.0f} %"),
        (0.0, "no FFN"),
    ):
        variants[label] = Decoding(served, shifted(packed, share))
    sparse_label = list(variants)[2]
    tried = [{label: run.seconds() for label, run in variants.items()} for _ in range(rounds)]
    median = {label: statistics.median(times[label] for times in tried) for label in variants}
    best = min(("dense, XLA", "kernel, all"), key=lambda label: median[label])
    ratio = {label: statistics.median(times[label] / times[best] for times in tried) for label in variants}
    speed = bandwidth()
    share = 1 - ratio["no FFN"]
    print(f"\n{name}: {config.layers} layers of {config.dim} x {config.ff}, vocabulary {config.vocab}, {config.dtype}")
    print(
        f"a token multiplies {whole / 1e6:.0f} MB, {100 * mlps / whole:.0f} % in MLPs; reading {speed / 1e9:.1f} GB/s"
    )
    print(f"{'variant':14} {'ms a token':>10} {'x best dense':>13} {'GB/s':>6} {'floor ms':>9}")
    for label, part in zip(variants, (1.0, 1.0, 1 - sparsity, 0.0), strict=True):
        read = whole - (1 - part) * mlps
        print(f"{label:14} {1e3 * median[label]:10.3f} {ratio[label]:13.3f} {read / median[label] / 1e9:6.1f} "
              f"{1e3 * read / speed:9.3f}")  # fmt: skip
    print(
        f"best dense: {best}; FFN {100 * share:.0f} % of its time, so at most {100 * share * sparsity:.0f} % less at "
        f"{100 * sparsity:.0f} % sparsity; measured {100 * (1 - ratio[sparse_label]):.0f} % less",
        flush=True,
    )


def main() -> None:
    """Prints a table for each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--method", default="auto", help="gather, loop or native; auto: the best there is here")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, {load()}")
    jax.set_mesh(mesh_1x1())
    for name in options.models.split(","):
        measure(name, options.sparsity, options.method, options.rounds)
    print(f"\nat the end: {load()}")


if __name__ == "__main__":
    main()
