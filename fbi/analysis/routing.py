"""What routers leave out: sparsity, scores near the threshold, and experts that a batch of tokens leaves out together."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fbi.loss import SCORES, Outputs, Watch
from fbi.model.router import THRESHOLD

NEAR = 0.1
FEATURE = f"layers.*.{SCORES}"
SIZES = (1, 2, 4, 8, 16)  # of batches that are decoded together


def skipped(scores: Float[Array, "*s"]) -> Bool[Array, "*s"]:
    """Which experts the hard rule leaves out, LTE, arXiv 2402.06126, section 4.3: those of a score of 0.5 or less."""
    return scores <= THRESHOLD


def near(scores: Float[Array, "*s"]) -> Bool[Array, "*s"]:
    """Which scores lie within 0.1 of the threshold: they may fall on either side."""
    return jnp.abs(scores - THRESHOLD) < NEAR


def routing_sums(out: Outputs) -> dict[str, Float[Array, ""]]:
    """`sparsity`, `near` and `score`: shares of experts and the mean score, layers pooled, summed over positions."""
    scores = out.features[SCORES]
    total = lambda x: jnp.sum(jnp.mean(x.astype(jnp.float32), (0, -1)))  # noqa: E731
    return {"sparsity": total(skipped(scores)), "near": total(near(scores)), "score": total(scores)}


WATCH = Watch((FEATURE,), routing_sums)
