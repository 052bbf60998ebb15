"""The sparse feed-forward layer in plain jax.lax: for every backend, nothing to build."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fbi.serve.packed import ACTIVATIONS, Packed


def listed(active: Bool[Array, "t n"]) -> tuple[Int[Array, " n"], Int[Array, ""]]:
    """The experts that any row uses, in order and before all others, and how many they are."""
    used = jnp.any(active, 0)
    return jnp.argsort(~used, stable=True).astype(jnp.int32), jnp.sum(used, dtype=jnp.int32)


def _product(subscripts: str, a: Array, b: Array) -> Array:
    """A product in the type of `a`, its sums in float32 at least."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(subscripts, a, b.astype(a.dtype), preferred_element_type=wide)


def _hidden(
    x: Float[Array, "t d"], gate: Array | None, up: Array, active: Bool[Array, "*c t"], activation: str
) -> Float[Array, "*c t e"]:
    """activation(x gate) * (x up) of one expert, or of a stack of them, where a row uses it and zero elsewhere."""
    act, into = ACTIVATIONS[activation], lambda w: _product("td,...de->...te", x, w)
    h = act(into(up)) if gate is None else act(into(gate)) * into(up)
    return jnp.where(active[..., None], h, 0).astype(x.dtype)


def gathered(
    x: Float[Array, "t d"],
    packed: Packed,
    active: Bool[Array, "t n"],
    activation: str,
    first: Int[Array, ""],
    cap: int | None = None,
) -> Float[Array, "t d"]:
    """At most `cap` experts (all) are gathered and multiplied at once; more than that take a branch that gathers all.

    What is gathered is copied: it pays where the product runs from a fast memory, or where a loop is slow to start.
    """
    n = active.shape[1]
    order, count = listed(active)

    def some(limit: int) -> Array:
        chosen = order[:limit]
        gate, up, down = jax.tree.map(lambda w: w[first + chosen], packed)
        h = _hidden(x, gate, up, active[:, chosen].T, activation)
        return _product("cte,ced->td", h, down)

    if cap is None or cap >= n:
        return some(n)
    return jax.lax.cond(count <= cap, lambda: some(max(cap, 1)), lambda: some(n))


def looped(
    x: Float[Array, "t d"],
    packed: Packed,
    active: Bool[Array, "t n"],
    activation: str,
    first: Int[Array, ""],
    cap: int | None = None,
) -> Float[Array, "t d"]:
    """A loop over the experts in use, one at a time; `cap` is not needed: the loop is as long as their list.

    On a CPU an expert's blocks are copied before they are multiplied: about as fast as the dense layer at half of the
    experts, faster below.
    """
    del cap
    order, count = listed(active)

    def add(i: Array, y: Array) -> Array:
        e = order[i]
        # A slice, which XLA's CPU backend copies at the speed of memory; its gather takes twice as long.
        gate, up, down = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, first + e, keepdims=False), packed)
        return y + _product("te,ed->td", _hidden(x, gate, up, active[:, e], activation), down)

    start = jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
    return jax.lax.fori_loop(0, count, add, start)
