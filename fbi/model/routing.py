"""What the scores of routers do to the experts of an MLP, and which quantizers go with it.

Learn To be Efficient, arXiv 2402.06126, section 4; sparsely-gated mixtures of experts, 1701.06538, section 2.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fbi.errors import InputError
from fbi.model import taps
from fbi.model.config import ModelConfig
from fbi.policy import Methods

THRESHOLD = 0.5  # an expert is used where its score is above

Share = Float[Array, "b t n"] | None


class Routing(NamedTuple):
    """What is done with the logits and scores of the experts, [b, t, n] each.

    `shares(logits, scores)` -> what multiplies the hidden units, and what multiplies them again once quantized;
    `sees(x)` is what the router is given.
    """

    shares: Callable[[Array, Array], tuple[Share, Share]]
    sees: Callable[[Array], Array] = taps.identity


def selected(scores: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """1 where an expert is used, 0 where it is skipped; a constant to the gradient."""
    return jax.lax.stop_gradient((scores > THRESHOLD).astype(scores.dtype))


def _hard(logits: Float[Array, "b t n"], scores: Float[Array, "b t n"]) -> tuple[Share, Share]:
    del logits
    chosen = selected(scores)
    return chosen, chosen


def _softmax(logits: Float[Array, "b t n"], scores: Float[Array, "b t n"]) -> tuple[Share, Share]:
    """G = softmax(KeepTopK(H, k)), arXiv 1701.06538, eq. 3 and 5: over the experts in use; 0 where there is none."""
    chosen = selected(scores)
    top = jax.lax.stop_gradient(jnp.max(jnp.where(chosen > 0, logits, -jnp.inf), -1, keepdims=True))
    odds = jnp.where(chosen > 0, jnp.exp(jnp.where(chosen > 0, logits - top, 0.0)), 0.0)
    return odds / jnp.maximum(jnp.sum(odds, -1, keepdims=True), jnp.finfo(odds.dtype).tiny), chosen


ROUTING: dict[str, Routing] = {
    "soft": Routing(lambda logits, scores: (scores, None)),
    "hard": Routing(_hard),
    # Nothing looks at the router but a loss that trains it to predict: no gradient of that reaches the model.
    "dense": Routing(lambda logits, scores: (None, None), jax.lax.stop_gradient),
    "softmax": Routing(_softmax),
}


@functools.cache  # one function for one k: modules that hold it compare as equal
def choice(top_k: int) -> Callable[[Float[Array, "b t n"]], Float[Array, "b t n"]]:
    """What makes the logits of the experts to use positive: nothing for 0, else a shift of each token.

    The shift is half way between the k-th and the next largest logit of the token, a constant to the gradient: a top-k
    is a threshold of each token's own. Of experts that are equal there, none is used.
    """
    if not top_k:
        return taps.identity

    def shifted(logits: Float[Array, "b t n"]) -> Float[Array, "b t n"]:
        spec = jax.typeof(logits).sharding.spec
        whole = jax.sharding.reshard(jax.lax.stop_gradient(logits), jax.P(*spec[:-1], None))
        ranked = jnp.sort(whole, axis=-1, descending=True)
        return logits - 0.5 * (ranked[..., top_k - 1 : top_k] + ranked[..., top_k : top_k + 1])

    return shifted


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
