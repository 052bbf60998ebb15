"""RMSNorm."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) * scale, computed in float32 at least; Zhang & Sennrich, arXiv 1910.07467, eq. 4."""

    def __init__(self, dim: int, eps: float, dtype: jnp.dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,), dtype, out_sharding=jax.P(None)))

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.eps)
        return (wide * inverse * self.scale[...][None, None, :]).astype(x.dtype)
