"""Step time, tokens/s, compile time and peak memory of one training step, as ratios to full precision in the same run.

    python benchmarks/train_step.py [--steps 10] [--torch]

Each variant runs in a process of its own (peak memory is the process's), steps of all variants are interleaved in
rounds so that a noisy neighbour hits them alike, and medians are compared. Where PyTorch is installed a model of the
same shape (scaled_dot_product_attention, AdamW) stands beside them.
"""

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

SHAPE = {"dim": 256, "layers": 6, "heads": 8, "head_dim": 32, "ff": 768, "vocab": 4096, "window": 256, "batch": 8}
POLICIES = {
    "fp": "fp",
    "fbi": "fbi",
    "bitnet-b158": "bitnet-b158",
    "quest W4A4": "layers.*.{attn.q,attn.k,attn.v,attn.o,mlp.*}: w=quest:bits=4;a=quest:bits=4",
}


def jax_step(policy: str):
    """A function that runs one step and waits for it, and the seconds it took to compile."""
    import jax
    import numpy as np

    from fbi import optim
    from fbi.loss import Loss
    from fbi.model import Model, ModelConfig
    from fbi.policy import Policy
    from fbi.train import mesh as meshes
    from fbi.train.step import init_state, make_step

    shape: dict[str, Any] = {name: SHAPE[name] for name in ("vocab", "dim", "layers", "heads", "head_dim", "ff")}
    model = Model(ModelConfig(**shape, kv_heads=SHAPE["heads"]), Policy.parse(policy), unroll=SHAPE["layers"])
    tx = optim.build(optim.OptimizerConfig(), 100)
    mesh = meshes.make({"data": 1, "model": 1})
    rows = np.random.default_rng(0).integers(0, SHAPE["vocab"], (SHAPE["batch"], SHAPE["window"] + 1)).astype(np.int32)
    jax.set_mesh(mesh)
    state = [init_state(model, tx, jax.random.key(0))]
    tokens, progress = meshes.put_batch(rows, mesh), jax.device_put(np.float32(0))
    began = time.perf_counter()
    stepper: Any = make_step(model, Loss.parse("ce"), tx)
    step = stepper.lower(state[0], None, tokens, progress).compile()
    compiled = time.perf_counter() - began

    def run() -> None:
        state[0], sums = step(state[0], None, tokens, progress)
        jax.block_until_ready(sums)

    return run, compiled


def torch_step():
    """The same model in eager PyTorch."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]
    from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    d, heads, hd, ff = (SHAPE[n] for n in ("dim", "heads", "head_dim", "ff"))
    t = SHAPE["window"]
    angles = torch.arange(t)[:, None] * 10_000.0 ** (-torch.arange(hd // 2) / (hd // 2))
    cos, sin = angles.cos(), angles.sin()

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.n1, self.n2 = nn.RMSNorm(d, eps=1e-5), nn.RMSNorm(d, eps=1e-5)
            self.qkv, self.o = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
            self.gate, self.up = nn.Linear(d, ff, bias=False), nn.Linear(d, ff, bias=False)
            self.down = nn.Linear(ff, d, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (y.unflatten(-1, (heads, hd)).transpose(1, 2) for y in self.qkv(self.n1(x)).chunk(3, -1))
            y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            x = x + self.o(y.transpose(1, 2).flatten(2))
            h = self.n2(x)
            return x + self.down(F.silu(self.gate(h)) * self.up(h))

    model = nn.Sequential(
        nn.Embedding(SHAPE["vocab"], d),
        *(Block() for _ in range(SHAPE["layers"])),
        nn.RMSNorm(d, eps=1e-5),
        nn.Linear(d, SHAPE["vocab"], bias=False),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.randint(0, SHAPE["vocab"], (SHAPE["batch"], t + 1))

    def run() -> None:
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run, 0.0


def worker(variant: str) -> None:
    """Builds a variant, then runs a step for each line on standard input and prints its seconds."""
    run, compiled = torch_step() if variant == "torch fp" else jax_step(POLICIES[variant])
    run()
    print(json.dumps(compiled), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        run()
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps([seconds, peak]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="rounds, each one step of every variant")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    variants = [*POLICIES, *(["torch fp"] if importlib.util.find_spec("torch") else [])]
    processes: dict[str, Any] = {}
    compile_times: dict[str, float] = {}
    for variant in variants:  # one after the other, so that compile times are not shared either
        process = subprocess.Popen(
            [sys.executable, __file__, "--worker", variant], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes[variant], compile_times[variant] = process, 0.0
        compile_times[variant] = json.loads(processes[variant].stdout.readline())
    times = {variant: [] for variant in variants}
    peaks = dict.fromkeys(variants, 0.0)
    for done in range(options.steps):
        for variant, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            seconds, peaks[variant] = json.loads(process.stdout.readline())
            times[variant].append(seconds)
        print(f"\rround {done + 1}/{options.steps}", end="", file=sys.stderr, flush=True)
    for process in processes.values():
        process.stdin.close()
        process.wait()
    print(file=sys.stderr)
    tokens = SHAPE["batch"] * SHAPE["window"]
    print("| variant | step ms | x fp | tokens/s | compile s | peak MiB | x fp |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for variant in variants:
        step = statistics.median(times[variant])
        # Ratios are medians over rounds: both steps of a pair ran within the same moment.
        ratio = statistics.median(a / b for a, b in zip(times[variant], times["fp"], strict=True))
        print(
            f"| {variant} | {step * 1e3:.0f} | {ratio:.2f} | {tokens / step:,.0f} | {compile_times[variant]:.1f} "
            f"| {peaks[variant]:.0f} | {peaks[variant] / peaks['fp']:.2f} |"
        )


if __name__ == "__main__":
    main()
