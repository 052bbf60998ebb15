"""The mesh that an evaluation runs on."""

import jax

from fbi.errors import InputError
from fbi.model.axes import mesh_1x1


def mesh_in_use() -> jax.sharding.Mesh:
    """The mesh that `jax.set_mesh` set; one device where none is."""
    mesh = jax.sharding.get_mesh()
    return mesh_1x1() if mesh.empty else mesh


def rows_multiple(mesh: jax.sharding.Mesh, axis: str | None) -> int:
    """What the number of rows of a batch must be a multiple of: the devices that the batch axis is split over."""
    if axis is None:
        return 1
    if axis not in mesh.shape:
        raise InputError(f"the mesh has axes {', '.join(mesh.axis_names)} but the batch lies on {axis!r}; name it so")
    return mesh.shape[axis]
