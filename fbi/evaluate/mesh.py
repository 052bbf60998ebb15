"""How the rows of an evaluation lie on the mesh."""

import jax

from fbi.errors import InputError


def rows_multiple(mesh: jax.sharding.Mesh, axis: str | None) -> int:
    """What the number of rows of a batch must be a multiple of: the devices that the batch axis is split over."""
    if axis is None:
        return 1
    if axis not in mesh.shape:
        raise InputError(f"the mesh has axes {', '.join(mesh.axis_names)} but the batch lies on {axis!r}; name it so")
    return mesh.shape[axis]
