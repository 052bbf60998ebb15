"""Grids: the finite set of levels a value may take, and the integer codes that number them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray, UInt8

from fbi.quant import pack


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

    @property
    def code_type(self) -> jnp.dtype:
        """The integer type that holds a code in memory."""
        return jnp.dtype(jnp.int8 if self.low >= -128 and self.high <= 127 else jnp.int16)

    def codes(self, units: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The code of the level that stands for each of `units`."""
        raise NotImplementedError

    def level(self, codes: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The value of each code."""
        raise NotImplementedError

    def draw(self, units: Float[Array, "*s"], key: PRNGKeyArray | None) -> Float[Array, "*s"]:
        """The codes of a training step; `key` is for grids that round at random."""
        del key
        return self.codes(units)

    @property
    def levels(self) -> tuple[float, ...]:
        """The level of each code, as numbers of Python."""
        raise NotImplementedError

    @property
    def reach(self) -> tuple[float, float]:
        """The lowest and the highest level."""
        return self.levels[0], self.levels[-1]

    @property
    def radius(self) -> float:
        """The largest distance of a value to its level within the reach: half the widest gap."""
        raise NotImplementedError

    def trusted(self, units: Float[Array, "*s"], radius: float) -> Bool[Array, "*s"]:
        """|level - unit| <= radius, where that is at least the grid's own radius.

        Closed form: within the reach it always holds. Comparing the error itself would compare numbers that are equal
        up to rounding at every border between two cells.
        """
        low, high = self.reach
        return (units >= low - radius) & (units <= high + radius)

    def packed_size(self, shape: tuple[int, ...]) -> int:
        """Bytes that the codes of a tensor take in a file."""
        return pack.packed_size(math.prod(shape), self.size)

    def pack(self, codes: Integer[Array, "..."], *, trits: bool = True) -> dict[str, UInt8[Array, "bytes"]]:
        """The codes as dense bytes, `trits` as in `fbi.quant.pack`."""
        return {"codes": pack.pack(codes - self.low, self.size, trits=trits)}

    def unpack(self, arrays: dict[str, Array], shape: tuple[int, ...], *, trits: bool = True) -> Integer[Array, "..."]:
        """The inverse of `pack` for codes of that shape."""
        return pack.unpack(arrays["codes"], shape, self.size, trits=trits).astype(jnp.int16) + self.low


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
    def levels(self) -> tuple[float, ...]:
        """-1 and +1."""
        return -1.0, 1.0

    @property
    def radius(self) -> float:
        """Zero lies 1 from both."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class Integers(Grid):
    """The integers low..high; ties round half to even. (-1, 1) is the ternary grid, (0, 1) the boolean one."""

    def codes(self, units: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """RoundClip(unit, low, high)."""
        codes = jnp.clip(jnp.round(units), self.low, self.high)
        return jnp.where(codes == 0, jnp.zeros((), codes.dtype), codes)  # no -0.0: an integer code has none

    def level(self, codes: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The code itself."""
        return codes

    @property
    def levels(self) -> tuple[float, ...]:
        """The codes."""
        return tuple(map(float, range(self.low, self.high + 1)))

    @property
    def radius(self) -> float:
        """Half a step."""
        return 0.5


@dataclasses.dataclass(frozen=True)
class HalfIntegers(Grid):
    """code + 1/2 for the codes low..high: the mid-rise grid, without a zero when it is symmetric."""

    @classmethod
    def of(cls, bits: int) -> "HalfIntegers":
        """The symmetric grid of 2^bits levels."""
        return cls(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def codes(self, units: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Clip(floor(unit), low, high)."""
        codes = jnp.clip(jnp.floor(units), self.low, self.high)
        return jnp.where(codes == 0, jnp.zeros((), codes.dtype), codes)  # floor(-0.0) is -0.0

    def level(self, codes: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Code + 1/2."""
        return codes + 0.5

    @property
    def levels(self) -> tuple[float, ...]:
        """The codes and 1/2."""
        return tuple(code + 0.5 for code in range(self.low, self.high + 1))

    @property
    def radius(self) -> float:
        """Half a step."""
        return 0.5


@dataclasses.dataclass(frozen=True)
class Levels(Grid):
    """Any rising table of levels; a value goes to the nearest, a tie to the higher one."""

    low: int = dataclasses.field(init=False, default=0)
    high: int = dataclasses.field(init=False)
    table: tuple[float, ...]

    def __post_init__(self):
        object.__setattr__(self, "high", len(self.table) - 1)

    def codes(self, units: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """How many of the borders halfway between levels lie at or below each unit."""
        borders = [(a + b) / 2 for a, b in zip(self.table, self.table[1:], strict=False)]
        return sum(((units >= border).astype(units.dtype) for border in borders), jnp.zeros_like(units))

    def level(self, codes: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The entry of the table, by comparisons: a gather is slow where vectors are short."""
        value = jnp.full_like(codes, self.table[0])
        for code, entry in enumerate(self.table[1:], 1):
            value = jnp.where(codes >= code, jnp.asarray(entry, codes.dtype), value)
        return value

    @property
    def levels(self) -> tuple[float, ...]:
        """The table."""
        return self.table

    @property
    def radius(self) -> float:
        """Half the widest gap."""
        return max(b - a for a, b in zip(self.table, self.table[1:], strict=False)) / 2

    def trusted(self, units: Float[Array, "*s"], radius: float) -> Bool[Array, "*s"]:
        """The closed form where the radius covers the widest gap, else the error itself."""
        if radius >= self.radius:
            return Grid.trusted(self, units, radius)
        return jnp.abs(self.level(self.codes(units)) - units) <= radius


@dataclasses.dataclass(frozen=True)
class Stochastic(Grid):
    """Another grid of equal steps, rounded at random in training so that the expectation is the value itself.

    Gupta et al., arXiv 1502.02551, section 3; without a key, and in `encode`, rounding is to nearest.
    """

    low: int = dataclasses.field(init=False)
    high: int = dataclasses.field(init=False)
    base: Grid
    width: float = 1.0
    """Distance between neighbouring levels of the base, in units."""

    def __post_init__(self):
        object.__setattr__(self, "low", self.base.low)
        object.__setattr__(self, "high", self.base.high)

    def codes(self, units: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Those of the base."""
        return self.base.codes(units)

    def draw(self, units: Float[Array, "*s"], key: PRNGKeyArray | None) -> Float[Array, "*s"]:
        """The base's codes of the units moved by uniform noise of one step's width."""
        if key is None:
            return self.base.codes(units)
        noise = self.width * jax.random.uniform(key, units.shape, units.dtype, -0.5, 0.5)
        return self.base.codes(units + noise)

    def level(self, codes: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Those of the base."""
        return self.base.level(codes)

    @property
    def levels(self) -> tuple[float, ...]:
        """Those of the base."""
        return self.base.levels

    @property
    def radius(self) -> float:
        """That of the base."""
        return self.base.radius
