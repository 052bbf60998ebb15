"""Straight-through rounding: the one place where a derivative is chosen instead of computed."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fbi.quant.grid import Grid
from fbi.quant.surrogate import Surrogate


class Ctx(NamedTuple):
    """What a quantizer may know beside its tensor."""

    t: Float[Array, ""] | float = 1.0
    """Training progress in [0, 1], traced: schedules do not recompile."""
    key: PRNGKeyArray | None = None
    """For stochastic rounding; without one rounding is to nearest."""
    positions: Int[Array, " t"] | None = None
    """Positions in the sequence along the second axis of a tensor of keys or values."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def straight_through(grid: Grid, surrogate: Surrogate, units: Float[Array, "*s"], ctx: Ctx) -> Float[Array, "*s"]:
    """Rounds `units` to levels of `grid`; d level / d unit is what `surrogate` says.

    The residual is the evaluated surrogate alone: nothing for the identity, a boolean mask where it is one.
    Bengio, Leonard & Courville, arXiv 1308.3432, section 4 (the straight-through estimator).
    """
    del surrogate
    return grid.level(grid.draw(units, ctx.key))


def _forward(grid: Grid, surrogate: Surrogate, units: Array, ctx: Ctx) -> tuple[Array, Array | None]:
    return grid.level(grid.draw(units, ctx.key)), surrogate(grid, units, jnp.asarray(ctx.t, units.dtype))


def _backward(grid: Grid, surrogate: Surrogate, slope: Array | None, cotangent: Array) -> tuple[Array, None]:
    del grid, surrogate
    if slope is None:
        return cotangent, None
    if slope.dtype == jnp.bool_:
        return jnp.where(slope, cotangent, jnp.zeros((), cotangent.dtype)), None
    return cotangent * slope, None


straight_through.defvjp(_forward, _backward)
