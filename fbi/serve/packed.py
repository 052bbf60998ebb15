"""The weights of a sparse feed-forward layer, laid out so that an expert that is skipped is not read."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fbi.errors import InputError, unknown
from fbi.model.mlp import ACTIVATIONS as OF_MODELS

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {**OF_MODELS, "relu": jax.nn.relu}
Layout = Literal["columns", "rows"]


class Packed(NamedTuple):
    """Weights by expert; `gate` is None where the layer has none.

    `down` is [n, e, d]. `gate` and `up` are [n, d, e] in the layout `columns` (each block is what x is multiplied
    with), [n, e, d] in the layout `rows` (no axis is as short as an expert, which a TPU would pad to 128).
    Several layers of one shape may lie behind each other as one, [layers * n, ...] (see `stack`).
    """

    gate: Float[Array, "n a b"] | None
    up: Float[Array, "n a b"]
    down: Float[Array, "n e d"]


def pack(
    gate: Float[Array, "d ff"] | None,
    up: Float[Array, "d ff"],
    down: Float[Array, "ff d"],
    expert: int = 32,
    layout: str = "columns",
) -> Packed:
    """The weights of one layer by blocks of `expert` neighbouring neurons; `InputError` where they do not divide ff."""
    d, ff = up.shape
    if expert < 1 or ff % expert:
        divisors = [n for n in range(1, ff + 1) if ff % n == 0]
        raise InputError(f"expert={expert} does not divide the {ff} neurons of the layer; use one of {divisors}")
    if layout not in ("columns", "rows"):
        raise unknown("layout", layout, ("columns", "rows"))

    def blocks(w: Array | None) -> Array | None:
        if w is None:
            return None
        last = 1 if layout == "columns" else 2
        return jnp.moveaxis(w.reshape(d, ff // expert, expert), 0, last)

    packed = blocks(up)
    assert packed is not None
    return Packed(blocks(gate), packed, down.reshape(ff // expert, expert, d))


def stack(layers: list[Packed]) -> Packed:
    """Layers of one shape behind each other: layer i has the experts from i * n on.

    So a loop over layers hands every layer the same arrays and a number; a slice of stacked weights would be a copy.
    """
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *layers)


def masked_ffn(
    x: Float[Array, "t d"],
    gate: Float[Array, "d ff"] | None,
    up: Float[Array, "d ff"],
    down: Float[Array, "ff d"],
    active: Bool[Array, "t n"],
    activation: str = "silu",
) -> Float[Array, "t d"]:
    """The definition, nothing skipped: sum over experts of 1[active] E(x), LTE, arXiv 2402.06126, eq. 7.

    E(x) is activation(x gate) * (x up), or activation(x up) without a gate, times down.
    """
    act = ACTIVATIONS[activation]
    h = act(x @ up) if gate is None else act(x @ gate) * (x @ up)
    chosen = jnp.repeat(active, up.shape[1] // active.shape[1], axis=1)
    return jnp.where(chosen, h, 0) @ down
