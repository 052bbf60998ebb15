"""The gated MLP."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fbi.model.axes import Axes
from fbi.model.linear import Linear
from fbi.model.norm import RMSNorm
from fbi.quant import Ctx

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,  # SwiGLU, arXiv 2002.05202
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # ReLU²-GLU, BitNet a4.8, 2411.04965
}


class GatedMLP(nnx.Module):
    """down(norm(activation(gate(x)) * up(x)))."""

    def __init__(self, linear: Callable[[str], Linear], sub_norm: RMSNorm | None, activation: str, axes: Axes):
        self.activation, self.axes, self.sub_norm = activation, axes, sub_norm
        self.gate, self.up, self.down = (linear(f"mlp.{name}") for name in ("gate", "up", "down"))

    def __call__(self, x: Float[Array, "b t d"], ctx: Ctx) -> Float[Array, "b t d"]:
        hidden = self.axes.hidden(self.axes.ff)
        h = ACTIVATIONS[self.activation](self.gate(x, hidden, ctx)) * self.up(x, hidden, ctx)
        if self.sub_norm is not None:
            h = self.sub_norm(h)
        return self.down(h, self.axes.stream, ctx)
