"""Requested sparsity: two numbers follow the share of experts that the routers leave out until it is the one asked for.

LTE (arXiv 2402.06126) searches the weight of its efficiency term, eta, by hand for every model and task. Here eta moves
in proportion to itself and to what is missing. Alone it cannot be steered back: a score that has fallen below the
threshold stays there however small eta becomes, for separability pushes it on down, and the down projection makes up
for its size. (Measured on a small model, requested 0.5: the scores pass the threshold together, 0.94 to 0.99 remain.)
So a second number moves with it, which acts both ways and at once: an amount taken from the bias of every router. It
brings the share to the request within tens of steps and holds it there while the losses decide which experts, of which
layer, for which token.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fbi.model import Params
from fbi.optim.groups import is_router, names_of

KEY = "control"  # of the state of training
MEMORY = 0.9  # of the running mean of the sparsity of batches
GAIN, RATE = 0.05, 0.02  # log eta: its move in a step for each unit of sparsity that is missing, and the most
BIAS_GAIN, BIAS_RATE = 2.0, 0.5  # biases, in units of the spread of the logits: the same
LEAST_SPREAD = 1e-3  # of the scores
RANGE = 100.0  # eta stays within this factor of its start

Kept = dict[str, Any]


class Control(NamedTuple):
    """What a step carries on beside parameters and optimizer, and what it does with it.

    `init() -> part of the state`; `weights(state) -> weights of the loss by kind`; `update(state, sums, count) ->
    (parts of the state to replace after the optimizer's update, sums to log)`.
    """

    init: Callable[[], Kept] = dict
    weights: Callable[[Mapping[str, Any]], dict[str, Array]] = lambda state: {}
    update: Callable[..., tuple[Kept, dict[str, Array]]] = lambda state, sums, count: ({}, {})


NO_CONTROL = Control()


class Eta(NamedTuple):
    """What the controller remembers."""

    log_eta: Float[Array, ""]
    mean: Float[Array, ""]
    """Of the sparsity of batches, exponentially weighted, from the first on."""
    seen: Int[Array, ""]
    """Batches."""


def moved(eta: Eta, sparsity: Float[Array, ""], target: float, start: float) -> Eta:
    """The controller after a batch of that sparsity: log eta += clip(GAIN (target - mean), -RATE, RATE)."""
    mean = jnp.where(eta.seen == 0, sparsity, MEMORY * eta.mean + (1 - MEMORY) * sparsity)
    change = jnp.clip(GAIN * (target - mean), -RATE, RATE)
    center, reach = math.log(start), math.log(RANGE)
    return Eta(jnp.clip(eta.log_eta + change, center - reach, center + reach), mean, eta.seen + 1)


def shifted(params: Params, amount: Float[Array, ""] | float) -> Params:
    """The parameters with that amount, of the logits, taken from every router's bias."""

    def shift(path: tuple, leaf: Array) -> Array:
        biased = is_router(path) and names_of(path)[-1] == "bias"
        return (leaf - amount).astype(leaf.dtype) if biased else leaf

    return jax.tree_util.tree_map_with_path(shift, params)


def _missing(sums: dict[str, Array], count: Array, target: float) -> Float[Array, ""]:
    """What a batch, whose `sparsity` is among its sums, asks to be taken from the biases.

    In units of the spread of the logits, for which four times that of the scores stands (at the threshold a score moves
    by a quarter of its logit): at 0.5 about what Newton's step would be, if they were normal. A fixed unit
    overshoots where routers are all of one mind: in a pretrained model every expert went on and off from step to step.
    """
    sparsity, mean, square = (sums[name] / count for name in ("sparsity", "score", "score_squared"))
    spread = jnp.minimum(4 * jnp.sqrt(jnp.maximum(square - mean**2, LEAST_SPREAD**2)), 1.0)
    return spread * jnp.clip(BIAS_GAIN * (target - sparsity), -BIAS_RATE, BIAS_RATE)


def bias_control(target: float) -> Control:
    """Moves the biases of the routers alone, all by one amount, until `sparsity` is `target`; they may be frozen else.

    For LTE's stage 2, where routers do not train, their inputs move, and the share of experts that is left out with
    them (on a small model from 0.70 to 0.02): which expert is before which stays with the routers.
    """

    def update(state: Mapping[str, Any], sums: dict[str, Array], count: Array) -> tuple[Kept, dict[str, Array]]:
        return {"params": shifted(state["params"], _missing(sums, count, target))}, {}

    return Control(update=update)


def sparsity_control(target: float, start: float) -> Control:
    """Moves the weight of `efficiency`, from `start`, and the biases of the routers until `sparsity` is `target`.

    `sparsity`, `score` and `score_squared` are among the sums of a step; the biases follow each batch.
    """

    def init() -> Kept:
        return {KEY: Eta(jnp.float32(math.log(start)), jnp.float32(0.0), jnp.int32(0))}

    def weights(state: Mapping[str, Any]) -> dict[str, Array]:
        return {"efficiency": jnp.exp(state[KEY].log_eta)}

    def update(state: Mapping[str, Any], sums: dict[str, Array], count: Array) -> tuple[Kept, dict[str, Array]]:
        sparsity = sums["sparsity"] / count
        eta = jnp.exp(state[KEY].log_eta) * count  # as all sums: a row of the record divides by the count
        kept = {
            KEY: moved(state[KEY], sparsity, target, start),
            "params": shifted(state["params"], _missing(sums, count, target)),
        }
        return kept, {"eta": eta}

    return Control(init, weights, update)
