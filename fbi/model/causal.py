"""Causal self-attention by blocks of queries, with a written gradient that keeps no scores.

FlashAttention, Dao et al., arXiv 2205.14135: the softmax is that of algorithm 1 with all keys of a block of queries at
once, the gradient that of appendix B.2, from the output and the logarithm of each softmax's sum. A block reads the keys
up to its last query alone, so that of the square of scores nine sixteenths are formed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCKS = 8  # at most: a program has the products of each
SHORTEST = 64  # queries of a block: scores of fewer make products too small


def blocks(length: int) -> list[slice]:
    """The blocks of so many queries."""
    size = max(SHORTEST, -(-length // BLOCKS))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _scores(q: Array, k: Array, document: Array | None, at: slice) -> Array:
    """Scaled products of a block's queries and the keys up to its end; the smallest number where one may not look."""
    wide, keys = jnp.promote_types(q.dtype, jnp.float32), k[:, : at.stop].transpose(0, 2, 1)
    product = jnp.einsum("grtk,gks->grts", q[:, :, at], keys, preferred_element_type=wide) / q.shape[-1] ** 0.5
    allowed = jnp.arange(at.start, at.stop)[:, None] >= jnp.arange(at.stop)[None, :]
    if document is not None:
        allowed &= document[at, None] == document[None, : at.stop]
    return jnp.where(allowed[None, None], product, jnp.finfo(wide).min)


@jax.custom_vjp
def causal(
    q: Float[Array, "g r t k"],
    k: Float[Array, "g t k"],
    v: Float[Array, "g t k"],
    document: Int[Array, " t"] | None = None,
) -> Float[Array, "g r t k"]:
    """softmax(q k^T / sqrt(width)) v of one sequence, each position looking at itself and those before it.

    With `document` at those of the same document alone. r query heads share each of the g heads of keys and values.
    """
    return _forward(q, k, v, document)[0]


def _forward(q: Array, k: Array, v: Array, document: Array | None) -> tuple[Array, tuple]:
    mixed, logs = [], []
    for at in blocks(q.shape[2]):
        scores = _scores(q, k, document, at)
        peak = jnp.max(scores, -1, keepdims=True)
        weights = jnp.exp(scores - peak)
        total = jnp.sum(weights, -1, keepdims=True)
        values = jnp.einsum(
            "grts,gsk->grtk", weights.astype(q.dtype), v[:, : at.stop], preferred_element_type=weights.dtype
        )
        mixed.append((values / total).astype(q.dtype))
        logs.append(peak + jnp.log(total))
    out = jnp.concatenate(mixed, 2)
    return out, (q, k, v, document, out, jnp.concatenate(logs, 2))


def _backward(kept: tuple, g: Array) -> tuple[Array, Array, Array, None]:
    """dL/dv = p^T g; with s = p (g v^T - sum of g out), dL/dq = s k and dL/dk = s^T q, both over sqrt(width)."""
    q, k, v, document, out, logs = kept
    wide, scale, length = logs.dtype, q.shape[-1] ** -0.5, q.shape[2]
    along = jnp.sum(g.astype(wide) * out.astype(wide), -1, keepdims=True)
    into = {"preferred_element_type": wide}
    dq, dk, dv = [], [], []
    for at in blocks(length):
        keys, rest = slice(0, at.stop), ((0, 0), (0, length - at.stop), (0, 0))
        p = jnp.exp(_scores(q, k, document, at) - logs[:, :, at])
        dp = jnp.einsum("grtk,gks->grts", g[:, :, at], v[:, keys].transpose(0, 2, 1), **into)
        s = (p * (dp - along[:, :, at])).astype(q.dtype)
        dq.append(jnp.einsum("grts,gsk->grtk", s, k[:, keys], **into))
        dk.append(jnp.pad(jnp.einsum("grts,grtk->gsk", s, q[:, :, at], **into), rest))
        dv.append(jnp.pad(jnp.einsum("grts,grtk->gsk", p.astype(q.dtype), g[:, :, at], **into), rest))
    of_q, of_k, of_v = scale * jnp.concatenate(dq, 2), scale * sum(dk), sum(dv)
    return of_q.astype(q.dtype), jnp.asarray(of_k).astype(k.dtype), jnp.asarray(of_v).astype(v.dtype), None


causal.defvjp(_forward, _backward)
