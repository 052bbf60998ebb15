"""RMSNorm."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*b d"], scale: Float[Array, " d"], eps: float) -> Float[Array, "*b d"]:
    """x / sqrt(mean(x²) + eps) * scale over the last axis, computed in float32 at least; arXiv 1910.07467, eq. 4.

    Its gradient keeps x in its own type and one number a row; autodiff keeps three wide copies of x.
    """
    return _forward(x, scale, eps)[0]


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _row(scale: Array, x: Array) -> Array:
    return scale[(None,) * (x.ndim - 1)]


def _forward(x: Array, scale: Array, eps: float) -> tuple[Array, tuple[Array, Array, Array]]:
    wide = _wide(x)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + eps)
    return (wide * inverse * _row(scale, x)).astype(x.dtype), (x, scale, inverse)


def _backward(eps: float, kept: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array]:
    """With u = x / rms and h = g scale: dL/dx = (h - u mean(h u)) / rms, dL/dscale = sum of g u over rows."""
    del eps
    x, scale, inverse = kept
    unit, g = _wide(x) * inverse, _wide(g)
    h, of_scale = jax.vjp(lambda g, scale: g * _row(scale, x), g, scale)
    dx = inverse * (h - unit * jnp.mean(h * unit, -1, keepdims=True))
    return dx.astype(x.dtype), of_scale(unit)[1]


rms_norm.defvjp(_forward, _backward)


class RMSNorm(nnx.Module):
    """`rms_norm` with a learned scale; Zhang & Sennrich, arXiv 1910.07467."""

    def __init__(self, dim: int, eps: float, dtype: jnp.dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,), dtype, out_sharding=jax.P(None)))

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return rms_norm(x, self.scale[...], self.eps)
