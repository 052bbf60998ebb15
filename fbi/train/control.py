"""Requested sparsity: the weight of LTE's efficiency term follows the share of experts that its routers leave out.

LTE (arXiv 2402.06126) searches that weight, eta, by hand for every model and task. Here a controller moves it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

KEY = "control"  # of the state of training
MEMORY = 0.8  # of the running mean of the sparsity of batches
RATE = 0.1  # how far log eta may move in a step, at most
GAIN = 0.5  # steps of log eta for each unit of sparsity that is missing
DAMPING = 8.0  # the same for each unit by which sparsity rose since the step before
RANGE = 1e4  # eta stays within this factor of its start

Kept = dict[str, Any]


class Control(NamedTuple):
    """Numbers that a step carries on beside parameters and optimizer, and what it does with them.

    `init() -> part of the state`; `weights(state) -> weights of the loss by kind`; `update(state, sums, count,
    progress) -> (that part after the step, sums to log)`.
    """

    init: Callable[[], Kept] = dict
    weights: Callable[[Mapping[str, Any]], dict[str, Array]] = lambda state: {}
    update: Callable[..., tuple[Kept, dict[str, Array]]] = lambda state, sums, count, progress: ({}, {})


NO_CONTROL = Control()


class Eta(NamedTuple):
    """What the controller remembers."""

    log_eta: Float[Array, ""]
    mean: Float[Array, ""]
    """Of the sparsity of batches, exponentially weighted; before the first batch, nothing."""
    seen: Int[Array, ""]
    """Batches."""


def moved(eta: Eta, sparsity: Float[Array, ""], target: float, start: float) -> Eta:
    """The controller after a batch of that sparsity: log eta += clip(GAIN (target - mean) - DAMPING d mean, +-RATE).

    Multiplicative and integral, of bounded rate: eta may have to change by orders of magnitude, and the scores answer
    to its integral. The damping looks ahead: scores that are on their way have momentum.
    """
    first = eta.seen == 0
    mean = jnp.where(first, sparsity, MEMORY * eta.mean + (1 - MEMORY) * sparsity)
    rise = jnp.where(first, 0.0, mean - eta.mean)
    change = jnp.clip(GAIN * (target - mean) - DAMPING * rise, -RATE, RATE)
    center, reach = math.log(start), math.log(RANGE)
    log_eta = jnp.clip(eta.log_eta + change, center - reach, center + reach)
    return Eta(log_eta, mean, eta.seen + 1)


def sparsity_control(target: float, start: float) -> Control:
    """Moves the weight of `efficiency` from `start` until the sum `sparsity` of the batches, a mean, is `target`."""

    def init() -> Kept:
        return {KEY: Eta(jnp.float32(math.log(start)), jnp.float32(0.0), jnp.int32(0))}

    def weights(state: Mapping[str, Any]) -> dict[str, Array]:
        return {"efficiency": jnp.exp(state[KEY].log_eta)}

    def update(
        state: Mapping[str, Any], sums: dict[str, Array], count: Array, progress: Array
    ) -> tuple[Kept, dict[str, Array]]:
        eta = jnp.exp(state[KEY].log_eta) * count  # as all sums: a row of the record divides by the count
        hard, soft = sums["sparsity"] / count, 1 - sums["score"] / count
        seen = soft + jnp.minimum(2 * progress, 1.0) * (hard - soft)
        return {KEY: moved(state[KEY], seen, target, start)}, {"eta": eta}

    return Control(init, weights, update)
