# %% [markdown]
# # From a config to a distilled binary student
# A full-precision teacher and a fully binarized student (FBI-LLM, arXiv 2407.07093), both small enough for a laptop:
# first as `fbi.train` does it, then step by step, with a look at the model between steps.

# %%
import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display

import fbi
from fbi import optim
from fbi.data import DataConfig, prepare
from fbi.data.loader import Batches
from fbi.experiment import replace
from fbi.loss import Loss
from fbi.model.axes import mesh_in_use
from fbi.report.plot import curves
from fbi.report.runs import read_run
from fbi.train import Execution
from fbi.train.mesh import put_batch
from fbi.train.step import make_step

STEPS = 60  # 500 and more for text that reads like text
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## A run is a value
# Everything that decides its numbers is in it, and its hash names them. `policy` says which method each matrix gets.

# %%
teacher = fbi.Run(name="teacher", policy="fp", data=DataConfig(batch=8, window=64), steps=STEPS)
student = replace(teacher, {"name": "student", "policy": "fbi", "loss": "ad", "teacher": str(folder / "teacher")})
print(teacher.hash, student.hash)
print(fbi.policy(student.policy).report(fbi.model("nano")))

# %% [markdown]
# ## Train both
# A run directory holds the config, the metrics and checkpoints; the same call again would do nothing, or continue.

# %%
execution = Execution(eval_every=20, eval_windows=64, log_every=5, line_every=1e9)
for run in (teacher, student):
    result = fbi.train(run, folder / run.name, execution)
    print(f"{run.name}: {result.loss:.3f} nats/token, perplexity {result.perplexity:.1f}")

# %%
records = [read_run(folder / name) for name in ("teacher", "student")]
display(curves(records, folder / "curves.png"))

# %% [markdown]
# ## The same, step by step
# `make_step` is one compiled function from state and tokens to state and sums. Between steps everything is plain data:
# here the share of signs that flip, and the learned scale `alpha` of one matrix.

# %%
windows = prepare(student.data)
model = fbi.model(student.model, student.policy)
teacher_model, teacher_params, tokenizer = fbi.load(folder / "teacher")
tx = optim.build(student.optimizer, student.steps)
step = make_step(model, Loss.parse(student.loss), tx, teacher=teacher_model)
batches = Batches(windows, batch=student.data.batch, seed=0)
mesh = mesh_in_use()  # one device; `jax.set_mesh` with a larger one is all that changes
with jax.set_mesh(mesh):
    params = model.init(0)
    state = {"params": params, "opt": jax.jit(tx.init)(params)}


def latent(state):
    """The latent weights and scales of the up projections, stacked over layers."""
    (layers,) = (value for name, value in state["params"].items() if name.startswith("layers"))
    return layers["mlp"]["up"]


# %%
flips, alphas, losses = [], [], []
with jax.set_mesh(mesh):
    for index in range(30):
        before = np.asarray(latent(state)["w"]) >= 0
        tokens = put_batch(batches.batch_at(index), mesh)
        state, sums = step(state, teacher_params, tokens, jnp.float32(index / student.steps))
        flips.append(float(np.mean(before != (np.asarray(latent(state)["w"]) >= 0))))
        alphas.append(float(np.mean(latent(state)["q"]["alpha"])))
        losses.append(float(sums["loss"] / sums["count"]))

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
left.plot(losses)
left.set(title="loss (cross-entropy to the teacher)", xlabel="step", ylabel="nats/token")
right.plot(flips)
right.set(title="signs that flip in a step", xlabel="step", ylabel="share")
plt.show()
print(f"mean alpha of the up projections: {alphas[0]:.5f} at first, {alphas[-1]:.5f} now")

# %% [markdown]
# ## Another method is another word
# The policy is text; any rule may be changed without touching the model.

# %%
for policy in ("bitnet-b158", "layers.0.*: w=none | layers.*: w=quest:bits=2;a=quest:bits=4"):
    run = dataclasses.replace(teacher, name="other", policy=policy, steps=10)
    print(policy, "->", f"{fbi.train(run, folder / run.hash, execution).loss:.3f} nats/token after 10 steps")
