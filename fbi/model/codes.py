"""Products of quantized operands formed from their levels: in int8 or float8, where the device multiplies these faster.

The narrow type holds every level exactly and the wide one every sum; the scales, which must be shared along the
contraction, come after. It is the product of the values, rounded once instead of at every term; the gradients are those
of the values.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fbi.model.axes import gathered
from fbi.model.dense import Product, backward
from fbi.quant import Ctx, Encoded, QParams, Quantizer
from fbi.quant.field import Affine, Unit
from fbi.quant.transform import Transform


class Kind(NamedTuple):
    """The type of the factors, that of their sums, and the largest sum that it holds exactly."""

    narrow: Any
    wide: Any
    largest: float


KINDS = {
    "integers": Kind(jnp.int8, jnp.int32, 2.0**31 - 1),
    "float8": Kind(jnp.float8_e4m3fn, jnp.float32, 2.0**24),
}


class Seen(NamedTuple):
    """A quantizer, and the tensor, the learned leaves and the context that it is applied to."""

    quantizer: Quantizer
    x: Array
    qparams: QParams
    ctx: Ctx


class Factor(NamedTuple):
    """An operand as levels of the narrow type, the scale that they are multiplied by, and their largest magnitude."""

    levels: Array
    scale: Array
    most: float


# (the product of the values, activation, weight, layout of the weight at rest) -> the product as it is to be formed
Form = Callable[[Product, Seen, Seen, jax.P], Product]


def of_values(product: Product, x: Seen, w: Seen, spec: jax.P) -> Product:
    """The product as it is."""
    del x, w, spec
    return product


def of_levels(kind: Kind, product: Product, x: Seen, w: Seen, spec: jax.P) -> Product:
    """The product from levels; that of the values where one of the operands has none that fit, or sums would not."""
    left, right = factor(x, kind, -1), factor(w, kind, 0)
    if left is None or right is None or w.x.shape[0] * left.most * right.most > kind.largest:
        return product
    used = gathered(spec)
    levels = jax.sharding.reshard(right.levels, used)
    scale = jax.sharding.reshard(right.scale, jax.P(None, None if right.scale.shape[1] == 1 else used[1]))
    across = jax.sharding.reshard(left.levels, jax.typeof(product.x).sharding.spec)
    factors = (across, levels, left.scale, scale)
    return product._replace(multiply=jax.tree_util.Partial(functools.partial(from_levels, kind), factors))


FORMS: dict[str, Form] = {
    "values": of_values,
    **{name: functools.partial(of_levels, kind) for name, kind in KINDS.items()},
}


def factor(seen: Seen, kind: Kind, axis: int) -> Factor | None:
    """The operand as levels times a scale that is one along the contraction axis; None where it is not of that kind."""
    if not seen.quantizer.coded:
        return None
    x, qparams = jax.lax.stop_gradient((seen.x, seen.qparams))
    encoded = seen.quantizer.encode(x, qparams, seen.ctx)
    scale = _scale(encoded, axis)
    if encoded.grid is None or scale is None:
        return None
    table = np.asarray(encoded.grid.levels, np.float32)
    fitting = [n for n in (1, 2) if _exact(n * table, kind)]  # halves are taken twice
    if not fitting:
        return None
    finer = fitting[0]
    levels = finer * encoded.grid.level(encoded.codes.astype(scale.dtype))
    return Factor(levels.astype(kind.narrow), scale / finer, finer * float(np.abs(table).max()))


def _exact(levels: np.ndarray, kind: Kind) -> bool:
    """Whether the narrow type holds whole numbers that are these."""
    within = jnp.iinfo(kind.narrow) if jnp.issubdtype(kind.narrow, jnp.integer) else jnp.finfo(kind.narrow)
    if levels.min() < float(within.min) or levels.max() > float(within.max) or (levels % 1).any():
        return False
    return bool((levels.astype(kind.narrow).astype(levels.dtype) == levels).all())


def _scale(encoded: Encoded, axis: int) -> Array | None:
    """The one number beside the levels of each sum; None where there is another, or one that changes along it."""
    if type(encoded.transform).inverse is not Transform.inverse:
        return None
    if isinstance(encoded.field, Unit):
        return jnp.ones((1,) * encoded.codes.ndim, encoded.field.empty.dtype)
    if not isinstance(encoded.field, Affine) or encoded.field.shift is not None:
        return None
    scale = encoded.field.scale
    shared = scale.shape[axis] == 1 and all(a in (1, b) for a, b in zip(scale.shape, encoded.codes.shape, strict=True))
    return scale if shared else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5, 6))
def from_levels(
    kind: Kind,
    factors: tuple[Array, Array, Array, Array],
    x: Float[Array, "b t i"],
    w: Float[Array, "i o"],
    full: Float[Array, "i o"],
    out: jax.P,
    rest: jax.P,
) -> Float[Array, "b t o"]:
    """x @ full from (levels of x, levels of full, scale of x, scale of full); the gradients of `dense`."""
    del w, full, rest
    left, right, across, along = factors
    contracted = (((2,), (0,)), ((), ()))
    sums = jax.lax.dot_general(left, right, contracted, preferred_element_type=kind.wide, out_sharding=out)
    batch, time, _ = out
    per_token = jax.P(*(axis if n != 1 else None for axis, n in zip((batch, time), across.shape, strict=False)), None)
    across = jax.sharding.reshard(across, per_token)
    along = jax.sharding.reshard(along, jax.P(None, out[2] if along.shape[1] != 1 else None))
    return (sums.astype(across.dtype) * across * along[None]).astype(x.dtype)


def _forward(
    kind: Kind, factors: Any, x: Array, w: Array, full: Array, out: jax.P, rest: jax.P
) -> tuple[Array, tuple[Array, Array]]:
    return from_levels(kind, factors, x, w, full, out, rest), (x, full)


def _backward(kind: Kind, out: jax.P, rest: jax.P, kept: tuple[Array, Array], g: Array) -> tuple[Any, ...]:
    del kind
    return None, *backward(out, rest, kept, g)


from_levels.defvjp(_forward, _backward)
