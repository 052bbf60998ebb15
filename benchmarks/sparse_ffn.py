"""What a feed-forward layer costs that reads only its active experts, router included, against the best dense one.

    python benchmarks/sparse_ffn.py [--shapes llama-7b,smollm2-135m] [--batches 1,4,16] [--dtype float32] [--rounds 7]

Masks are random at each sparsity, the same for all formulations; rows of a batch choose independently (`--shared`: they
choose alike), so that a batch reads the union, in the column `read`. A sparse time is of the whole layer as it is
served: router (x @ W_r [d, ff / 32], sigmoid, threshold), then the experts it chose; the router's weights are such that
its choice is the mask. Dense candidates, without a router: XLA's product with all weights [in, out] (or [out, in], or
with one row more: the fastest formulation differs by type and batch), and the C++ kernel with every expert on; the best
of them is the baseline of every ratio. Each sparse call is paired with a call of the baseline right before it, pairs of
all variants take turns, and a ratio is the median over rounds of the ratio within a pair, so that what else the machine
does meets both sides. The floor is the time to read the weights in use at the bandwidth that reading a large array
reaches in the same run, by XLA and by the kernel.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbi.errors import InputError
from fbi.model.config import PRESETS
from fbi.serve import native
from fbi.serve.ffn import METHODS, packed_ffn
from fbi.serve.packed import Packed, pack

EXPERT = 32
SHAPES = {"llama-7b": "llama2-7b", "smollm2-135m": "smollm2-135m"}
SPARSITIES = (0.0, 0.25, 0.5, 0.75, 0.9)
THRESHOLD = 0.5
Call = Callable[[], Any]


def timed(call: Call) -> float:
    """Seconds of one call, waiting for its result."""
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def dense_calls(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, packed: Packed) -> dict[str, Call]:
    """down(silu(x gate) * (x up)) as XLA is given it, and as the kernel computes it with nothing to skip."""

    @jax.jit
    def plain(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    @jax.jit
    def turned(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return (jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down.T

    @jax.jit
    def whole(x: jax.Array, packed: Packed) -> jax.Array:
        return packed_ffn(x, packed, jnp.ones((len(x), len(packed.down)), bool), "silu", "native")

    kernel: dict[str, Call] = {"kernel": lambda: whole(x, packed)} if native.available() else {}
    rows = jnp.concatenate([x, x[:1]])
    other = [w.T + 0 for w in (gate, up, down)]
    return {
        "[in, out]": lambda: plain(x, gate, up, down),
        "[in, out], a row more": lambda: plain(rows, gate, up, down),
        "[out, in], a row more": lambda: turned(rows, *other),
        **kernel,
    }


def router_for(x: jax.Array, active: np.ndarray, key: jax.Array) -> jax.Array:
    """W_r [d, n] for which sigmoid(x W_r) > 1/2 exactly where `active` [t, n] says; t at most d."""
    noise = jax.random.normal(key, (x.shape[1], active.shape[1])) * 0.01
    wanted = np.where(active, 2.0, -2.0)
    wide = np.asarray(x, np.float64)
    fix = np.linalg.lstsq(wide, wanted - wide @ np.asarray(noise, np.float64), rcond=None)[0]
    return noise + jnp.asarray(fix, noise.dtype)


def sparse_call(method: str, x: jax.Array, packed: Packed, active: np.ndarray, key: jax.Array) -> Call:
    """Router and experts, compiled as one program."""
    router = router_for(x, active, key).astype(x.dtype)
    cap = int(active.any(0).sum()) if method == "gather" else None

    @jax.jit
    def layer(x: jax.Array, router: jax.Array, packed: Packed) -> jax.Array:
        chosen = jax.nn.sigmoid(x @ router) > THRESHOLD
        return packed_ffn(x, packed, chosen, "silu", method, cap=cap)

    return lambda: layer(x, router, packed)


def bandwidth(megabytes: int = 512) -> float:
    """Bytes a second of summing a large array in float32."""
    block = jnp.ones((megabytes << 20) // 4, jnp.float32)
    total = jax.jit(lambda x: jnp.sum(x.reshape(64, -1, 16), (0, 1)))
    return block.nbytes / min(timed(lambda: total(block)) for _ in range(5))


class Layer:
    """The weights of one shape, made once for all batches."""

    def __init__(self, shape: str, dtype: str, seed: int):
        config = PRESETS[SHAPES[shape]]
        self.name, self.dtype, self.seed = shape, dtype, seed
        self.d, self.ff, self.n = config.dim, config.ff, config.ff // EXPERT
        self.size = 3 * self.d * self.ff * jnp.dtype(dtype).itemsize
        rng = np.random.default_rng(seed)

        def drawn(rows: int, columns: int) -> jax.Array:
            return jnp.asarray(rng.standard_normal((rows, columns), np.float32) * rows**-0.5).astype(dtype)

        self.weights = drawn(self.d, self.ff), drawn(self.d, self.ff), drawn(self.ff, self.d)
        self.packed = pack(*self.weights, EXPERT)


def measure(layer: Layer, methods: list[str], batch: int, rounds: int, shared: bool) -> None:
    """Prints the table of one shape and batch."""
    rng, size = np.random.default_rng(layer.seed), layer.size
    x = jnp.asarray(rng.standard_normal((batch, layer.d), np.float32)).astype(layer.dtype)
    candidates = dense_calls(x, *layer.weights, layer.packed)
    for call in candidates.values():
        timed(call)
    tried = [{name: timed(call) for name, call in candidates.items()} for _ in range(rounds)]
    found = {name: statistics.median(times[name] for times in tried) for name in candidates}
    best = min(found, key=lambda name: found[name])
    baseline = candidates[best]
    want = np.asarray(baseline()[:batch], np.float32)
    speed = max(bandwidth(), size / min(times[best] for times in tried))
    kind = "rows choose alike" if shared else "rows choose independently"
    print(
        f"\n{layer.name}: {layer.d} x {layer.ff}, {layer.n} experts of {EXPERT}, {layer.dtype}, batch {batch}, {kind}"
    )
    print("dense, ms: " + "; ".join(f"{name} {1e3 * s:.3f}" for name, s in found.items()) + f"; baseline: {best}")
    floor = 1e3 * size / speed
    print(f"weights {size / 1e6:.1f} MB, read at {speed / 1e9:.1f} GB/s at best: dense takes {floor:.3f} ms or more")
    calls: dict[tuple[str, float], Call] = {}
    used: dict[float, float] = {}
    for sparsity in SPARSITIES:
        active = np.repeat(rng.random((1, layer.n)) >= sparsity, batch, 0)
        if not shared:
            active = rng.random((batch, layer.n)) >= sparsity
        used[sparsity] = float(active.any(0).mean())
        for method in methods:
            call = sparse_call(method, x, layer.packed, active, jax.random.key(layer.seed))
            y = np.asarray(jax.block_until_ready(call()), np.float32)
            if sparsity == 0 and not np.allclose(y, want, atol=0.05 * np.abs(want).max()):
                raise InputError(f"{method} does not compute the dense layer: off by {np.abs(y - want).max()}")
            calls[method, sparsity] = call
    ratios: dict[tuple[str, float], list[float]] = {key: [] for key in calls}
    times: dict[tuple[str, float], list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            before = timed(baseline)
            times[key].append(timed(call))
            ratios[key].append(times[key][-1] / before)
    print(f"{'method':8} {'sparsity':>8} {'read':>5} {'ms':>9} {'x dense':>8} {'range':>13} {'GB/s':>6} {'x floor':>8}")
    for method, sparsity in calls:
        seconds, r = statistics.median(times[method, sparsity]), ratios[method, sparsity]
        gigabytes = used[sparsity] * size / 1e9
        print(
            f"{method:8} {sparsity:8.2f} {used[sparsity]:5.2f} {1e3 * seconds:9.3f} {statistics.median(r):8.3f} "
            f"{min(r):6.3f}-{max(r):6.3f} {gigabytes / seconds:6.1f} {seconds * speed / 1e9 / gigabytes:8.2f}",
            flush=True,
        )


def load() -> str:
    """What else runs here, for the heading of a table."""
    return f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f} (1 minute), {os.getloadavg()[1]:.2f} (5 minutes)"


def main() -> None:
    """Prints a table for each shape and batch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--methods", default="gather,loop,native", help=f"of {', '.join(METHODS)}; in columns' layout")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", action="store_true", help="all rows of a batch use the same experts")
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, {load()}")
    for shape in options.shapes.split(","):
        layer = Layer(shape, options.dtype, options.seed)
        for batch in map(int, options.batches.split(",")):
            measure(layer, options.methods.split(","), batch, options.rounds, options.shared)
    print(f"\nat the end: {load()}")


if __name__ == "__main__":
    main()
