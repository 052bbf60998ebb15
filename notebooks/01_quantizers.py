# %% [markdown]
# # Quantizers, a tour in ten minutes
# Every low-bit method is five choices: a transform, a scale, a grid, a surrogate for the derivative of rounding, and a
# loss. This tour looks at each, then builds a new method in five lines and trains it on real text.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import fbi
from fbi.quant import Ctx, compose
from fbi.quant.grid import Binary, Integers
from fbi.quant.registry import BOTH, CONTRACTION_AXIS, Choices, method
from fbi.quant.scale import rms, statistic
from fbi.quant.surrogate import SURROGATES, Clip
from fbi.quant.transform import Hadamard

w = jax.random.normal(jax.random.key(0), (256, 128)) * 0.02

# %% [markdown]
# ## A quantizer is a few pure functions
# `apply` is differentiable, `encode` gives integer codes, `decode` brings the very same values back, `bits` says what a
# file would hold.

# %%
for text in ("fbi", "bitnet-b158", "quest:bits=4", "paretoq:bits=2", "onebit"):
    q = fbi.quantizer(text, role="weight")
    qparams = q.init(w)
    error = float(jnp.mean((q.apply(w, qparams) - w) ** 2) / jnp.mean(w**2))
    bits = q.bits(w.shape)
    same = bool((jax.jit(fbi.decode)(jax.jit(q.encode)(w, qparams)) == jax.jit(q.apply)(w, qparams)).all())
    print(f"{text:16s} relative error {error:.3f}, {bits.paper_per_weight:.2f} bits, decoded equal: {same}")

# %% [markdown]
# ## Grids: the levels a value may take
# In units of the root mean square, for a normal distribution (grey).

# %%
x = jnp.linspace(-3.5, 3.5, 1401)[:, None]
normal = jax.random.normal(jax.random.key(1), (20_000, 1))
texts = ["xnor", "bitnet-b158", "quest:bits=1.58,block=0", "quest:bits=2,block=0", "quest:block=0,levels=fp4",
         "quest:block=0,levels=lloyd", "quest:block=0"]  # fmt: skip
fig, ax = plt.subplots(figsize=(8, 3.2), layout="constrained")
ax.hist(np.asarray(normal).ravel(), 120, density=True, color="0.85")
for row, text in enumerate(texts):
    levels = np.unique(np.asarray(fbi.quantizer(text).apply(normal)).round(5))
    ax.plot(levels, np.full(len(levels), 0.03 + 0.055 * row), "|", markersize=14, markeredgewidth=2, label=text)
ax.set(xlabel="value", ylabel="density", xlim=(-3.6, 3.6))
ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))

# %% [markdown]
# ## Error against bits, on normal numbers and on trained weights
# The trained weights come from a small decoder that learns State of the Union speeches for a few steps; their largest
# entries are what absmax pays for, and what an RMS scale clips.

# %%
import tempfile
from pathlib import Path

from fbi.data.config import DataConfig
from fbi.train.run import Execution, Run

root = Path(tempfile.mkdtemp())
quiet = Execution(eval_every=0, log_every=20, checkpoint_every=1000, line_every=1e9)
data = DataConfig(window=64, batch=8)
full = Run(name="full precision", policy="fp", data=data, steps=40)
fbi.train(full, root / "fp", quiet)
model, params, _ = fbi.load(root / "fp")
trained = params["layers_0_2"]["mlp"]["up"]["w"][0]

# %%
families = {
    "absmax, mid-rise": "ste:bits={}",
    "RMS, Gaussian-optimal": "quest:bits={},block=0",
    "Hadamard + RMS": "quest:bits={}",
}
fig, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
outliers = jax.random.normal(jax.random.key(2), (128, 256)) * jnp.exp(
    1.2 * jax.random.normal(jax.random.key(3), (128, 1))
)
for ax, (name, tensor) in zip(
    axes, {"trained weights": trained, "normal, uneven columns": outliers}.items(), strict=True
):
    for label, text in families.items():
        errors = []
        for b in range(1, 9):
            y = fbi.quantizer(text.format(b)).apply(tensor)
            errors.append(float(jnp.sum((y - tensor) ** 2) / jnp.sum(tensor**2)))
        ax.semilogy(range(1, 9), errors, "o-", label=label)
    ax.set(title=name, xlabel="bits")
axes[0].set_ylabel("relative squared error")
axes[0].legend(fontsize=7)

