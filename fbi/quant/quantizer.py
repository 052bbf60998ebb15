"""A quantizer: two pure functions over one tensor, an exact integer form of the same, and an account of its bits."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fbi.quant import pack
from fbi.quant.grid import Grid
from fbi.quant.scale import Affine, QParams, Scale
from fbi.quant.ste import Ctx, straight_through
from fbi.quant.surrogate import Surrogate
from fbi.quant.transform import IDENTITY, Transform

PAPER_BITS = 16  # the width in which papers count scales, shifts and unquantized weights


class BitReport(NamedTuple):
    """What one tensor costs: `paper` bits as papers count them, `stored` bytes as a file holds them."""

    weights: int
    code: float  # bits of code per weight
    paper: float  # bits: codes, and 16 for each scale and shift
    stored: int  # bytes: packed codes, scales and shifts at the width they are computed in

    @property
    def paper_per_weight(self) -> float:
        """Paper bits per weight."""
        return self.paper / self.weights

    @property
    def stored_per_weight(self) -> float:
        """Stored bits per weight."""
        return 8 * self.stored / self.weights


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "affine"], meta_fields=["grid", "transform", "axis"]
)
@dataclasses.dataclass(frozen=True)
class Encoded:
    """A tensor as integer codes and frozen scales; a pytree. Without a grid the codes are the values themselves."""

    codes: Array
    affine: Affine | None
    grid: Grid | None
    transform: Transform
    axis: int


class Quantizer(NamedTuple):
    """How one tensor is made low-bit, in the manner of an optax transform.

    `init(x, key=None) -> qparams`: learned leaves, {} when there are none.
    `apply(x, qparams={}, ctx=Ctx()) -> x_hat`: same shape, on the grid, differentiable, at least float32.
    `encode(x, qparams={}) -> Encoded`; `decode(Encoded)` equals `apply` bit for bit when both are compiled.
    `bits(shape, dtype=float32) -> BitReport`.
    """

    init: Callable[..., QParams]
    apply: Callable[..., Array]
    encode: Callable[..., Encoded]
    bits: Callable[..., BitReport]


def compute_type(x: Array) -> jnp.dtype:
    """The type in which a tensor is quantized: its own, and at least float32."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _width(dtype: DTypeLike) -> int:
    return jnp.dtype(jnp.promote_types(dtype, jnp.float32)).itemsize


def dequantize(levels: Float[Array, "*s"], affine: Affine) -> Float[Array, "*s"]:
    """Level times scale, plus the shift where there is one: the one way back from the grid."""
    value = levels * affine.scale
    return value if affine.shift is None else value + affine.shift


def decode(encoded: Encoded) -> Array:
    """The tensor that the codes and scales stand for."""
    if encoded.grid is None or encoded.affine is None:
        return encoded.codes
    levels = encoded.grid.level(encoded.codes.astype(encoded.affine.scale.dtype))
    return encoded.transform.inverse(dequantize(levels, encoded.affine), encoded.axis)


def compose(*, scale: Scale, grid: Grid, surrogate: Surrogate, axis: int, transform: Transform = IDENTITY) -> Quantizer:
    """The quantizer that is these choices; `axis` is the contraction axis (0 of a weight, -1 of an activation)."""

    def rotated(x: Array) -> Array:
        return transform.forward(x.astype(compute_type(x)), axis)

    def init(x: Array, key: Array | None = None) -> QParams:
        del key
        return scale.init(rotated(x))

    def apply(x: Array, qparams: QParams | None = None, ctx: Ctx = Ctx()) -> Array:
        units, affine = scale.solve(rotated(x), qparams or {})
        levels = jnp.asarray(straight_through(grid, surrogate, units, ctx))
        return transform.inverse(dequantize(levels, affine), axis)

    def encode(x: Array, qparams: QParams | None = None) -> Encoded:
        units, affine = scale.solve(rotated(x), qparams or {})
        return Encoded(grid.codes(units).astype(jnp.int8), jax.lax.stop_gradient(affine), grid, transform, axis)

    def bits(shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> BitReport:
        weights = math.prod(shape)
        numbers = sum(math.prod(s) for s in scale.shapes(shape))
        return BitReport(
            weights=weights,
            code=grid.bits,
            paper=weights * grid.bits + PAPER_BITS * numbers,
            stored=pack.packed_size(weights, grid.size) + _width(dtype) * numbers,
        )

    return Quantizer(init, apply, encode, bits)


def full_precision() -> Quantizer:
    """The quantizer that changes nothing: the baseline of every sweep."""

    def bits(shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> BitReport:
        weights = math.prod(shape)
        return BitReport(weights, code=PAPER_BITS, paper=weights * PAPER_BITS, stored=weights * _width(dtype))

    return Quantizer(
        init=lambda x, key=None: {},
        apply=lambda x, qparams=None, ctx=Ctx(): x.astype(compute_type(x)),
        encode=lambda x, qparams=None: Encoded(x.astype(compute_type(x)), None, None, IDENTITY, 0),
        bits=bits,
    )


def packed(encoded: Encoded) -> dict[str, Array]:
    """The arrays a file holds for a tensor: codes as dense bits (uint8), scale and shift as they are."""
    if encoded.grid is None or encoded.affine is None:
        return {"values": encoded.codes}
    codes = pack.pack(encoded.codes - encoded.grid.low, encoded.grid.size)
    affine = {"scale": encoded.affine.scale, "shift": encoded.affine.shift}
    return {"codes": codes} | {name: value for name, value in affine.items() if value is not None}


def unpacked(arrays: dict[str, Array], like: Encoded) -> Encoded:
    """The inverse of `packed`; `like` gives shape, grid and transform (its arrays are not read)."""
    if like.grid is None:
        return dataclasses.replace(like, codes=arrays["values"])
    codes = pack.unpack(arrays["codes"], like.codes.shape, like.grid.size).astype(jnp.int16) + like.grid.low
    affine = Affine(arrays["scale"], arrays.get("shift"))
    return dataclasses.replace(like, codes=codes.astype(jnp.int8), affine=affine)
