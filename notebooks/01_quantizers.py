# %% [markdown]
# # Quantizers by hand
# One tensor, three methods: values, codes, bits, gradients. Runs as a script and, through jupytext, as a notebook.

# %%
import jax
import jax.numpy as jnp

import fbi

w = jax.random.normal(jax.random.key(0), (256, 128)) * 0.02

# %% [markdown]
# A quantizer is a few pure functions. `apply` is differentiable, `encode` gives integer codes, `decode` brings the very
# same values back.

# %%
for text in ("fbi", "bitnet-b158", "absmax:bits=4"):
    q = fbi.quantizer(text, role="weight")
    qparams = q.init(w)
    w_hat, encoded, bits = q.apply(w, qparams), q.encode(w, qparams), q.bits(w.shape)
    error = float(jnp.mean((w_hat - w) ** 2) / jnp.mean(w**2))
    same = bool((jax.jit(fbi.decode)(jax.jit(q.encode)(w, qparams)) == jax.jit(q.apply)(w, qparams)).all())
    print(f"{text:14s} relative error {error:.3f}, {bits.paper_per_weight:.3f} paper bits, decoded equal: {same}")

# %% [markdown]
# FBI-LLM's gradients: the latent weight gets alpha times the gradient, alpha the signed sum, beta the sum.

# %%
q = fbi.quantizer("fbi")
qparams = q.init(w)
g = jax.random.normal(jax.random.key(1), w.shape)
_, pull = jax.vjp(q.apply, w, qparams)
dw, dq = pull(g)
assert jnp.allclose(dw, qparams["alpha"] * g)
assert jnp.allclose(dq["alpha"], (g * jnp.where(w >= 0, 1, -1)).sum(1, keepdims=True), rtol=1e-4, atol=1e-4)
assert jnp.allclose(dq["beta"], g.sum(1, keepdims=True), rtol=1e-4, atol=1e-4)

# %% [markdown]
# A policy says which site of a model gets what; its report shows what matched and what it costs.

# %%
print(fbi.policy("layers.0.*: w=none | layers.*: w=fbi").report(fbi.model("nano", layers=3)))
