"""What a quantizer learns, as parameters of the module it serves."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from fbi.model import taps
from fbi.policy import Methods
from fbi.quant import Ctx, QParams


def held(module: nnx.Module, name: str, leaves: QParams, *, replicated: bool = False) -> None:
    """Keeps `leaves` as the dictionary of parameters `name` of the module; nothing where there are none."""
    if leaves:
        if replicated:
            leaves = {key: jax.sharding.reshard(leaf, jax.P(*[None] * leaf.ndim)) for key, leaf in leaves.items()}
        setattr(module, name, nnx.data({key: nnx.Param(leaf) for key, leaf in leaves.items()}))


def leaves_of(module: nnx.Module, name: str) -> QParams:
    """What `held` keeps under that name."""
    return {key: leaf[...] for key, leaf in getattr(module, name).items()} if hasattr(module, name) else {}


class Operand(nnx.Module):
    """An activation that multiplies no weight: keys and values, attention probabilities, the input of a tied head."""

    def __init__(self, methods: Methods, ndim: int, width: int, dtype: jnp.dtype, site: str):
        self.site, self.methods = site, methods
        # A row of ones stands for the batch until `Model.calibrate` has seen one.
        held(self, "a", methods.build()[1].init(jnp.ones((1,) * (ndim - 1) + (width,), dtype)))

    def __call__(self, x: Array, ctx: Ctx) -> Array:
        taps.tap(self.site, x)
        return self.methods.build()[1].apply(x, leaves_of(self, "a"), ctx).astype(x.dtype)
