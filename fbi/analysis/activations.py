"""Outliers of activations in a few numbers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

TOP = 0.001  # the share of entries whose energy is told


def largest(magnitudes: Float[Array, "*s"], k: int) -> Float[Array, ""]:
    """The k-th largest of non-negative float32 numbers, exactly.

    Bisection on their bits, whose order is that of the numbers: 31 sums in place of a sort, over any sharding.
    """
    bits = jax.lax.bitcast_convert_type(magnitudes, jnp.int32)

    def refine(place: Array, found: Array) -> Array:
        candidate = found | jax.lax.shift_left(jnp.int32(1), jnp.int32(30) - place)
        return jnp.where(jnp.sum(bits >= candidate, dtype=jnp.int32) >= k, candidate, found)

    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, refine, jnp.int32(0)), jnp.float32)


def activation_statistics(x: Float[Array, "*s"]) -> dict[str, Float[Array, ""]]:
    """How heavy the tails of an activation are; in float32, over all its entries.

    `kurtosis`: E(x - mean)^4 / variance^2, 3 for a Gaussian. `peak`: max|x| / rms(x). `top_energy`: the share of
    sum(x^2) that the top 0.1 % of entries (at least one) hold, 0.013 for a Gaussian. `rms`: the size itself.
    The inputs of the output and down projections are the heavy-tailed ones: BitNet a4.8, arXiv 2411.04965, section 2.
    """
    x = x.astype(jnp.float32)
    centred = jnp.square(x - jnp.mean(x))
    squares, magnitudes = jnp.square(x), jnp.abs(x)
    energy, k = jnp.sum(squares), max(1, round(TOP * x.size))
    least = largest(magnitudes, k)
    above = magnitudes > least
    held = jnp.sum(jnp.where(above, squares, 0)) + (k - jnp.sum(above)) * jnp.square(least)
    rms = jnp.sqrt(energy / x.size)
    return {
        "kurtosis": jnp.mean(jnp.square(centred)) / jnp.square(jnp.mean(centred)),
        "peak": jnp.max(magnitudes) / rms,
        "top_energy": held / energy,
        "rms": rms,
    }
