"""Routers of LTE: a score for each expert of an MLP, what the score does, and which quantizers go with it.

Learn To be Efficient, arXiv 2402.06126, section 4.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fbi.errors import InputError
from fbi.model.axes import Axes
from fbi.model.config import ModelConfig
from fbi.model.norm import RMSNorm
from fbi.policy import Methods

THRESHOLD = 0.5  # an expert is used where its score is above
START = 0.8  # the scores of a fresh router, about
SPREAD = 1.0  # the standard deviation of the logits of a fresh router, for inputs of RMS 1

Share = Float[Array, "b t n"] | None
Routing = Callable[[Float[Array, "b t n"]], tuple[Share, Share]]


class Router(nnx.Module):
    """G(x) = sigmoid(x W + b): [b, t, dim] -> [b, t, experts], in float32 at least whatever the compute type.

    No site of a policy: it decides what is computed, and costs about 1 % of it (LTE, section 5). The paper names
    neither a bias nor a start. Here b = log(START / (1 - START)) and W ~ N(0, SPREAD² / dim): nearly all experts are
    on, as in the dense model that training starts from, few scores are near the threshold, where separability is
    singular, and they are unlike enough to pass it one after the other.
    """

    def __init__(self, dim: int, experts: int, *, norm: RMSNorm | None, axes: Axes, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = norm
        spread = SPREAD / math.sqrt(dim)
        weight = jax.random.normal(rngs.params(), (dim, experts), dtype, out_sharding=jax.P(None, axes.ff))
        self.weight = nnx.Param(spread * weight)
        self.bias = nnx.Param(jnp.full((experts,), math.log(START / (1 - START)), dtype, out_sharding=jax.P(axes.ff)))

    def __call__(self, x: Float[Array, "b t d"], out: jax.P) -> Float[Array, "b t n"]:
        if self.norm is not None:
            x = self.norm(x)
        weight = self.weight[...]
        wide = x.astype(jnp.promote_types(x.dtype, weight.dtype))
        logits = jnp.dot(wide, weight, precision=jax.lax.Precision.HIGHEST, out_sharding=out)
        return jax.nn.sigmoid(logits + self.bias[...][None, None, :])


def selected(scores: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """1 where an expert is used, 0 where it is skipped; a constant to the gradient."""
    return jax.lax.stop_gradient((scores > THRESHOLD).astype(scores.dtype))


def _hard(scores: Float[Array, "b t n"]) -> tuple[Share, Share]:
    chosen = selected(scores)
    return chosen, chosen


ROUTING: dict[str, Routing] = {
    # scores -> what multiplies the hidden units, and what multiplies them again once they are quantized
    "soft": lambda scores: (scores, None),
    "hard": _hard,
    "dense": lambda scores: (None, None),
}


def by_expert(h: Float[Array, "b t f"], share: Share) -> Float[Array, "b t f"]:
    """The hidden units times the share of their expert, a block of f / n neighbours; None: as they are."""
    if share is None:
        return h
    spread = jnp.broadcast_to(share.astype(h.dtype)[..., None], (*share.shape, h.shape[-1] // share.shape[-1]))
    return h * jax.lax.reshape(spread, h.shape, out_sharding=jax.typeof(h).sharding)


def check_leaks(config: ModelConfig, bound: dict[str, Methods]) -> None:
    """Refuses, for a routed model, a quantizer of the down projection's input that mixes neurons of unlike experts."""
    for layer in range(config.layers if config.expert else 0):
        site = f"layers.{layer}.mlp.down"
        method = bound.get(site, Methods()).activation
        if config.expert % (block := method.build("activation").reach(config.ff)):
            raise InputError(
                f"{site}: a={method} mixes blocks of {block} neurons, model.expert={config.expert}: skipped experts "
                f"would leak into the others; use block={math.gcd(block, config.expert)}, or experts of a multiple of "
                f"{block} neurons"
            )
