"""Meshes from text, and arrays onto them."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

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
    """The mesh of those sizes over the first devices (by default of this machine), with explicit axes."""
    count = sizes["data"] * sizes["model"]
    there = jax.devices() if devices is None else devices
    return jax.make_mesh(tuple(sizes[a] for a in AXES), AXES, devices=there[:count])


def put_batch(rows: np.ndarray, mesh: jax.sharding.Mesh) -> Int[Array, "b t"]:
    """This host's rows of the global batch, split over the data axis."""
    return jax.make_array_from_process_local_data(jax.NamedSharding(mesh, jax.P("data", None)), rows)