# %% [markdown]
# ## What a Hadamard rotation does to outliers
# Each block of 128 neighbours is rotated: an outlier is spread over its block, and the distribution becomes nearly
# normal, which is what the Gaussian-optimal grid expects.

# %%
token = np.array(jax.random.normal(jax.random.key(4), (1, 256)))
token[0, [20, 140, 200]] = [9.0, -12.0, 7.0]
rotated = Hadamard(128).forward(jnp.asarray(token), -1)
fig, axes = plt.subplots(1, 2, figsize=(8, 2.6), sharey=True, layout="constrained")
for ax, values, title in zip(axes, (token, rotated), ("as it comes", "rotated in blocks of 128"), strict=True):
    ax.plot(np.asarray(values)[0], lw=0.8)
    ax.set(
        title=f"{title}: largest over RMS {np.abs(values).max() / np.sqrt(np.mean(np.square(values))):.1f}",
        xlabel="channel",
    )

# %% [markdown]
# ## Surrogates: the derivative used for a rounding
# A sign has no useful derivative. Each method chooses one; the scheduled ones (EDE, ReSTE) sharpen during training.

# %%
u = jnp.linspace(-2, 2, 801)
fig, ax = plt.subplots(figsize=(8, 3), layout="constrained")
for name in ("clip", "tanh", "swishsign", "approxsign", "fourier"):
    ax.plot(u, np.asarray(SURROGATES[name](Binary(), u, jnp.asarray(1.0)), float), label=name)
for t in (0.3, 0.7):
    ax.plot(u, SURROGATES["ede"](Binary(), u, jnp.asarray(t)), "--", label=f"ede at {t:.0%} of training")
ax.set(xlabel="u", ylabel="d level / d u", ylim=(0, 5.2))
ax.legend(fontsize=7)

# %% [markdown]
# ## The trust mask
# QuEST passes a gradient only where rounding moved a value by at most half a step: inside the grid always, outside not.

# %%
fig, ax = plt.subplots(figsize=(8, 2.6), layout="constrained")
z = jnp.sort(normal, axis=0)
for bits in (1, 2, 4):
    q = fbi.quantizer(f"quest:bits={bits},block=0,surrogate=trust")
    mask = np.asarray(jax.grad(lambda z, q=q: jnp.sum(q.apply(z)))(z)) != 0
    ax.plot(z, mask + 0.08 * bits, label=f"{bits} bits: {1 - mask.mean():.2%} masked")
ax.set(xlabel="value / RMS", yticks=[], ylabel="passes")
ax.legend(fontsize=7)

# %% [markdown]
# ## A new method in five lines, trained
# Ternary at 1.2 times the root mean square of the row. Registered, it is text like any other, in policies and configs.


# %%
@method("tour", roles=BOTH, paper="this notebook", choices=Choices("1.2 RMS of the row", "ternary", "clip"))
def tour(role: str, *, width: float = 1.2):
    """Ternary at a multiple of the root mean square."""
    axis = CONTRACTION_AXIS[role]
    scale = statistic(rms, "output", axis, top=1 / width)
    return compose(scale=scale, grid=Integers(-1, 1), surrogate=Clip(), axis=axis)


# %%
losses = {"full precision": root / "fp"}
for policy in ("w=tour", "w=bitnet-b158"):
    run = Run(
        name=policy, policy=f"layers.*.attn.{{q,k,v,o}}: {policy} | layers.*.mlp.*: {policy}", data=data, steps=60
    )
    fbi.train(run, root / policy.removeprefix("w="), quiet)
    losses[policy] = root / policy.removeprefix("w=")

# %%
import json

fig, ax = plt.subplots(figsize=(8, 3), layout="constrained")
for name, directory in losses.items():
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]
    ax.plot(
        *zip(*steps, strict=True),
        "o-",
        label=f"{name}: validation {json.loads((directory / 'done.json').read_text())['loss']:.3f}",
    )
ax.set(xlabel="step", ylabel="training loss, nats/token")
ax.legend(fontsize=8)

# %% [markdown]
# Forty steps order nothing; `make methods-table` trains every method for 300 and `docs/methods.md` lists their choices.
# A schedule reads progress from the context, without compiling anew:

# %%
q = fbi.quantizer("bitnet-b158:warmup=0.5")
for t in (0.0, 0.25, 0.5):
    print(f"progress {t:.2f}: moved by {float(jnp.abs(q.apply(w, {}, Ctx(t)) - w).mean()):.5f}")
