"""Meshes from text, and arrays onto them."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jaxtyping import Array, Float

from fbi.errors import InputError, unknown
from fbi.model.config import ModelConfig

AXES = ("data", "model")


def parse(text: str, devices: int) -> dict[str, int]:
    """`data=4,model=2` -> sizes; an axis that is not named has size 1, no text is every device on `data`."""
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    if not text.strip():
        return sizes | {"data": devices}
    for part in text.split(","):
        name, _, size = (p.strip() for p in part.partition("="))
        if name not in AXES:
            raise unknown("mesh axis", name, AXES)
        if not size.isdecimal() or int(size) < 1:
            raise InputError(f"mesh axis {name}={size!r} is not a whole number from 1 on; write data=4,model=2")
        sizes[name] = int(size)
    total = sizes["data"] * sizes["model"]
    if total > devices:
        raise InputError(
            f"mesh {text!r} needs {total} devices, {devices} are here; use a smaller mesh "
            "(JAX_NUM_CPU_DEVICES=8 emulates eight on a CPU)"
        )
    return sizes


def check(sizes: dict[str, int], model: ModelConfig, batch: int, accumulate: int, role: str = "model") -> None:
    """Refuses a mesh that does not divide what it splits, naming every offending number."""
    if batch % accumulate:
        raise InputError(f"accumulate={accumulate} does not divide data.batch={batch}")
    split = [
        ("data", "data.batch" if accumulate == 1 else "data.batch / accumulate", batch // accumulate),
        ("data", f"{role}.dim", model.dim),
        *(("model", f"{role}.{name}", getattr(model, name)) for name in ("heads", "kv_heads", "ff", "vocab")),
        ("model", f"{role}.ff / {role}.expert", model.experts),
    ]
    wrong = [f"{axis}={sizes[axis]} does not divide {name}={size}" for axis, name, size in split if size % sizes[axis]]
    if wrong:
        raise InputError(f"mesh: {'; '.join(wrong)}")


def make(sizes: dict[str, int], devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh of those sizes over the first devices (by default of this machine), with explicit axes.

    An axis of a torus may be split between both: `jax.make_mesh` allows that for v5e alone, and refuses 32 x 2 on a
    v6e of 8 x 8.
    """
    count = sizes["data"] * sizes["model"]
    there = jax.devices() if devices is None else devices
    idle = {d.process_index for d in there} - {d.process_index for d in there[:count]}
    if idle and devices is None:
        raise InputError(
            f"mesh: {count} of {len(there)} devices leave out those of process {', '.join(map(str, sorted(idle)))}; "
            "use them all, or fewer processes"
        )
    shape = tuple(sizes[axis] for axis in AXES)
    laid_out = mesh_utils.create_device_mesh(shape, there[:count], allow_split_physical_axes=True)
    return jax.sharding.Mesh(laid_out, AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(AXES))


def local_rows(batch: int, mesh: jax.sharding.Mesh) -> list[int]:
    """The rows of a global batch that the devices of this process hold, in order.

    They need not lie together: on a TPU pod the mesh follows the links between the chips, not the hosts.
    """
    parts = jax.NamedSharding(mesh, jax.P("data")).addressable_devices_indices_map((batch,)).values()
    return sorted({row for (part,) in filter(None, parts) for row in range(batch)[part]})


def put_batch(rows: Any, mesh: jax.sharding.Mesh, batch: int = 0) -> Any:
    """The global batch of so many rows (0: `rows` are all), split over the data axis, from its `local_rows` here.

    `rows` is an array or a tree of arrays, of as many rows each.
    """

    def put(part: np.ndarray) -> jax.Array:
        sharding = jax.NamedSharding(mesh, jax.P("data", *[None] * (part.ndim - 1)))
        return jax.make_array_from_process_local_data(sharding, part, (batch or len(part), *part.shape[1:]))

    return jax.tree.map(put, rows)


def put_scalar(value: float, mesh: jax.sharding.Mesh) -> Float[Array, ""]:
    """A float32 that every process has, on every device."""
    sharding = jax.NamedSharding(mesh, jax.P())
    return jax.make_array_from_callback((), sharding, lambda at: np.asarray(value, np.float32))
