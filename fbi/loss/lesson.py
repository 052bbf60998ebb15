"""What a loss over logits asks of a teacher: its logits at some positions, given those of the student there."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fbi.data.table import Rows
from fbi.model.dense import Product

_NOTHING = 6e4  # nats: below any probability, and what float16 holds


class Lesson(NamedTuple):
    """A teacher over one batch; `logits(fixed, pieces, own)` are its logits where `own` [b, t, v] are the student's.

    `pieces` are arrays [b, t, ...] that may be cut along b and t, as `own` then is; `fixed` are not.
    """

    logits: Callable[[Any, Any, Array], Array]
    fixed: Any
    pieces: Any

    def __call__(self, own: Float[Array, "b t v"]) -> Float[Array, "b t v"]:
        """The logits at all positions."""
        return self.logits(self.fixed, self.pieces, own)


def known(logits: Float[Array, "b t v"]) -> Lesson:
    """A teacher whose logits exist whole."""
    return Lesson(_whole, None, logits)


def _whole(fixed: None, logits: Array, own: Array) -> Array:
    del fixed, own
    return logits


def read_out(product: Product, logits: Callable[[Array, Product], Array]) -> Lesson:
    """A teacher whose logits are those of its final hidden states, by `Model.head_product` and `Model.head_logits`."""

    def of_part(fixed: Any, pieces: Any, own: Array) -> Array:
        part = fixed._replace(x=pieces[0], memo=pieces[1])
        return logits(jnp.dot(part.x, part.full, out_sharding=jax.typeof(own).sharding.spec), part)

    return Lesson(of_part, product._replace(x=None, w=None, memo=None), (product.x, product.memo))


def from_rows(rows: Rows) -> Lesson:
    """A teacher of which a table has the likeliest tokens K and the mass of all others; see `completed`."""
    return Lesson(lambda fixed, pieces, own: completed(own, pieces), None, rows)


def completed(own: Float[Array, "b t v"], rows: Rows) -> Float[Array, "b t v"]:
    """Log-probabilities p of a teacher known at its k likeliest tokens K: the student's q spreads the rest.

        p(v) = p_T(v) for v in K,    p(v) = p_T(tail) q(v) / q(tail) else,    tail = sum over v not in K;

    a constant to the gradient. So every loss over logits is the one in which all tokens outside K are a single outcome:
    the soft cross-entropy has the gradient q(v) - p_T(v) at the logits of K, as with the whole vocabulary, and
    q(v) (1 - p_T(tail) / q(tail)) elsewhere. It is zero where q agrees with p_T on K, with the mass of the tail right.

    Bias against the whole vocabulary: q(v) p_T(tail) / q(tail) stands for p_T(v) outside K, so the order of tokens
    within the tail is not taught; the gradient is off by at most 2 p_T(tail) in the sum of absolute values. KL(T || S)
    is too small by p_T(tail) KL(T within the tail || S within the tail), never too large (the chain rule), and the
    cross-entropy's value has the student's entropy of the tail in place of its cross-entropy to the teacher's. With k =
    v there is no bias. Renormalising over K instead (`ad:top_k`) teaches that the tail has no mass: a bias that
    training does not remove (Anshumann et al., arXiv 2503.16870). At a temperature, p is softened as it is here. Where
    K holds tokens drawn from the tail (`fbi.train.likeliest.sampled`), which then has no mass, the gradient has
    no bias; the entropy of what was drawn (`floor`) is lower than the teacher's, a divergence higher.
    """
    own = jax.lax.stop_gradient(own)
    mesh, (batch, time, vocabulary) = jax.sharding.get_abstract_mesh(), jax.typeof(own).sharding.spec
    names = vocabulary if isinstance(vocabulary, tuple) else (vocabulary,) if vocabulary else ()

    def placed(own: Array, indices: Array, logp: Array) -> Array:
        b, t, v = own.shape
        # Each device keeps its own part of the vocabulary: an id of another part is out of range, and dropped.
        at = indices.astype(jnp.int32) - (jax.lax.axis_index(names) * v if names else 0)
        at = jnp.where((at >= 0) & (at < v), at, v)
        where = jnp.arange(b)[:, None, None], jnp.arange(t)[None, :, None], at
        return jnp.full_like(own, -jnp.inf).at[where].max(logp.astype(own.dtype), mode="drop")

    if not mesh.empty:
        spec = jax.P(batch, time, None)
        whole = jax.P(batch, time, vocabulary)
        placed = jax.shard_map(placed, in_specs=(whole, spec, spec), out_specs=whole)
    likeliest = placed(own, rows.indices, rows.logp)
    kept = likeliest > -jnp.inf
    others = jax.nn.logsumexp(jnp.where(kept, -jnp.inf, own), axis=-1)
    shift = rows.tail.astype(own.dtype) - others  # not a number where K is the whole vocabulary, and then not used
    # A tail of no mass is given a finite logarithm, as in a table: an infinite one times no probability is no number.
    return jnp.where(kept, likeliest, own + jnp.clip(jnp.nan_to_num(shift), -_NOTHING, _NOTHING)[..., None])
