"""Surrogates: the derivative used for a rounding, evaluated in the forward pass.

Each is a function (grid, units, progress) -> None for the identity, a boolean mask, or an array of slopes. Those with
numbers of their own are frozen dataclasses, so that equal ones compile to one program.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fbi.errors import unknown
from fbi.quant.grid import Grid

Surrogate = Callable[[Grid, Array, Array], Array | None]
Name = Literal[
    "identity", "clip", "trust", "tanh", "swishsign", "approxsign", "dorefa", "ede", "fourier", "reste", "adabin"
]


def identity(grid: Grid, units: Float[Array, "*s"], progress: Float[Array, ""]) -> None:
    """The gradient passes unchanged, also where a value was clipped: FBI-LLM (2407.07093), BitNet (2402.17764)."""
    del grid, units, progress


@dataclasses.dataclass(frozen=True)
class Clip:
    """Passes the gradient within `factor` times the reach of the grid.

    For a sign and factor 1, the hard tanh of BNN, arXiv 1602.02830, eq. 4; the magnitude-aware gradient of Bi-Real,
    arXiv 1808.00278, eq. 9, is this mask times the scale that stands outside. QuEST, 2502.05003, takes 1.30 or 1.25.
    """

    factor: float = 1.0

    def __call__(self, grid: Grid, units: Float[Array, "*s"], progress: Float[Array, ""]) -> Bool[Array, "*s"]:
        """The mask."""
        del progress
        low, high = grid.reach
        return (units >= self.factor * low) & (units <= self.factor * high)


@dataclasses.dataclass(frozen=True)
class Within:
    """Passes the gradient where |unit| <= limit."""

    limit: float

    def __call__(self, grid: Grid, units: Float[Array, "*s"], progress: Float[Array, ""]) -> Bool[Array, "*s"]:
        """The mask."""
        del grid, progress
        return jnp.abs(units) <= self.limit


@dataclasses.dataclass(frozen=True)
class Trust:
    """Passes the gradient where the rounding moved a value by at most a radius; by default half the widest gap.

    QuEST, arXiv 2502.05003, eq. 2 and 3: the trust mask, in closed form where the radius covers every gap.
    """

    radius: float | None = None

    def __call__(self, grid: Grid, units: Float[Array, "*s"], progress: Float[Array, ""]) -> Bool[Array, "*s"]:
        """The mask."""
        del progress
        return grid.trusted(units, grid.radius if self.radius is None else self.radius)


def tanh(grid: Grid, units: Float[Array, "*s"], progress: Float[Array, ""]) -> Float[Array, "*s"]:
    """1.001 - tanh²(u): OneBit's published code; the 0.001 keeps saturated weights alive."""
    del grid, progress
    return 1.001 - jnp.square(jnp.tanh(units))


def swishsign(grid: Grid, units: Float[Array, "*s"], progress: Float[Array, ""]) -> Float[Array, "*s"]:
    """b (2 - b u tanh(b u / 2)) / (1 + cosh(b u)), b = 5: BNN+, arXiv 1812.11800, eq. 6."""
    del grid, progress
    scaled = 5.0 * jnp.clip(units, -10.0, 10.0)  # beyond, the slope is below 1e-20 and cosh overflows
    return 5.0 * (2 - scaled * jnp.tanh(scaled / 2)) / (1 + jnp.cosh(scaled))


def approxsign(grid: Grid, units: Float[Array, "*s"], progress: Float[Array, ""]) -> Float[Array, "*s"]:
    """2 - 2|u| within 1, else 0: Bi-Real, arXiv 1808.00278, eq. 7."""
    del grid, progress
    return jnp.maximum(2 - 2 * jnp.abs(units), 0)


def dorefa(grid: Grid, units: Float[Array, "*s"], progress: Float[Array, ""]) -> Bool[Array, "*s"]:
    """Passes the gradient from zero to the top of the grid: DoReFa-Net, arXiv 1606.06160, section 2.5."""
    del progress
    return (units >= 0) & (units <= grid.reach[1])


def ede(grid: Grid, units: Float[Array, "*s"], progress: Float[Array, ""]) -> Float[Array, "*s"]:
    """k t (1 - tanh²(t u)), k = max(1/t, 1), t from 0.1 to 10 log-uniformly: IR-Net, arXiv 1909.10788, eq. 11 to 13."""
    del grid
    t = 10.0 ** (2.0 * progress - 1.0)
    return jnp.maximum(1 / t, 1) * t * (1 - jnp.square(jnp.tanh(t * units)))


def fourier(grid: Grid, units: Float[Array, "*s"], progress: Float[Array, ""]) -> Float[Array, "*s"]:
    """(4 w / pi) sum over i <= n of cos((2i + 1) w u) within 1, else 0, with w = 0.1.

    FDA-BNN, arXiv 2103.00841, eq. 8, with ten terms: the integral is then 2.045, a sign's is 2.
    """
    del grid, progress
    omega, terms = 0.1, 10
    series = sum((jnp.cos((2 * i + 1) * omega * units) for i in range(terms)), jnp.zeros_like(units))
    return jnp.where(jnp.abs(units) <= 1, 4 * omega / math.pi * series, 0)


def reste(grid: Grid, units: Float[Array, "*s"], progress: Float[Array, ""]) -> Float[Array, "*s"]:
    """(1/o) |u|^((1-o)/o) within 1.5, its chord below 0.1; o from 1 to 3 as 1 - cos(pi t / 2).

    ReSTE, arXiv 2308.06689, eq. 8 and its published code.
    """
    del grid
    least, limit = 0.1, 1.5
    o = 1.0 + 2.0 * (1.0 - jnp.cos(0.5 * math.pi * progress))
    magnitude = jnp.abs(units)
    slope = jnp.maximum(magnitude, least) ** ((1 - o) / o) / o
    slope = jnp.where(magnitude < least, least ** (1 / o) / least, slope)
    return jnp.where(magnitude <= limit, slope, 0)


def adabin(grid: Grid, units: Float[Array, "*s"], progress: Float[Array, ""]) -> Float[Array, "*s"]:
    """k t (1 - tanh²(t u)) with k = 10 and t = 0.1: AdaBin's weights as QuEST's baselines run them."""
    del grid, progress
    return 1 - jnp.square(jnp.tanh(0.1 * units))


SURROGATES: dict[str, Surrogate] = {
    "identity": identity,
    "clip": Clip(),
    "trust": Trust(),
    "tanh": tanh,
    "swishsign": swishsign,
    "approxsign": approxsign,
    "dorefa": dorefa,
    "ede": ede,
    "fourier": fourier,
    "reste": reste,
    "adabin": adabin,
}


def surrogate(name: str) -> Surrogate:
    """The surrogate of that name; an `InputError` that lists the valid names otherwise."""
    if name not in SURROGATES:
        raise unknown("surrogate", name, SURROGATES)
    return SURROGATES[name]


def regraded(x: Float[Array, "..."], factor: Array | float | int) -> Float[Array, "..."]:
    """x itself, with its gradient multiplied by `factor`: sg(x) + factor (x - sg(x)), exactly x."""
    fixed = jax.lax.stop_gradient(x)
    return fixed + factor * (x - fixed)
