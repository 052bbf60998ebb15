"""What a table keeps of a distribution: its likeliest tokens, and the mass of the others or tokens drawn from them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Kept = tuple[Int[Array, "b t k"], Float[Array, "b t k"], Float[Array, "b t"]]
"""Ids, their log-probabilities in nats, the logarithm of the mass of all tokens that have no id here."""


def top(logits: Float[Array, "b t v"], k: int) -> Kept:
    """The k likeliest, and the mass of all others (its logarithm is -inf where there are none).

    The mass is summed over the others, not subtracted from 1: a small one keeps its digits.
    """
    indices, values, others = _split(logits, k)
    return indices, values, jax.nn.logsumexp(others, axis=-1)


def sampled(logits: Float[Array, "b t v"], k: int, drawn: int, start: Float[Array, "b t"]) -> Kept:
    """As `top`, with `drawn` of the k drawn from all but the likeliest k - drawn; these stand for the whole tail.

    Sampling knowledge distillation (Anshumann et al., arXiv 2503.16870): the expectation of what is kept is
    the teacher's distribution, and so is that of every gradient linear in it. Here the likeliest are kept as they are,
    and the others drawn systematically (Madow 1949), at (start + j) / drawn of their mass in the order of ids, `start`
    uniform in [0, 1): a token of mass m within the tail is drawn drawn * m times, rounded up or down. Of a token drawn
    more than once all but the first entry have no mass.
    """
    indices, values, others = _split(logits, k - drawn)
    tail = jax.nn.logsumexp(others, axis=-1, keepdims=True)
    below = jnp.cumsum(jnp.exp(others - jnp.where(jnp.isfinite(tail), tail, 0)), axis=-1)
    points = jnp.stack([(start.astype(values.dtype) + j) / drawn for j in range(drawn)], axis=-1)
    found = _first(below, points * below[..., -1:], "right")
    found = jnp.minimum(found, _first(below, below[..., -1:], "left"))  # where a point is rounded up to the whole
    same = found[..., :, None] == found[..., None, :]
    estimated = tail + jnp.log(jnp.sum(same, -1) / drawn).astype(values.dtype)
    repeated = jnp.any(jnp.tril(same, -1), -1)
    return (
        jnp.concatenate([indices, found.astype(indices.dtype)], -1),
        jnp.concatenate([values, jnp.where(repeated, -jnp.inf, estimated)], -1),
        jnp.full_like(tail[..., 0], -jnp.inf),
    )


def _split(logits: Array, k: int) -> tuple[Array, Array, Array]:
    """Ids and log-probabilities of the k likeliest; those of all tokens, less these (-inf)."""
    logp = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)
    values, indices = jax.lax.top_k(logp, k)
    return indices, values, jnp.put_along_axis(logp, indices, -jnp.inf, axis=-1, inplace=False)


def _first(rising: Array, points: Array, side: str) -> Array:
    """Along the last axis the first place whose value is above a point ("right") or not below it ("left")."""
    search = jax.vmap(jax.vmap(lambda row, at: jnp.searchsorted(row, at, side=side)))
    return search(rising, points)
