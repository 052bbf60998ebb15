"""A training step on emulated devices with weights gathered as values and as codes: bytes and time.

    python benchmarks/gather.py [--devices 8] [--rounds 10] [--dtype float32]

Weights are split over the data axis of all devices. Bytes are those of the all-gathers in the compiled program, the
layers being scanned (a loop's body counts once); the devices share this machine's processor, so that a gather costs a
copy in memory and no link. Steps of all variants take turns; ratios are medians over rounds, of codes over values.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import numpy as np

from fbi import optim
from fbi.analysis.program import all_gathers
from fbi.loss import Loss
from fbi.model import Model, ModelConfig
from fbi.model.axes import Axes
from fbi.policy import Policy
from fbi.train import mesh as meshes
from fbi.train.step import init_state, make_step

POLICIES, GATHERS = ("fp", "fbi", "bitnet-b158"), ("values", "codes")
SHAPE: dict[str, Any] = {"vocab": 4096, "dim": 256, "layers": 6, "heads": 8, "kv_heads": 8, "head_dim": 32, "ff": 768}
WINDOW = 256


class Variant:
    """A compiled step and its state."""

    def __init__(self, policy: str, gather: str, dtype: Any, mesh: jax.sharding.Mesh):
        model = Model(ModelConfig(**SHAPE, dtype=dtype), Policy.parse(policy), axes=Axes(gather=gather))
        tx = optim.build(optim.OptimizerConfig(), 100)
        rows = np.random.default_rng(0).integers(0, SHAPE["vocab"], (8, WINDOW + 1)).astype(np.int32)
        self.tokens, self.progress = meshes.put_batch(rows, mesh), jax.device_put(np.float32(0))
        self.state = init_state(model, tx, jax.random.key(0))
        step: Any = make_step(model, Loss.parse("ce"), tx)
        self.step = step.lower(self.state, None, self.tokens, self.progress).compile()
        self.bytes = sum(found.bytes for found in all_gathers(self.step.as_text()))
        self.times: list[float] = []

    def run(self) -> None:
        """One step, timed."""
        began = time.perf_counter()
        self.state, sums = self.step(self.state, None, self.tokens, self.progress)
        jax.block_until_ready((self.state, sums))
        self.times.append(time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)
    mesh = meshes.make({"data": options.devices, "model": 1})
    with jax.set_mesh(mesh):
        variants = {(p, g): Variant(p, g, options.dtype, mesh) for p in POLICIES for g in GATHERS[: 1 + (p != "fp")]}
        for round_ in range(options.rounds + 1):
            for variant in variants.values():
                variant.run()
                if not round_:
                    variant.times.clear()  # of the first
    print("| policy | gathered as | all-gathers, KiB | step ms | x values | x fp |\n|---|---|---:|---:|---:|---:|")
    for (policy, gather), variant in variants.items():
        ratio = {
            name: statistics.median(a / b for a, b in zip(variant.times, other.times, strict=True))
            for name, other in (("values", variants[policy, "values"]), ("fp", variants["fp", "values"]))
        }
        print(
            f"| {policy} | {gather} | {variant.bytes / 1024:,.0f} | {1e3 * statistics.median(variant.times):.0f} "
            f"| {ratio['values']:.2f} | {ratio['fp']:.2f} |"
        )


if __name__ == "__main__":
    main()
