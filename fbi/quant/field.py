"""Fields: the numbers beside the codes, and how they bring levels back to values.

A field is a NamedTuple of arrays with `value(levels)`. A field may be coarser than its tensor: an axis of size 1 is
shared by all, one of size G by G equal runs of neighbours.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fbi.errors import InputError


@runtime_checkable
class Field(Protocol):
    """What stands beside the codes."""

    def value(self, levels: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The values of the levels."""
        ...

    def _asdict(self) -> dict[str, Array | None]: ...


def spread(numbers: Array, shape: tuple[int, ...]) -> Array:
    """`numbers` repeated along the axes on which groups share them, so that it broadcasts to `shape`."""
    for axis, (have, want) in enumerate(zip(numbers.shape, shape, strict=True)):
        if have not in (1, want):
            numbers = jnp.repeat(numbers, want // have, axis)
    return numbers


def groups(width: int, size: int) -> int:
    """How many groups of `size` an axis of that width has; an error that offers a size otherwise."""
    if size < 1 or width % size:
        fitting = max(n for n in range(1, min(max(size, 1), width) + 1) if width % n == 0)
        raise InputError(f"group={size} does not divide the width {width}; use group={fitting}")
    return width // size


class Affine(NamedTuple):
    """level * scale, plus the shift where there is one."""

    scale: Array
    shift: Array | None = None

    def value(self, levels: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The one way back from the grid."""
        value = levels * spread(self.scale, levels.shape)
        return value if self.shift is None else value + spread(self.shift, levels.shape)


class Unit(NamedTuple):
    """No numbers at all: a level is its own value. `empty` only carries the type."""

    empty: Array

    def value(self, levels: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The levels."""
        return levels


class TwoSided(NamedTuple):
    """One scale for positive levels, another for negative ones."""

    positive: Array
    negative: Array

    def value(self, levels: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Level times the scale of its side."""
        return levels * jnp.where(levels < 0, self.negative, self.positive)


class RankOne(NamedTuple):
    """level * (left * right): one scale for each input, one for each output."""

    left: Array
    right: Array

    def value(self, levels: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Level times the product of its two scales."""
        return levels * (self.left * self.right)


class Dual(NamedTuple):
    """Two binary digits with a scale each: level -1, 0, 1, 2 stands for second, 0, first + second, first."""

    first: Array
    second: Array

    def value(self, levels: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The sum of the scales whose digit is set. Along the levels its slope is their mean step."""
        first, second = spread(self.first, levels.shape), spread(self.second, levels.shape)
        digits = jnp.where(levels >= 1, first, 0) + jnp.where(jnp.abs(levels) == 1, second, 0)
        step = jax.lax.stop_gradient((first - second) / 3)
        return digits + (levels - jax.lax.stop_gradient(levels)) * step  # the second term is zero
