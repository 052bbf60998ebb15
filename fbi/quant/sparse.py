"""Grids that set part of a tensor to zero: N:M pairs and the largest share of a token."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, UInt8

from fbi.errors import InputError
from fbi.quant.grid import Grid
from fbi.quant.select import kth_largest

GROUP, KEPT = 4, 2  # pairs in a group of eight, and how many of them stay: the hardware's 4:8 in pairs
SUBSETS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]  # of the pairs that stay, by number


def _pairs(x: Array, axis: int) -> Array:
    """x with `axis` last and split into [..., groups, 4, 2]."""
    moved = jnp.moveaxis(x, axis, -1)
    if moved.shape[-1] % (2 * GROUP):
        raise InputError(f"4:8 sparsity needs a width that is a multiple of 8, not {moved.shape[-1]}; drop sparsity")
    return moved.reshape(*moved.shape[:-1], -1, GROUP, 2)


def _unpaired(x: Array, shape: tuple[int, ...], axis: int) -> Array:
    """The inverse of `_pairs`."""
    moved = [n for i, n in enumerate(shape) if i != axis % len(shape)] + [shape[axis]]
    return jnp.moveaxis(x.reshape(moved), -1, axis)


@dataclasses.dataclass(frozen=True)
class PairSparse(Grid):
    """4:8 sparsity in pairs on a grid of unit steps: of four neighbouring pairs the two of smallest norm are zero.

    QuEST, arXiv 2502.05003, section 4.3 ("2:4 INT4"). Code low - 1 of the base stands for the zero that was cut.
    """

    low: int = dataclasses.field(init=False)
    high: int = dataclasses.field(init=False)
    base: Grid
    axis: int

    def __post_init__(self):
        object.__setattr__(self, "low", self.base.low - 1)
        object.__setattr__(self, "high", self.base.high)

    @property
    def bits(self) -> float:
        """Half the codes, and four bits of mask for eight weights, as sparse tensor cores keep it."""
        return self.base.bits * KEPT / GROUP + 0.5

    def kept(self, units: Float[Array, "*s"]) -> Bool[Array, "*s"]:
        """Which entries stay: those of the two pairs of largest norm; of equal ones the first."""
        norms = jnp.sum(jnp.square(_pairs(units, self.axis)), -1, keepdims=True)
        # The rank of each pair by comparisons: a sort of four is slow on vector units.
        rivals = jnp.swapaxes(norms, -1, -2)
        earlier = jnp.tri(GROUP, k=-1, dtype=bool).reshape((1,) * (norms.ndim - 2) + (GROUP, GROUP))
        rank = jnp.sum((rivals > norms) | ((rivals == norms) & earlier), -1, keepdims=True)
        return _unpaired(jnp.broadcast_to(rank < KEPT, (*rank.shape[:-1], 2)), units.shape, self.axis)

    def codes(self, units: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Those of the base where an entry stays."""
        return jnp.where(self.kept(units), self.base.codes(units), jnp.asarray(self.low, units.dtype))

    def level(self, codes: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Zero, or that of the base."""
        return jnp.where(codes < self.base.low, jnp.zeros((), codes.dtype), self.base.level(codes))

    @property
    def levels(self) -> tuple[float, ...]:
        """Zero, then those of the base."""
        return (0.0, *self.base.levels)

    @property
    def reach(self) -> tuple[float, float]:
        """That of the base."""
        return self.base.reach

    @property
    def radius(self) -> float:
        """That of the base."""
        return self.base.radius

    def trusted(self, units: Float[Array, "*s"], radius: float) -> Bool[Array, "*s"]:
        """A kept entry as in the base; one that was cut has its own magnitude as error."""
        return jnp.where(self.kept(units), self.base.trusted(units, radius), jnp.abs(units) <= radius)

    def packed_size(self, shape: tuple[int, ...]) -> int:
        """Half the codes, and four bits for each eight."""
        count = math.prod(shape)
        return self.base.packed_size((count // 2,)) + -(-count // 16)

    def pack(self, codes: Integer[Array, "..."], *, trits: bool = True) -> dict[str, UInt8[Array, "bytes"]]:
        """The codes of the pairs that stay, in order, and the number of their subset for each group of eight."""
        pairs = _pairs(codes, self.axis)
        stays = pairs[..., 0] >= self.base.low
        chosen = jnp.argsort(~stays, axis=-1, stable=True)[..., :KEPT]
        left = jnp.take_along_axis(pairs, chosen[..., None], -2)
        first, second = chosen[..., 0], chosen[..., 1]
        number = (first * (7 - first)) // 2 + second - first - 1  # the place in SUBSETS
        nibbles = jnp.pad(number.reshape(-1).astype(jnp.uint8), (0, number.size % 2)).reshape(-1, 2)
        return self.base.pack(left, trits=trits) | {"mask": nibbles[:, 0] | (nibbles[:, 1] << 4)}

    def unpack(self, arrays: dict[str, Array], shape: tuple[int, ...], *, trits: bool = True) -> Integer[Array, "..."]:
        """The inverse of `pack`."""
        like = jax.eval_shape(lambda: _pairs(jnp.zeros(shape, jnp.int16), self.axis)).shape
        nibbles = jnp.stack([arrays["mask"] & 15, arrays["mask"] >> 4], -1).reshape(-1)[: math.prod(like[:-2])]
        chosen = jnp.asarray(SUBSETS)[nibbles.astype(jnp.int32)].reshape(*like[:-2], KEPT, 1)
        left = self.base.unpack(arrays, (*like[:-2], KEPT, 2), trits=trits)
        slots = jnp.arange(GROUP).reshape((1,) * (len(like) - 2) + (GROUP, 1))
        pairs = jnp.full(like, self.low, jnp.int16)
        for k in range(KEPT):
            pairs = jnp.where(slots == chosen[..., k : k + 1, :], left[..., k : k + 1, :], pairs)
        return _unpaired(pairs, shape, self.axis)


@dataclasses.dataclass(frozen=True)
class TopShare(Grid):
    """Keeps the entries of largest magnitude of each row along `axis`, the rest are zero; a tie keeps all its members.

    BitNet a4.8, arXiv 2411.04965, section 2.2: top-K sparsification, straight-through as the rounding is.
    """

    low: int = dataclasses.field(init=False)
    high: int = dataclasses.field(init=False)
    base: Grid
    share: float
    axis: int

    def __post_init__(self):
        object.__setattr__(self, "low", self.base.low)
        object.__setattr__(self, "high", self.base.high)

    def codes(self, units: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Those of the base where an entry is among the largest, zero elsewhere."""
        magnitude = jnp.abs(jax.lax.stop_gradient(units))
        width = units.shape[self.axis]
        threshold = kth_largest(magnitude, max(round(self.share * width), 1), self.axis)
        return jnp.where(magnitude >= threshold, self.base.codes(units), jnp.zeros((), units.dtype))

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
