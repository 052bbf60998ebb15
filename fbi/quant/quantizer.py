"""A quantizer: pure functions over one tensor, an exact integer form of the same, and an account of its bits."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fbi.quant.around import NOTHING, Around
from fbi.quant.field import Field
from fbi.quant.grid import Grid, Stochastic
from fbi.quant.pack import MOST_LEVELS
from fbi.quant.scale import QParams, Scale
from fbi.quant.ste import Ctx, straight_through
from fbi.quant.surrogate import Surrogate
from fbi.quant.transform import IDENTITY, Transform

PAPER_BITS = 16  # the width in which papers count scales, shifts and unquantized weights


class BitReport(NamedTuple):
    """What one tensor costs: `paper` bits as papers count them, `stored` bytes as a file holds them."""

    weights: int
    code: float  # bits of code per weight
    paper: float  # bits: codes, and 16 for each scale and shift
    stored: int  # bytes: packed codes, masks, and scales and shifts at the width they are computed in

    @property
    def paper_per_weight(self) -> float:
        """Paper bits per weight."""
        return self.paper / self.weights

    @property
    def stored_per_weight(self) -> float:
        """Stored bits per weight."""
        return 8 * self.stored / self.weights


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "field"], meta_fields=["grid", "transform", "axis"]
)
@dataclasses.dataclass(frozen=True)
class Encoded:
    """A tensor as integer codes and frozen scales; a pytree. Without a grid the codes are the values themselves."""

    codes: Array
    field: Field | None
    grid: Grid | None
    transform: Transform
    axis: int


class Quantizer(NamedTuple):
    """How one tensor is made low-bit, in the manner of an optax transform.

    `init(x, key=None) -> qparams`: learned leaves, {} when there are none; for an activation, from one batch of the
    full-precision forward.
    `apply(x, qparams={}, ctx=Ctx()) -> x_hat`: same shape, on the grid, differentiable, at least float32.
    `encode(x, qparams={}, ctx=Ctx()) -> Encoded`; `decode(Encoded)` equals `apply` bit for bit when both are compiled.
    `bits(shape, dtype=float32) -> BitReport`.
    """

    init: Callable[..., QParams]
    apply: Callable[..., Array]
    encode: Callable[..., Encoded]
    bits: Callable[..., BitReport]
    around: Around = NOTHING
    """What the method adds around the product of its layer."""
    whole: bool = False
    """Whether the contraction axis must lie whole on a device: blocks are rotated along it, or it is sorted."""
    turned: "tuple[Transform, Quantizer] | None" = None
    """A basis in which the product may be formed instead, and the quantizer whose output stays in it."""
    draws: bool = False
    """Whether it rounds at random where the context has a key."""
    coded: bool = False
    """Whether `encode` says in every context what `apply` gives, in codes that `Encoded.grid.pack` takes."""
    weigh: Callable[..., Array] | None = None
    """(scores, allowed, qparams, ctx) -> attention weights, of a method that takes the place of the softmax."""
    reach: Callable[[int], int] = IDENTITY.reach
    """How many neighbours along a contraction axis of that size end up in each other, up to common scales."""


def compute_type(x: Array) -> jnp.dtype:
    """The type in which a tensor is quantized: its own, and at least float32."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _width(dtype: DTypeLike) -> int:
    return jnp.dtype(jnp.promote_types(dtype, jnp.float32)).itemsize


def decode(encoded: Encoded) -> Array:
    """The tensor that the codes and scales stand for."""
    if encoded.grid is None or encoded.field is None:
        return encoded.codes
    kind = jax.tree.leaves(encoded.field)[0].dtype
    levels = encoded.grid.level(encoded.codes.astype(kind))
    return encoded.transform.inverse(encoded.field.value(levels), encoded.axis)


