"""Feed-forward layers of which only the active experts are read: one interface, several formulations.

LTE, arXiv 2402.06126, section 4.4 and its kernel: the neurons of an expert are contiguous, a token reads the experts
that its router chose, and a small batch reads their union.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fbi.errors import InputError, unknown
from fbi.serve import compiled, native, pallas_tpu
from fbi.serve.packed import ACTIVATIONS, Layout, Packed, pack


class Formulation(NamedTuple):
    """A way to compute the layer, the layout of `Packed` that it reads, and how many rows it takes at once (0: any)."""

    apply: Callable[..., Array]
    layout: Layout = "columns"
    most: int = 0


METHODS: dict[str, Formulation] = {
    "gather": Formulation(compiled.gathered),
    "loop": Formulation(compiled.looped),
    "native": Formulation(native.called),
    "pallas": Formulation(pallas_tpu.tiled, "rows", 128),  # rows and their sums lie in VMEM
}


def chosen(method: str, platform: str | None = None) -> str:
    """The formulation that `auto` stands for on this platform (the default backend): `native` where it can be built.

    On a TPU `pallas`, on other accelerators `gather`, on a CPU without a compiler `loop`.
    """
    if method != "auto":
        if method not in METHODS:
            raise unknown("method", method, ["auto", *METHODS])
        return method
    platform = platform or jax.default_backend()
    if platform == "cpu":
        return "native" if native.available() else "loop"
    return {"tpu": "pallas"}.get(platform, "gather")


def packed_ffn(
    x: Float[Array, "t d"],
    packed: Packed,
    active: Bool[Array, "rows n"],
    activation: str = "silu",
    method: str = "auto",
    first: Int[Array, ""] | int = 0,
    cap: int | None = None,
) -> Float[Array, "t d"]:
    """The sum over the active experts of each row, in the type of x; products are summed in float32 at least.

    `packed` comes from `pack` in the layout of the method (`METHODS[method].layout`). `first` is the number of the
    layer's first expert, where several layers are stacked. `cap` is the number of experts that `gather` and `pallas`
    provide for; where rows use more, the same result comes at the cost of all. Small batches: a row skips what no row
    of its 16 uses. `InputError` for an unknown method or activation and for shapes that do not fit.
    """
    method = chosen(method)
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    formulation = METHODS[method]
    experts, e, d = packed.down.shape
    block = (experts, d, e) if formulation.layout == "columns" else (experts, e, d)
    for name, w in (("gate", packed.gate), ("up", packed.up)):
        if w is not None and w.shape != block:
            raise InputError(
                f"{name} is {list(w.shape)}, method={method!r} reads {list(block)}; pack with layout="
                f"{formulation.layout!r}"
            )
    if x.shape[1] != d or active.shape[0] != x.shape[0] or active.shape[1] > experts:
        raise InputError(
            f"x {list(x.shape)} and active {list(active.shape)} do not fit {experts} experts of {e} neurons and width "
            f"{d}; x is [t, {d}], active [t, {experts}]"
        )
    start = jnp.asarray(first, jnp.int32)

    def apply(x: Array, active: Array) -> Array:
        return formulation.apply(x, packed, active, activation, start, cap).astype(x.dtype)

    t, most = x.shape[0], formulation.most
    if not most or t <= most:
        return apply(x, active)
    # A prompt: blocks of rows in turn, the last filled up with rows that use no expert.
    blocks = [jnp.pad(a, ((0, -t % most), (0, 0))).reshape(-1, most, a.shape[1]) for a in (x, active)]
    return jax.lax.map(lambda block: apply(*block), tuple(blocks)).reshape(-1, d)[:t]


def sparse_ffn(
    x: Float[Array, "t d"],
    gate: Float[Array, "d ff"] | None,
    up: Float[Array, "d ff"],
    down: Float[Array, "ff d"],
    active: Bool[Array, "t n"],
    expert: int = 32,
    activation: str = "silu",
    method: str = "auto",
) -> Float[Array, "t d"]:
    """`packed_ffn` of weights as a model has them: they are packed in the call, which costs more than it saves.

    To serve, `pack` once and call `packed_ffn`. Expert i is the neurons i * expert to (i + 1) * expert - 1.
    """
    if active.shape[1] * expert != up.shape[1]:
        raise InputError(
            f"active {list(active.shape)} and expert={expert} do not make {up.shape[1]} neurons; active is "
            f"[{x.shape[0]}, {up.shape[1] // max(expert, 1)}]"
        )
    layout = METHODS[chosen(method)].layout
    return packed_ffn(x, pack(gate, up, down, expert, layout), active, activation, method)
