"""Surrogates: the derivative used for a rounding, evaluated in the forward pass.

Each is a function (grid, units, progress) -> None for the identity, a boolean mask, or an array of slopes.
"""

from collections.abc import Callable

from jaxtyping import Array, Bool, Float

from fbi.errors import unknown
from fbi.quant.grid import Grid

Surrogate = Callable[[Grid, Array, Array], Array | None]


def identity(grid: Grid, units: Float[Array, "*s"], progress: Float[Array, ""]) -> None:
    """The gradient passes unchanged, also where a value was clipped: FBI-LLM (2407.07093), BitNet (2402.17764)."""
    del grid, units, progress


def clip(grid: Grid, units: Float[Array, "*s"], progress: Float[Array, ""]) -> Bool[Array, "*s"]:
    """Passes the gradient inside the reach of the grid: for a sign, the hard tanh of BNN (1602.02830, eq. 4)."""
    del progress
    low, high = grid.reach
    return (units >= low) & (units <= high)


SURROGATES: dict[str, Surrogate] = {"identity": identity, "clip": clip}


def surrogate(name: str) -> Surrogate:
    """The surrogate of that name; an `InputError` that lists the valid names otherwise."""
    if name not in SURROGATES:
        raise unknown("surrogate", name, SURROGATES)
    return SURROGATES[name]
