"""What routers leave out: sparsity, scores near the threshold, and experts that a batch of tokens leaves out together.

FFN sparsity is the share of experts that are skipped, LTE, arXiv 2402.06126, section 5; all layers have equally many.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fbi.analysis.codes import Ratio
from fbi.loss import SCORES, Outputs, Watch
from fbi.model.routing import THRESHOLD

NEAR = 0.1
FEATURE = f"layers.*.{SCORES}"
SIZES = (1, 2, 4, 8, 16)  # of batches that are decoded together

Tallies = Mapping[str, Ratio]  # by name, each [layers]


def skipped(scores: Float[Array, "*s"]) -> Bool[Array, "*s"]:
    """Which experts the hard rule leaves out: those whose score is not above 0.5."""
    return scores <= THRESHOLD


def near(scores: Float[Array, "*s"]) -> Bool[Array, "*s"]:
    """Which scores lie within 0.1 of the threshold."""
    return jnp.abs(scores - THRESHOLD) < NEAR


def routing_sums(out: Outputs) -> dict[str, Float[Array, ""]]:
    """`sparsity`, `near`: shares of experts, layers pooled; `score`, `score_squared`: means; summed over positions."""
    scores = out.features[SCORES]
    total = lambda x: jnp.sum(jnp.mean(x.astype(jnp.float32), (0, -1)))  # noqa: E731
    found = {"sparsity": skipped(scores), "near": near(scores), "score": scores, "score_squared": scores**2}
    return {name: total(values) for name, values in found.items()}


WATCH = Watch((FEATURE,), routing_sums)


def routing_tallies(features: Mapping[str, Array], counted: Bool[Array, "b t"]) -> dict[str, Ratio]:
    """By layer, over the positions that are counted: `sparsity`, `near`, and `union_s` for each s of `SIZES`.

    `union_s` is the share of experts that every token of a group of s skips, so that a batch of s need not read their
    weights (LTE, section 5, the sparsity of a batch). The tokens of a group lie as far apart as the batch allows: in
    different sequences, as far as there are. A batch of fewer than s tokens has no such group.
    """
    scores = features[SCORES]
    layers, b, t, n = scores.shape
    split = jax.typeof(scores).sharding.spec[-1]
    whole = jax.sharding.reshard(scores, jax.P(None, None, None, split)).reshape(layers, b * t, n)
    valid = jax.sharding.reshard(counted, jax.P(None, None)).reshape(b * t)

    def share(which: Bool[Array, "l p n"], of: Bool[Array, " p"]) -> Ratio:
        total = jnp.sum((which & of[None, :, None]).astype(jnp.float32), (1, 2))
        return Ratio(total, jnp.full((layers,), n * jnp.sum(of.astype(jnp.float32))))

    off = skipped(whole)
    found = {"sparsity": share(off, valid), "near": share(near(whole), valid)}
    for size in SIZES:
        groups = b * t // size
        together = jnp.all(off[:, : size * groups].reshape(layers, size, groups, n), 1)
        found[f"union_{size}"] = share(together, jnp.all(valid[: size * groups].reshape(size, groups), 0))
    return found


def routing_rows(tallies: Tallies, step: int) -> list[dict[str, Any]]:
    """A row for each router, and one of all, `site="all"`, for metrics.jsonl; a quotient that is none is None."""
    layers = len(next(iter(tallies.values())).total) if tallies else 0
    sites = {f"layers.{layer}.{SCORES}": slice(layer, layer + 1) for layer in range(layers)}
    whole = {"all": slice(None)} if tallies else {}
    return [
        {"kind": "routing", "step": step, "site": site} | {name: _quotient(r, at) for name, r in tallies.items()}
        for site, at in (sites | whole).items()
    ]


def _quotient(ratio: Ratio, at: slice) -> float | None:
    total, over = (math.fsum(map(float, part[at])) for part in ratio)
    return total / over if over else None