@dataclasses.dataclass(frozen=True)
class _OneWay(Transform):
    """A transform that is not undone: what comes out stays in its basis."""

    base: Transform

    def forward(self, x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
        return self.base.forward(x, axis)

    @property
    def mixes(self) -> bool:
        return self.base.mixes

    def reach(self, size: int) -> int:
        return self.base.reach(size)


def compose(
    *,
    scale: Scale,
    grid: Grid,
    surrogate: Surrogate,
    axis: int,
    transform: Transform = IDENTITY,
    back: bool = True,
    around: Around = NOTHING,
    whole: bool = False,
) -> Quantizer:
    """The quantizer that is these choices; `axis` is the contraction axis (0 of a weight, -1 of an activation).

    `back=False`: the output stays in the basis of the transform.
    """
    transform = transform if back else _OneWay(transform)

    def rotated(x: Array) -> Array:
        return transform.forward(x.astype(compute_type(x)), axis)

    def init(x: Array, key: Array | None = None) -> QParams:
        del key
        return scale.init(rotated(x))

    def apply(x: Array, qparams: QParams | None = None, ctx: Ctx = Ctx()) -> Array:
        units, field = scale.solve(rotated(x), qparams or {}, ctx)
        levels = jnp.asarray(straight_through(grid, surrogate, units, ctx))
        return transform.inverse(field.value(levels), axis)

    def encode(x: Array, qparams: QParams | None = None, ctx: Ctx = Ctx()) -> Encoded:
        units, field = scale.solve(rotated(x), qparams or {}, ctx)
        codes = grid.draw(units, ctx.key).astype(grid.code_type)
        return Encoded(codes, jax.lax.stop_gradient(field), grid, transform, axis)

    def bits(shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> BitReport:
        weights = math.prod(shape)
        numbers = sum(math.prod(s) for s in [*scale.shapes(shape), *around.shapes(shape)])
        return BitReport(
            weights=weights,
            code=grid.bits,
            paper=weights * grid.bits + PAPER_BITS * numbers,
            stored=grid.packed_size(shape) + _width(dtype) * numbers,
        )

    turned = None
    if back and transform.mixes:
        arguments = {"scale": scale, "grid": grid, "surrogate": surrogate, "axis": axis, "around": around}
        turned = (transform, compose(**arguments, transform=transform, back=False, whole=whole))
    draws = isinstance(grid, Stochastic)
    return Quantizer(
        init,
        apply,
        encode,
        bits,
        around,
        whole=whole or transform.mixes,
        turned=turned,
        draws=draws,
        coded=grid.size <= MOST_LEVELS,
        reach=transform.reach,
    )


def paired(weight: Quantizer, activation: Quantizer) -> tuple[Quantizer, Quantizer]:
    """The quantizers of a product's two operands: both rotated alike stay so, for the rotations cancel in the product.

    QuEST's "half Hadamard", arXiv 2502.05003, its published code; a lone rotated operand rotates back.
    """
    if weight.turned and activation.turned and weight.turned[0] == activation.turned[0]:
        return weight.turned[1], activation.turned[1]
    return weight, activation


def full_precision() -> Quantizer:
    """The quantizer that changes nothing: the baseline of every sweep."""

    def bits(shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> BitReport:
        weights = math.prod(shape)
        return BitReport(weights, code=PAPER_BITS, paper=weights * PAPER_BITS, stored=weights * _width(dtype))

    return Quantizer(
        init=lambda x, key=None: {},
        apply=lambda x, qparams=None, ctx=Ctx(): x.astype(compute_type(x)),
        encode=lambda x, qparams=None, ctx=Ctx(): Encoded(x.astype(compute_type(x)), None, None, IDENTITY, 0),
        bits=bits,
    )


def warmed(quantizer: Quantizer, share: float) -> Quantizer:
    """The quantizer phased in: (1 - l) x + l q(x), l rising from 0 to 1 over that share of training; 0: at once.

    The lambda warm-up of 1.58-bit fine-tuning, written there as x + l sg(q(x) - x): the same value and gradient where
    the surrogate is the identity.
    """
    if not share:
        return quantizer

    def apply(x: Array, qparams: QParams | None = None, ctx: Ctx = Ctx()) -> Array:
        y = quantizer.apply(x, qparams, ctx)
        phase = jnp.minimum(jnp.asarray(ctx.t, y.dtype) / share, 1)
        return (1 - phase) * x.astype(y.dtype) + phase * y

    return quantizer._replace(apply=apply, coded=False)


def packed(encoded: Encoded) -> dict[str, Array]:
    """The arrays a file holds for a tensor: codes and masks as dense bits (uint8), scales and shifts as they are."""
    if encoded.grid is None or encoded.field is None:
        return {"values": encoded.codes}
    numbers = {name: value for name, value in encoded.field._asdict().items() if value is not None}
    return encoded.grid.pack(encoded.codes) | numbers


def unpacked(arrays: dict[str, Array], like: Encoded) -> Encoded:
    """The inverse of `packed`; `like` gives shape, grid, field and transform (its arrays are not read)."""
    if like.grid is None or like.field is None:
        return dataclasses.replace(like, codes=arrays["values"])
    codes = like.grid.unpack(arrays, like.codes.shape).astype(like.codes.dtype)
    field = type(like.field)(**{name: arrays.get(name) for name in like.field._asdict()})
    return dataclasses.replace(like, codes=codes, field=field)
