"""Outliers of activations in a few numbers."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from fbi.quant.select import kth_largest

TOP = 0.001  # the share of entries whose energy is told


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
    least = kth_largest(magnitudes, k)
    above = magnitudes > least
    held = jnp.sum(jnp.where(above, squares, 0)) + (k - jnp.sum(above)) * jnp.square(least)
    rms = jnp.sqrt(energy / x.size)
    return {
        "kurtosis": jnp.mean(jnp.square(centred)) / jnp.square(jnp.mean(centred)),
        "peak": jnp.max(magnitudes) / rms,
        "top_energy": held / energy,
        "rms": rms,
    }
