"""What quantizers cost: beside the bare product of the layer they serve, a whole step, and PyTorch's formulation.

    python benchmarks/quantizers.py [--methods quest,bitnet-b158] [--rounds 7] [--steps]

Each figure is the median over rounds in which the candidates take turns, so that what else the machine does meets all
alike; ratios are of medians of the same rounds. The floor is the product itself: x [tokens, in] @ w [in, out], forward
and backward. A column for PyTorch appears where torch is installed: the authors' formulation (the detach trick, a mask
kept whole, a dense block-diagonal Hadamard matrix as one product) of the same quantizers.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbi.quant import REGISTRY, Method
from fbi.quant.quantizer import paired

TOKENS, INPUTS, OUTPUTS = 4096, 512, 512


def loss_of(method: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """sum(y * g) of a layer whose operands the method quantizes, and what it learns."""
    roles = REGISTRY[Method.parse(method).name].roles
    none = Method("none")
    weight = Method.parse(method if "weight" in roles else "none").build("weight")
    activation = (Method.parse(method) if "activation" in roles else none).build("activation")
    weight, activation = paired(weight, activation)
    w = jax.random.normal(jax.random.key(0), (INPUTS, OUTPUTS)) * 0.05
    x = jax.random.normal(jax.random.key(1), (TOKENS, INPUTS))
    learned = (weight.init(w), activation.init(x), weight.around.init(w, jax.random.key(2)))

    def product(x: jax.Array, w: jax.Array, learned: Any) -> jax.Array:
        q, a, r = learned
        x, memo = weight.around.pre(x, r)
        return weight.around.post(activation.apply(x, a) @ weight.apply(w, q), r, memo)

    return product, (x, w, learned)


def layer_calls(method: str) -> dict[str, Callable[[], Any]]:
    """Forward alone, and forward with backward, compiled."""
    product, arguments = loss_of(method)
    g = jax.random.normal(jax.random.key(3), (TOKENS, OUTPUTS))
    forward = jax.jit(product)
    both = jax.jit(lambda *args: jax.vjp(product, *args)[1](g))
    calls = {"forward": lambda: jax.block_until_ready(forward(*arguments)),
             "both": lambda: jax.block_until_ready(both(*arguments))}  # fmt: skip
    for call in calls.values():
        call()
    return calls


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def torch_call(bits: int) -> Callable[[], Any] | None:
    """QuEST's published formulation of the same layer in PyTorch, forward and backward; None without torch."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    from fbi.quant.gaussian import PUBLISHED
    from fbi.quant.transform import sylvester

    torch.manual_seed(0)
    alpha, n = PUBLISHED[bits], 2**bits
    h = torch.from_numpy(np.kron(np.eye(INPUTS // 128), sylvester(128)).astype(np.float32))

    def quantized(x: Any) -> Any:
        rotated = x @ h
        with torch.no_grad():
            std = torch.sqrt(torch.mean(rotated**2, dim=-1, keepdim=True)) + 1e-8
            step = 2 * alpha * std / (n - 1)
            xq = torch.round(torch.clip(rotated, -alpha * std, alpha * std) / step + 0.5) * step - step / 2
            mask = (torch.abs(xq - rotated) <= std * alpha / (n - 1)).float()
        grad = rotated * mask
        return grad + (xq - grad).detach()

    x = torch.randn(TOKENS, INPUTS, requires_grad=True)
    w = (0.05 * torch.randn(OUTPUTS, INPUTS)).requires_grad_()
    g = torch.randn(TOKENS, OUTPUTS)

    def call() -> None:
        x.grad = w.grad = None
        (quantized(x) @ quantized(w).T).backward(g)

    call()
    return call


def step_call(policy: str) -> Callable[[], Any]:
    """A whole training step of `nano` under a policy, 32 x 128 tokens."""
    import optax

    from fbi.loss import Loss
    from fbi.model import build
    from fbi.train.step import init_state, make_step

    model = build("nano", policy)
    tx = optax.adam(1e-3)
    mesh = jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = [init_state(model, tx, jax.random.key(0))]
        step = make_step(model, Loss.parse("ce"), tx)
        tokens = jax.random.randint(jax.random.key(1), (32, 129), 0, model.config.vocab)

    def call() -> None:
        with jax.set_mesh(mesh):
            state[0], sums = step(state[0], None, tokens, jnp.float32(0.5))
            jax.block_until_ready(sums)

    call()
    return call


LINEAR = "layers.*.attn.{{q,k,v,o}}: {m} | layers.*.mlp.*: {m}"


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", default="", help="comma list; empty: every registered method as it stands")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", action="store_true", help="whole steps too")
    options = parser.parse_args()
    chosen = options.methods.split(";") if options.methods else [m for m in REGISTRY if m != "none"]
    print(f"x [{TOKENS}, {INPUTS}] @ w [{INPUTS}, {OUTPUTS}], float32, {jax.devices()[0].device_kind}")
    print(f"{'method':32} {'forward':>9} {'both':>9}   over the bare product (forward, forward and backward)")
    for method in chosen:
        calls = {f"none {k}": c for k, c in layer_calls("none").items()}
        calls |= {f"{method} {k}": c for k, c in layer_calls(method).items()}
        if method.startswith("quest") and (torch := torch_call(4)):
            calls["torch"] = torch
        found = medians(calls, options.rounds)
        forward, both = (found[f"{method} {k}"] / found[f"none {k}"] for k in ("forward", "both"))
        line = f"{method:32} {forward:8.2f}x {both:8.2f}x   {1e3 * found[f'{method} both']:.1f} ms"
        if "torch" in found:
            ratio = found["torch"] / found[f"{method} both"]
            line += f"; PyTorch's formulation {1e3 * found['torch']:.1f} ms, {ratio:.2f}x ours"
        print(line, flush=True)
    if options.steps:
        policies = {"fp": "fp", "quest W4A4": LINEAR.format(m="w=quest:bits=4;a=quest:bits=4"),
                    "bitnet-b158 W": LINEAR.format(m="w=bitnet-b158"), "fbi": "fbi", "xnor W": LINEAR.format(m="w=bwn"),
                    "twn W": LINEAR.format(m="w=twn"), "quest W4": LINEAR.format(m="w=quest:bits=4")}  # fmt: skip
        found = medians({name: step_call(policy) for name, policy in policies.items()}, options.rounds)
        print("\nwhole step of nano, 32 x 128 tokens")
        for name, seconds in found.items():
            print(f"{name:32} {seconds / found['fp']:8.2f}x   {1e3 * seconds:.0f} ms")


if __name__ == "__main__":
    main()
