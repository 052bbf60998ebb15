"""What a feed-forward layer costs that reads only its active experts, router included, against the best dense one.

    python benchmarks/sparse_ffn.py [--shapes llama-7b,smollm2-135m] [--batch 1] [--dtype float32] [--rounds 9]

Masks are random at each sparsity, the same for all formulations. A sparse time is of the whole layer as it is served:
router (x @ W_r [d, ff / 32], sigmoid, threshold), then the experts it chose; the router's weights are such that its
choice is the mask. Dense candidates multiply all weights [in, out] (or [out, in], or with one row more: the fastest
formulation differs by type and batch); the best of them is the baseline of every ratio. Each sparse call is paired with
a call of the baseline right before it, pairs of all variants take turns, and a ratio is the median over rounds of the
ratio within a pair, so that what else the machine does meets both sides. The floor is the time to read the weights in
use at the bandwidth that reading a large array reaches in the same run.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbi.errors import InputError
from fbi.model.config import PRESETS
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


def dense_calls(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> dict[str, Call]:
    """down(silu(x gate) * (x up)) as XLA is given it."""

    @jax.jit
    def plain(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    @jax.jit
    def turned(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return (jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down.T

    rows = jnp.concatenate([x, x[:1]])
    other = [w.T + 0 for w in (gate, up, down)]
    return {
        "[in, out]": lambda: plain(x, gate, up, down),
        "[in, out], a row more": lambda: plain(rows, gate, up, down),
        "[out, in], a row more": lambda: turned(rows, *other),
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


def measure(shape: str, methods: list[str], batch: int, dtype: str, rounds: int, seed: int) -> None:
    """Prints the table of one shape."""
    config = PRESETS[SHAPES[shape]]
    d, ff, n = config.dim, config.ff, config.ff // EXPERT
    rng = np.random.default_rng(seed)

    def drawn(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32) * shape[0] ** -0.5).astype(dtype)

    gate, up, down = drawn(d, ff), drawn(d, ff), drawn(ff, d)
    x = jnp.asarray(rng.standard_normal((batch, d), np.float32)).astype(dtype)
    columns = pack(gate, up, down, EXPERT)
    candidates = dense_calls(x, gate, up, down)
    for call in candidates.values():
        timed(call)
    found = {name: statistics.median(timed(call) for _ in range(rounds)) for name, call in candidates.items()}
    best = min(found, key=lambda name: found[name])
    baseline = candidates[best]
    want = np.asarray(baseline()[:batch], np.float32)
    speed, size = bandwidth(), 3 * d * ff * jnp.dtype(dtype).itemsize
    print(f"\n{shape}: {d} x {ff}, {n} experts of {EXPERT}, {dtype}, batch {batch}; {jax.devices()[0].device_kind}")
    print("dense, ms: " + "; ".join(f"{name} {1e3 * s:.3f}" for name, s in found.items()))
    print(f"weights {size / 1e6:.1f} MB; reading {speed / 1e9:.1f} GB/s, floor of dense {1e3 * size / speed:.3f} ms")
    calls: dict[tuple[str, float], Call] = {}
    used: dict[float, float] = {}
    for sparsity in SPARSITIES:
        active = rng.random((batch, n)) >= sparsity
        used[sparsity] = active.any(0).mean()
        for method in methods:
            call = sparse_call(method, x, columns, active, jax.random.key(seed))
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
    print(f"{'method':10} {'sparsity':>8} {'read':>6} {'ms':>9} {'x dense':>8} {'range':>13} {'floor':>9} {'x':>8}")
    for method, sparsity in calls:
        seconds, r = statistics.median(times[method, sparsity]), ratios[method, sparsity]
        floor = used[sparsity] * size / speed
        low, high = min(r), max(r)
        print(
            f"{method:10} {sparsity:8.2f} {used[sparsity]:6.2f} {1e3 * seconds:9.3f} {statistics.median(r):8.3f} "
            f"{low:6.3f}-{high:6.3f} {1e3 * floor:9.3f} {seconds / floor if floor else float('nan'):8.2f}",
            flush=True,
        )


def main() -> None:
    """Prints a table for each shape."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--methods", default="gather,loop,native", help=f"of {', '.join(METHODS)}; in columns' layout")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for shape in options.shapes.split(","):
        measure(shape, options.methods.split(","), options.batch, options.dtype, options.rounds, options.seed)


if __name__ == "__main__":
    main()
