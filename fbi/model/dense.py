"""The matrix product of a layer, with its backward products written so that the larger operand is never transposed."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fbi.quant import QParams


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def dense(
    x: Float[Array, "b t i"], w: Float[Array, "i o"], full: Float[Array, "i o"], out: jax.P, rest: jax.P
) -> Float[Array, "b t o"]:
    """x @ full, laid out as `out`; dL/dw is laid out as `rest`, the layout of w at rest: it is reduced and scattered.

    Autodiff forms dL/dw as (g^T x)^T, for which XLA's CPU backend copies g transposed, element by element; x^T g costs
    a third of the time there and the same elsewhere.
    """
    del w, rest
    return jnp.dot(x, full, out_sharding=out)


def _forward(x: Array, w: Array, full: Array, out: jax.P, rest: jax.P) -> tuple[Array, tuple[Array, Array]]:
    del w, rest
    return jnp.dot(x, full, out_sharding=out), (x, full)


def backward(out: jax.P, rest: jax.P, kept: tuple[Array, Array], g: Array) -> tuple[Array, Array, None]:
    """dL/dx, dL/dw and nothing for the gathered weight, of the kept (x, full) and dL/dy."""
    del out
    x, full = kept
    # where the product scattered its rows, its gradient is gathered once for both products
    g = jax.sharding.reshard(g, jax.P(*jax.typeof(x).sharding.spec[:2], jax.typeof(g).sharding.spec[2]))
    dx = jax.lax.dot_general(g, full, (((2,), (1,)), ((), ())), out_sharding=jax.typeof(x).sharding)
    dw = jax.lax.dot_general(x, g, (((0, 1), (0, 1)), ((), ())), out_sharding=rest)
    return dx, dw, None


dense.defvjp(_forward, backward)


class Product(NamedTuple):
    """The operands of a layer's product, as they are multiplied, and what comes after it needs.

    `w` is the weight at rest, which takes the gradient, split by FSDP; `full` is the same weight as FSDP gathered it,
    which takes none. `multiply` forms it, (x, w, full, layout of the product, layout of w) -> y.
    """

    x: Float[Array, "b t i"]
    w: Float[Array, "i o"]
    full: Float[Array, "i o"]
    after: QParams | None = None
    memo: Any = None
    multiply: Callable[..., Array] = jax.tree_util.Partial(dense)


def multiplied(product: Product, out: jax.P) -> Float[Array, "b t o"]:
    """The product, laid out as `out`."""
    x, w, full = product[:3]
    return jnp.asarray(product.multiply(x, w, full, out, jax.typeof(w).sharding.spec))
