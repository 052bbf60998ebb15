"""The k-th largest without a sort."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def kth_largest(magnitudes: Float[Array, "..."], k: int, axis: int | None = None) -> Float[Array, "..."]:
    """The k-th largest of non-negative float32 or float64 numbers along `axis` (kept as 1), or of all (a scalar).

    Exactly, by bisection on their bits, whose order is that of the numbers: 31 or 63 sums in place of a sort, which is
    slow on vector units; and a sum may run over an axis that is split over devices.
    """
    kind = {4: jnp.int32, 8: jnp.int64}[magnitudes.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(magnitudes, kind)
    top = 8 * magnitudes.dtype.itemsize - 2
    count = lambda chosen: jnp.sum(chosen, axis, dtype=kind, keepdims=axis is not None)  # noqa: E731

    def refine(place: Array, found: Array) -> Array:
        candidate = found | jax.lax.shift_left(jnp.ones_like(found), (top - place).astype(kind))
        return jnp.where(count(bits >= candidate) >= k, candidate, found)

    start = jnp.zeros_like(count(bits > 0))
    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, top + 1, refine, start), magnitudes.dtype)
