"""The MLP of a block: gated or plain, dense or routed over experts."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fbi.model import taps
from fbi.model.axes import Axes
from fbi.model.config import ModelConfig
from fbi.model.linear import Linear, Read, for_site
from fbi.model.norm import RMSNorm
from fbi.model.router import ROUTERS, Router
from fbi.model.routing import ROUTING, Routing, by_expert, choice
from fbi.quant import Ctx

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,  # SwiGLU, arXiv 2002.05202
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # ReLU²-GLU, BitNet a4.8, 2411.04965
    "relu": jax.nn.relu,
}


class Neurons(NamedTuple):
    """The linear layers before the down projection, and what makes the hidden units of their outputs."""

    names: tuple[str, ...]
    combine: Callable[..., Array]


def gated(activation: str) -> Neurons:
    """activation(gate(x)) * up(x)."""
    return Neurons(("gate", "up"), lambda gate, up: ACTIVATIONS[activation](gate) * up)


def plain(activation: str) -> Neurons:
    """activation(up(x)): the MLP of GPT-2 and RoBERTa, here without biases."""
    return Neurons(("up",), ACTIVATIONS[activation])


class MLP(nnx.Module):
    """down(norm(neurons(x)))."""

    def __init__(self, linear: Callable[[str], Linear], neurons: Neurons, sub_norm: RMSNorm | None, axes: Axes):
        self.neurons, self.axes, self.sub_norm = neurons, axes, sub_norm
        for name in neurons.names:
            setattr(self, name, linear(f"mlp.{name}"))
        self.down = linear("mlp.down")

    def __call__(self, x: Float[Array, "b t d"], ctx: Ctx) -> Float[Array, "b t d"]:
        return self.project(self.hidden(x, ctx), ctx)

    def hidden(self, x: Float[Array, "b t d"], ctx: Ctx) -> Float[Array, "b t f"]:
        """The hidden units."""
        split, read = self.axes.hidden(self.axes.ff), Read(x)
        # what the layers gave is kept for the backward pass, and nothing of what is made of it
        combine = jax.checkpoint(self.neurons.combine, prevent_cse=False)
        return combine(*(getattr(self, name)(read, split, ctx) for name in self.neurons.names))

    def project(
        self, h: Float[Array, "b t f"], ctx: Ctx, after: Callable[[Array], Array] = taps.identity
    ) -> Float[Array, "b t d"]:
        """Norm and down projection; `after` is applied to what its activation quantizer makes of the hidden units."""
        if self.sub_norm is not None:
            h = self.sub_norm(h)
        return self.down(h, self.axes.stream, ctx, after)


class RoutedMLP(MLP):
    """sum_i a(G_i(x)) E_i(x): experts E_i are blocks of neighbouring neurons, G_i their scores, a what `routing` says.

    The router makes logits of x (the oracle of the hidden units), `choice` shifts them so that those of the experts to
    use are positive, and scores are their sigmoid: whatever chooses, an expert in use is one whose score is above 0.5.

    LTE, arXiv 2402.06126, section 4. The hidden units are multiplied before norm and down projection, whose quantizer
    then sees what serving computes. Where experts are skipped the quantized units are multiplied once more: a grid
    without a zero would make something of nothing. Under a norm before the down projection (norm=sub, inner) a factor
    that all scores share cancels.
    """

    def __init__(
        self,
        linear: Callable[[str], Linear],
        neurons: Neurons,
        sub_norm: RMSNorm | None,
        axes: Axes,
        router: Callable[[], Router],
        routing: Routing,
        choice: Callable[[Array], Array],
    ):
        super().__init__(linear, neurons, sub_norm, axes)
        self.routing, self.choice = routing, choice
        self.router = router()  # made last: the other layers start as in a dense MLP

    def __call__(self, x: Float[Array, "b t d"], ctx: Ctx) -> Float[Array, "b t d"]:
        h, out = self.hidden(x, ctx), self.axes.hidden(self.axes.ff)
        logits = taps.tap(taps.LOGITS, self.router(self.routing.sees(x), h, out, for_site(ctx, taps.ROUTER)))
        logits = self.choice(logits)
        before, after = self.routing.shares(logits, taps.tap(taps.ROUTER, jax.nn.sigmoid(logits)))
        return self.project(by_expert(h, before), ctx, lambda h: by_expert(h, after))


def mlp(
    config: ModelConfig,
    linear: Callable[[str], Linear],
    sub_norm: RMSNorm | None,
    router_norm: RMSNorm | None,
    axes: Axes,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> MLP:
    """The MLP that a config asks for; `router_norm` is the norm inside the router where norms lie inside layers."""
    neurons = (gated if config.gated else plain)(config.activation)
    if not config.expert:
        return MLP(linear, neurons, sub_norm, axes)

    def router() -> Router:
        return ROUTERS[config.router](config, norm=router_norm, axes=axes, dtype=dtype, rngs=rngs)

    return RoutedMLP(linear, neurons, sub_norm, axes, router, ROUTING[config.routing], choice(config.top_k))
