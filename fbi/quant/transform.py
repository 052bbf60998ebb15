"""Transforms: invertible maps of a tensor that come before its rounding and are undone after it."""

import dataclasses

from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Transform:
    """The identity; a method that rotates or centres overrides both directions. Frozen: it travels in pytrees."""

    def forward(self, x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
        """The tensor in the basis where it is rounded; `axis` is the contraction axis."""
        del axis
        return x

    def inverse(self, y: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
        """Back to the basis where it is used."""
        del axis
        return y


IDENTITY = Transform()
