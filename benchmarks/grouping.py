"""Seconds and peak memory of grouping one layer of a 7B model: 11,008 neurons of width 4,096 into experts of 32.

    python benchmarks/grouping.py [--neurons 11008] [--width 4096] [--expert 32] [--method kmeans]

The limits that it is held to: two minutes, 4 GiB. Weights are normal, which is the hardest case: no clusters.
"""

import argparse
import resource
import time

import numpy as np

from fbi.model import ModelConfig
from fbi.model.experts import group


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--neurons", type=int, default=11_008)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--expert", type=int, default=32)
    parser.add_argument("--method", default="kmeans", choices=("kmeans", "random", "contiguous"))
    options = parser.parse_args()
    d, ff = options.width, options.neurons
    # Small but for the MLP; ReLU without a gate, so that two matrices and not three are held beside what is measured.
    config = ModelConfig(
        vocab=8, dim=d, layers=1, heads=1, kv_heads=1, head_dim=2, ff=ff, activation="relu", gated=False
    )
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    up, down = draw(1, d, ff), draw(1, ff, d)
    attention = {name: {"w": draw(1, d, 2)} for name in "qkv"} | {"o": {"w": draw(1, 2, d)}}
    scale = lambda: {"scale": np.ones((1, d), np.float32)}  # noqa: E731
    block = {
        "attn": attention,
        "attn_norm": scale(),
        "mlp": {"up": {"w": up}, "down": {"w": down}},
        "mlp_norm": scale(),
    }
    params = {
        "embed": draw(8, d),
        "head": {"w": draw(d, 8)},
        "layers_0_1": block,
        "norm": {"scale": np.ones(d, np.float32)},
    }
    before = peak()
    began, used = time.perf_counter(), time.process_time()
    made = group(config, params, options.expert, options.method)
    seconds, used = time.perf_counter() - began, time.process_time() - used
    order = made["layers_0_1"]["mlp"]["down"]["w"]
    assert np.array_equal(np.sort(order[0, :, 0]), np.sort(down[0, :, 0]))
    print(
        f"{ff} neurons of width {d}, experts of {options.expert}, {options.method}: {seconds:.1f} s "
        f"({used:.1f} s of CPU), peak memory {peak():.2f} GiB ({before:.2f} GiB before: weights and libraries)"
    )


def peak() -> float:
    """GiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
