"""Causal grouped-query attention with rotary positions, behind one function a platform may replace."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fbi.model import taps
from fbi.model.axes import Axes
from fbi.model.causal import causal
from fbi.model.learned import Operand, leaves_of
from fbi.model.linear import Linear, Read, for_site
from fbi.model.norm import RMSNorm
from fbi.policy import NONE, Methods
from fbi.quant import Ctx, QParams

LONG = 256  # queries from which on a CPU takes sequences one by one; measured: slower at 128, faster at 256


Weigh = Callable[[Array, Array, Any], Array]  # (scores, allowed, what it needs) -> attention weights


class Cache(NamedTuple):
    """Keys and values of one layer for every position so far, [b, g, s, k]: a step of decoding moves none of them."""

    k: Array
    v: Array


class Where(NamedTuple):
    """Positions of the queries [t] and of the keys [s], and the documents [b, s] that attention must not leave."""

    queries: Int[Array, " t"]
    keys: Int[Array, " s"]
    documents: Int[Array, "b s"] | None = None


def rotate(x: Float[Array, "b t h k"], positions: Int[Array, " t"], base: float) -> Float[Array, "b t h k"]:
    """Rotary position embedding, halves paired as in Llama checkpoints of Hugging Face; Su et al., arXiv 2104.09864."""
    half = x.shape[-1] // 2
    wide = jnp.promote_types(x.dtype, jnp.float32)
    frequencies = base ** (-jnp.arange(half, dtype=wide) / half)
    angles = (positions.astype(wide)[:, None] * frequencies[None, :])[None, :, None, :]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def _written(cache: Array, new: Array, start: Int[Array, ""]) -> Array:
    """The cache [b, g, s, k] with `new` from `start` on, in place.

    Within a condition, which always holds: XLA fuses a bare update into each of its readers, for which it copies the
    cache once each (measured: 37 ms for the attention of a token in two layers of LLaMA-7B instead of 3).
    """
    update = lambda: jax.lax.dynamic_update_slice_in_dim(cache, new, start, 2)  # noqa: E731
    return jax.lax.cond(start >= 0, update, lambda: cache)


def scores(q: Float[Array, "t h k"], k: Float[Array, "g s k"]) -> Float[Array, "g r t s"]:
    """Scaled products of queries and keys, by group and query head of the group."""
    t, h, width = q.shape
    g = k.shape[0]
    queries = q.reshape(t, g, h // g, width).transpose(1, 2, 0, 3)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    if t == 1:  # takes the keys where they lie; many queries are faster, on a CPU, with keys that were turned before
        product = jnp.einsum("grk,gsk->grs", queries[:, :, 0], k, preferred_element_type=wide)[:, :, None]
    else:
        product = jnp.einsum("grtk,gks->grts", queries, k.transpose(0, 2, 1), preferred_element_type=wide)
    return product / width**0.5


def _exponentials(scores: Float[Array, "g r t s"], allowed: Bool[Array, "#g #r t s"]) -> tuple[Array, Array]:
    """The softmax before its division: numerators, and their sums."""
    scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, -1, keepdims=True)))
    return weights, jnp.sum(weights, -1, keepdims=True)


def softmax_weights(scores: Float[Array, "g r t s"], allowed: Bool[Array, "#g #r t s"]) -> Float[Array, "g r t s"]:
    """Attention probabilities."""
    weights, total = _exponentials(scores, allowed)
    return weights / total


def _one_sequence(
    q: Float[Array, "t h k"],
    k: Float[Array, "g s k"],
    v: Float[Array, "g s k"],
    allowed: Bool[Array, "t s"],
    weigh: Weigh | None,
    needs: Any,
) -> Float[Array, "t h k"]:
    """Attention of one sequence, heads first; a plain softmax is normalised after the value product."""
    t, h, width = q.shape
    products = scores(q, k)
    wide = products.dtype
    if weigh is None:
        weights, total = _exponentials(products, allowed[None, None])
    else:
        weights = weigh(products, allowed[None, None], needs)
        total = jnp.ones_like(weights[..., :1])
    mixed = jnp.einsum("grts,gsk->grtk", weights.astype(q.dtype), v, preferred_element_type=wide) / total
    return mixed.transpose(2, 0, 1, 3).reshape(t, h, width).astype(q.dtype)


def _by_blocks(row: tuple[Array, ...]) -> Float[Array, "t h k"]:
    """Plain attention of a sequence to itself."""
    q, k, v, *documents = row
    t, h, width = q.shape
    mixed = causal(q.reshape(t, len(k), h // len(k), width).transpose(1, 2, 0, 3), k, v, *documents)
    return mixed.transpose(2, 0, 1, 3).reshape(t, h, width)


def attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b g s k"],
    v: Float[Array, "b g s k"],
    where: Where,
    weigh: Weigh | None = None,
    needs: Any = (),
) -> Float[Array, "b t h k"]:
    """Attention of each query to the keys at or before its position, within its document where documents are given.

    `weigh` takes the place of the softmax (a quantizer of probabilities, a boolean rule); `needs` are the arrays it
    reads. Batch and heads stay on their devices. As many queries as keys stand at the same positions: their plain
    softmax is computed by blocks. On a CPU long sequences are taken one by one, and what `weigh` makes of them is made
    again in the backward pass: their scores then stay in the cache.
    """

    def local(q: Array, k: Array, v: Array, where: Where, needs: Any) -> Array:
        def masked(row: tuple[Array, ...]) -> Array:
            q, k, v, *documents = row
            allowed = where.queries[:, None] >= where.keys[None, :]
            for document in documents:  # one, or none where attention may cross documents
                queried = jnp.take(document, jnp.searchsorted(where.keys, where.queries))
                allowed = allowed & (queried[:, None] == document[None, :])
            return _one_sequence(q, k, v, allowed, weigh, needs)

        square = weigh is None and q.shape[1] == k.shape[2]
        one, again = (_by_blocks, _by_blocks) if square else (masked, jax.checkpoint(masked))
        rows = (q, k, v) if where.documents is None else (q, k, v, where.documents)
        together = lambda *rows: jax.vmap(lambda *row: one(row))(*rows)  # noqa: E731
        if q.shape[1] < LONG:
            return together(*rows)
        in_turn = lambda *rows: jax.lax.map(again, rows)  # noqa: E731
        return jax.lax.platform_dependent(*rows, cpu=in_turn, default=together)

    return jax.shard_map(local, out_specs=jax.typeof(q).sharding.spec)(q, k, v, where, needs)


class Attention(nnx.Module):
    """Projections, rotary positions, attention, output projection."""

    def __init__(
        self,
        linear: Callable[[str], Linear],
        sub_norm: RMSNorm | None,
        *,
        head_dim: int,
        rope_base: float,
        cache: Methods,
        probs: Methods,
        dtype: jnp.dtype,
        axes: Axes,
    ):
        self.head_dim, self.rope_base, self.axes = head_dim, rope_base, axes
        self.sub_norm = sub_norm
        self.kv, self.probs = Operand(cache, 4, head_dim, dtype, "attn.kv"), Operand(probs, 4, 1, dtype, "attn.probs")
        self.q, self.k, self.v, self.o = (linear(f"attn.{name}") for name in "qkvo")

    def __call__(
        self, x: Float[Array, "b t d"], where: Where, cache: Cache | None, ctx: Ctx
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        b, t, _ = x.shape
        hidden = self.axes.hidden(self.axes.heads)

        def heads(y: Array) -> Array:
            count = y.shape[-1] // self.head_dim
            return jnp.reshape(y, (b, t, count, self.head_dim), out_sharding=self.axes.per_head)

        read = Read(x)
        q, k, v = (heads(project(read, hidden, ctx)) for project in (self.q, self.k, self.v))
        q, k = (rotate(y, where.queries, self.rope_base) for y in (q, k))
        positioned = ctx._replace(positions=where.queries)
        k, v = (self.kv(y, for_site(positioned, name)) for y, name in ((k, "attn.k.cache"), (v, "attn.v.cache")))
        taps.tap("attn.qk", (q, k))
        k, v = (y.transpose(0, 2, 1, 3) for y in (k, v))
        if cache is not None:
            k, v = (
                _written(old, new.astype(old.dtype), where.queries[0]) for old, new in zip(cache, (k, v), strict=True)
            )
            cache = Cache(k, v)
        weigh, needs = self._weigh(for_site(ctx, "attn.probs"))
        mixed = attention(q, k, v, where, weigh, needs)
        mixed = jnp.reshape(mixed, (b, t, mixed.shape[2] * self.head_dim), out_sharding=hidden)
        if self.sub_norm is not None:
            mixed = self.sub_norm(mixed)
        return self.o(mixed, self.axes.stream, ctx), cache

    def _weigh(self, ctx: Ctx) -> tuple[Weigh | None, Any]:
        """What takes the place of the softmax, and the arrays it needs; None where it stays."""
        quantizer = self.probs.methods.build()[1]
        if self.probs.methods.activation == NONE:
            return None, ()

        def of_probabilities(scores: Array, allowed: Array, qparams: QParams, ctx: Ctx) -> Array:
            return quantizer.apply(softmax_weights(scores, allowed), qparams, ctx)

        rule = quantizer.weigh or of_probabilities

        def weigh(scores: Array, allowed: Array, needs: Any) -> Array:
            return rule(scores, jnp.broadcast_to(allowed, scores.shape), *needs)

        return weigh, (leaves_of(self.probs, "a"), ctx)
