# %% [markdown]
# # Learned structured sparsity
# Learn To be Efficient (LTE, arXiv 2402.06126) on a model small enough for a laptop: neurons grouped to experts,
# routers that learn which of them a token needs, a requested sparsity, and what simpler ways of skipping cost.

# %%
import dataclasses
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display

import fbi
from fbi.data import DataConfig, prepare
from fbi.evaluate.perplexity import evaluate
from fbi.experiment import replace
from fbi.model import Model
from fbi.model.config import ModelConfig
from fbi.model.experts import SPLITS, group
from fbi.model.pruning import Pruning, norms, prune
from fbi.optim import OptimizerConfig
from fbi.report.runs import points, read_run
from fbi.train import Execution

EXPERT, EXPERTS, STEPS = 16, 16, 60  # 32 neurons and thousands of steps in the paper
folder = Path(tempfile.mkdtemp())
execution = Execution(eval_every=1000, eval_windows=64, checkpoint_every=1000, log_every=2, line_every=1e9, unroll=1)

# %% [markdown]
# ## A dense model

# %%
shape = ModelConfig(dim=64, layers=2, heads=2, kv_heads=2, head_dim=32, ff=EXPERT * EXPERTS, context=64)
dense_run = fbi.Run(
    name="dense", model=shape, policy="fp", data=DataConfig(batch=8, window=64), optimizer=OptimizerConfig(lr=5e-3),
    steps=4 * STEPS,
)  # fmt: skip
print(f"dense: {fbi.train(dense_run, folder / 'dense', execution).loss:.3f} nats/token")
dense, params, _ = fbi.load(folder / "dense")
windows = prepare(dense_run.data)


def loss(model: Model, params: dict) -> float:
    """Held-out nats per token, of a part of the text."""
    stream, sizes = windows.stream("validation"), windows.token_bytes
    return evaluate(model, params, stream, token_bytes=sizes, window=65, stride=64, batch=16, limit=64).loss


# %% [markdown]
# ## Neurons that belong together
# A permutation of the neurons keeps the function and makes neighbours experts. How good a grouping is shows when only
# the experts with the largest hidden units are kept, token by token (the oracle of MoEfication, arXiv 2110.01786).

# %%
tokens = windows.stream("train")[: 8 * 64].reshape(8, 64).astype(np.int32)
units = np.asarray(dense.features(params, tokens, wanted=["mlp.down"])[1]["mlp.down"]).reshape(2, -1, shape.ff)
grouped = {name: group(shape, params, EXPERT, name, activations=units) for name in SPLITS}
rows = []
for kept in (EXPERTS // 4, EXPERTS // 2):
    oracle = Model(dataclasses.replace(shape, expert=EXPERT, router="oracle", routing="hard", top_k=kept))
    found = {name: loss(oracle, permuted) for name, permuted in grouped.items()}
    rows.append({"sparsity": 1 - kept / EXPERTS, "dense": loss(dense, params), **found})
display(pd.DataFrame(rows).round(4))
before, after = (np.asarray(dense.apply(p, tokens)) for p in (params, grouped["kmeans"]))
print(f"largest change of a logit by the permutation: {np.abs(before - after).max():.1e}")

# %% [markdown]
# ## Pruned for good
# What no token may use any more: weights one by one or experts, by magnitude or as Wanda (arXiv 2306.11695).

# %%
seen = jax.device_get(dense.features(params, tokens, wanted={"mlp.up": norms, "mlp.down": norms})[1])
for text in ("wanda", "magnitude", "wanda:pattern=2:4", "wanda:pattern=expert,expert=16", "wanda:pattern=neuron"):
    print(f"{text:32s} {loss(dense, prune(Pruning.parse(text), grouped['kmeans'], seen)):.4f} nats/token")

# %% [markdown]
# ## Routers that learn
# Stage 1 trains model and routers under two more losses; a controller moves the weight of one, and the biases, until
# the requested half of the experts is skipped. Stage 2 freezes what the routers know and trains under hard thresholds.

# %%
soft = replace(
    dense_run,
    {
        "name": "soft", "steps": STEPS, "optimizer.lr": 2e-3, "start": str(folder / "dense"), "sparsity": 0.5,
        "model.expert": EXPERT, "loss": "ce + 0.5*efficiency + 0.02*separability",
    },
)  # fmt: skip
hard = replace(soft, {"name": "hard", "loss": "ce", "model.routing": "hard", "start": str(folder / "soft")})
for run in (soft, hard):
    print(f"{run.name}: {fbi.train(run, folder / run.name, execution).loss:.3f} nats/token")
records = {name: read_run(folder / name) for name in ("soft", "hard")}
for name, record in records.items():
    print(name, [(row["step"], round(row["loss"], 3), round(row["sparsity"], 3)) for row in record.rows["eval"]])

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
for name, record in records.items():
    left.plot(*points(record.train, "sparsity"), label=name)
left.set(title="experts skipped in training", xlabel="step", ylabel="share")
left.legend()
model, weights, _ = fbi.load(folder / "hard")
scores = np.asarray(model.features(weights, tokens, wanted=["mlp.router"])[1]["mlp.router"])
for layer, values in enumerate(scores):
    middle.hist(values.ravel(), bins=40, range=(0, 1), alpha=0.6, label=f"layer {layer}")
middle.set(title="scores; used above 0.5", xlabel="score")
middle.legend()
last = [row for row in records["hard"].rows["routing"] if row["step"] == STEPS]
sizes = [1, 2, 4, 8, 16]
for row in last:
    right.plot(sizes, [row[f"union_{size}"] for size in sizes], marker="o", label=row["site"])
right.set(title="experts that all of a batch skip", xlabel="tokens decoded together", xscale="log")
right.legend(fontsize="small")
plt.show()

# %% [markdown]
# ## How sparse is a token?

# %%
skipped = (scores <= 0.5).mean(-1)
print(pd.DataFrame({f"layer {i}": pd.Series(s.ravel()).describe() for i, s in enumerate(skipped)}).round(3))
