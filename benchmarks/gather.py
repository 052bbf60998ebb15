"""A training step on emulated devices with weights gathered as values and as codes: bytes and time.

    python benchmarks/gather.py [--devices 8] [--rounds 10] [--dtype float32] [--layers 6] [--batch 8]
        [--policies fbi,bitnet-b158]

Weights are split over the data axis of all devices. Bytes are those of the all-gathers in the compiled program, the
layers being scanned (a loop's body counts once); the devices share this machine's processor, so that a gather costs a
copy in memory and no link. Steps of all variants take turns; ratios are medians over rounds, of codes over values, of
wall time and of processor time (the one to look at where the machine is not quiet). Every device decodes every weight
whole, however few tokens it has: with more of them (`--batch`, sequences of all devices together) that weighs less.
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

GATHERS = ("values", "codes")
SHAPE: dict[str, Any] = {"vocab": 4096, "dim": 256, "heads": 8, "kv_heads": 8, "head_dim": 32, "ff": 768}
WINDOW = 256


class Variant:
    """A compiled step and its state."""

    def __init__(self, policy: str, gather: str, mesh: jax.sharding.Mesh, batch: int, **shape: Any):
        model = Model(ModelConfig(**SHAPE, **shape), Policy.parse(policy), axes=Axes(gather=gather))
        tx = optim.build(optim.OptimizerConfig(), 100)
        rows = np.random.default_rng(0).integers(0, SHAPE["vocab"], (batch, WINDOW + 1)).astype(np.int32)
        self.tokens, self.progress = meshes.put_batch(rows, mesh), jax.device_put(np.float32(0))
        self.state = init_state(model, tx, jax.random.key(0))
        step: Any = make_step(model, Loss.parse("ce"), tx)
        self.step = step.lower(self.state, None, self.tokens, self.progress).compile()
        self.bytes = sum(found.bytes for found in all_gathers(self.step.as_text()))
        self.times: list[tuple[float, float]] = []

    def run(self) -> None:
        """One step, timed."""
        began = time.perf_counter(), time.process_time()
        self.state, sums = self.step(self.state, None, self.tokens, self.progress)
        jax.block_until_ready((self.state, sums))
        self.times.append((time.perf_counter() - began[0], time.process_time() - began[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8, help=f"sequences of {WINDOW} tokens, of all devices together")
    parser.add_argument("--policies", default="fbi,bitnet-b158")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)
    mesh, shape = meshes.make({"data": options.devices, "model": 1}), {"layers": options.layers, "dtype": options.dtype}
    with jax.set_mesh(mesh):
        policies, batch = options.policies.split(","), options.batch
        variants = {(p, g): Variant(p, g, mesh, batch, **shape) for p in policies for g in GATHERS}
        for turn in range(options.rounds + 1):
            for variant in variants.values():
                variant.run()
                if not turn:
                    variant.times.clear()  # of the first
    print("| policy | gathered as | all-gathers, KiB | step ms | x values | of processor time |")
    print("|---|---|---:|---:|---:|---:|")
    for (policy, gather), variant in variants.items():
        pairs = list(zip(variant.times, variants[policy, "values"].times, strict=True))
        wall, work = (statistics.median(a[i] / b[i] for a, b in pairs) for i in range(2))
        milliseconds = 1e3 * statistics.median(time for time, _ in variant.times)
        print(f"| {policy} | {gather} | {variant.bytes / 1024:,.0f} | {milliseconds:.0f} | {wall:.2f} | {work:.2f} |")


if __name__ == "__main__":
    main()
