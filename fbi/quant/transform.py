"""Transforms: invertible maps of a tensor that come before its rounding and are undone after it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fbi.errors import InputError


@dataclasses.dataclass(frozen=True)
class Transform:
    """The identity; a method that rotates overrides both directions. Frozen: it travels in pytrees."""

    def forward(self, x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
        """The tensor in the basis where it is rounded; `axis` is the contraction axis."""
        del axis
        return x

    def inverse(self, y: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
        """Back to the basis where it is used."""
        del axis
        return y

    @property
    def mixes(self) -> bool:
        """Whether it mixes entries along the contraction axis, which must then lie whole on a device."""
        return False

    def reach(self, size: int) -> int:
        """How many neighbours along a contraction axis of that size it mixes: it acts on blocks of so many."""
        del size
        return 1


IDENTITY = Transform()


@functools.cache
def sylvester(width: int) -> np.ndarray:
    """The symmetric orthonormal Hadamard matrix of a power-of-two width, [[H, H], [H, -H]] / sqrt(2) recursively."""
    h = np.ones((1, 1))
    while len(h) < width:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(width)


def largest_block(width: int) -> int:
    """The largest power of two that divides `width`."""
    return width & -width


_SUMMED = 128  # the least block for which `_summed` pays


def _multiplied(x: Array, axis: int, parts: int = 1) -> Array:
    """The matrix along an axis, over the square root of `parts`."""
    h = jnp.asarray(sylvester(x.shape[axis]) / np.sqrt(parts), x.dtype)
    rotated = jax.lax.dot_general(x, h, (((axis,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(rotated, -1, axis)


def _summed(x: Array, axis: int) -> Array:
    """The same by the Kronecker product of a small matrix and one of the rest: a product, then a butterfly of sums."""
    parts = 4 if x.shape[axis] < 256 else 8
    rows = _multiplied(x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :]), axis + 1, parts)
    found = [jax.lax.index_in_dim(rows, i, axis, keepdims=False) for i in range(parts)]
    half = 1
    while half < parts:
        found = [found[i - half] - one if i // half % 2 else one + found[i + half] for i, one in enumerate(found)]
        half *= 2
    return jnp.stack(found, axis).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class Hadamard(Transform):
    """Orthonormal Hadamard rotation of each block of neighbours along the contraction axis; its own inverse.

    QuEST, arXiv 2502.05003, section 3.2 (block 128); BitNet v2, 2504.18415, eq. 3 and 4 (`block=-1`: the whole width).
    A product with the matrix, which a matrix unit does in one pass; of the last axis, on a CPU, in half the time.
    """

    block: int

    @property
    def mixes(self) -> bool:
        """A block must lie on one device."""
        return True

    def width(self, size: int) -> int:
        """The block for an axis of that size; an `InputError` that offers one where it does not divide."""
        block = size if self.block == -1 else self.block
        if block < 1 or block & (block - 1) or size % block:
            raise InputError(
                f"a Hadamard block of {block} does not fit the width {size}: a power of two that divides it; "
                f"use block={largest_block(size)}"
            )
        return block

    def reach(self, size: int) -> int:
        """The block."""
        return self.width(size)

    def forward(self, x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
        """Each block times the matrix."""
        axis %= x.ndim
        block = self.width(x.shape[axis])
        blocked = x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])
        multiplied, summed = (functools.partial(way, axis=axis + 1) for way in (_multiplied, _summed))
        if axis == x.ndim - 1 and block >= _SUMMED:
            return jax.lax.platform_dependent(blocked, cpu=summed, default=multiplied).reshape(x.shape)
        return multiplied(blocked).reshape(x.shape)

    def inverse(self, y: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
        """The same: the matrix is symmetric and orthonormal."""
        return self.forward(y, axis)
