"""Grids: the finite set of levels a value may take, and the integer codes that number them."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Grid:
    """Codes are the consecutive integers low..high; `level(code)` is their value in units of the scale.

    Codes travel as floats inside a computation, so that a level costs no conversion.
    """

    low: int
    high: int

    @property
    def size(self) -> int:
        """The number of codes."""
        return self.high - self.low + 1

    @property
    def bits(self) -> float:
        """Bits of information in a code, log2 of the number of codes."""
        return math.log2(self.size)

    def codes(self, units: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The code of the level that stands for each of `units`."""
        raise NotImplementedError

    def level(self, codes: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The value of each code."""
        raise NotImplementedError

    @property
    def reach(self) -> tuple[float, float]:
        """The lowest and the highest level."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Binary(Grid):
    """Two levels, -1 and +1; zero goes to +1."""

    low: int = -1
    high: int = 0

    def codes(self, units: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """0 where a unit is at least zero, else -1."""
        return jnp.where(units >= 0, 0, -1).astype(units.dtype)

    def level(self, codes: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """2 code + 1."""
        return 2 * codes + 1

    @property
    def reach(self) -> tuple[float, float]:
        """-1 and +1."""
        return -1.0, 1.0


@dataclasses.dataclass(frozen=True)
class Integers(Grid):
    """The integers low..high; ties round half to even. (-1, 1) is the ternary grid."""

    def codes(self, units: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """RoundClip(unit, low, high)."""
        codes = jnp.clip(jnp.round(units), self.low, self.high)
        return jnp.where(codes == 0, jnp.zeros((), codes.dtype), codes)  # no -0.0: an integer code has none

    def level(self, codes: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The code itself."""
        return codes

    @property
    def reach(self) -> tuple[float, float]:
        """Low and high."""
        return float(self.low), float(self.high)
