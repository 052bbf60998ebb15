"""How the rows of an evaluation lie on the mesh."""

import jax
import numpy as np
from jaxtyping import Array

from fbi.errors import InputError


def rows_multiple(mesh: jax.sharding.Mesh, axis: str | None) -> int:
    """What the number of rows of a batch must be a multiple of: the devices that the batch axis is split over."""
    if axis is None:
        return 1
    if axis not in mesh.shape:
        raise InputError(f"the mesh has axes {', '.join(mesh.axis_names)} but the batch lies on {axis!r}; name it so")
    return mesh.shape[axis]


def check_batch(batch: int, mesh: jax.sharding.Mesh, axis: str | None) -> None:
    """`InputError` for a batch that the batch axis of the mesh cannot be split over."""
    multiple = rows_multiple(mesh, axis)
    if batch < 1 or batch % multiple:
        raise InputError(f"batch is {batch}; it must be a positive multiple of {multiple}, the batch axis of the mesh")


def split_rows(mesh: jax.sharding.Mesh, axis: str | None, rows: np.ndarray) -> Array:
    """`rows`, which every host has whole, split over the batch axis of the mesh."""
    sharding = jax.NamedSharding(mesh, jax.P(axis, *[None] * (rows.ndim - 1)))
    with jax.transfer_guard_host_to_device("allow"):  # a wanted transfer, also where a training loop forbids others
        return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])
