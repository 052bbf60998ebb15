"""How far the gradient of a quantized step points where the unquantized activations would send it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fbi.analysis.codes import Ratio
from fbi.model import Model, Params
from fbi.model.config import linear_shapes
from fbi.model.decoder import segments
from fbi.policy import NONE, Policy

Objective = Callable[[Model, Params], Float[Array, ""]]


def without_activations(policy: Policy) -> Policy:
    """The same rules, with every activation in full precision."""
    return Policy(
        tuple(dataclasses.replace(rule, methods=rule.methods._replace(activation=NONE)) for rule in policy.rules)
    )


def restacked(params: Params, source: Model, target: Model) -> Params:
    """The parameters of `source` cut into the stacks of `target`, without the leaves that only `source` has.

    For two policies that give the weights the same methods; linear, so gradients pass back through it.
    """
    wanted = target.abstract()
    out = {name: _pruned(params[name], wanted[name]) for name in wanted if name in params}
    for start, stop in segments(target.bound, target.config.layers):
        pieces = []
        for first, last in segments(source.bound, source.config.layers):
            low, high = max(start, first), min(stop, last)
            if low < high:
                tree = _pruned(params[f"layers_{first}_{last}"], wanted[f"layers_{start}_{stop}"])
                pieces.append(jax.tree.map(lambda x, a=low - first, b=high - first: x[a:b], tree))
        out[f"layers_{start}_{stop}"] = jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)
    return out


def _pruned(tree: Any, wanted: Any) -> Any:
    return {name: _pruned(tree[name], wanted[name]) for name in wanted} if isinstance(tree, dict) else tree


def cosine(a: Float[Array, "*s"], b: Float[Array, "*s"]) -> Ratio:
    """<a, b> / (|a| |b|), before the division; pooled, the mean of cosines weighted by the product of norms."""
    return Ratio(jnp.sum(a * b), jnp.sqrt(jnp.sum(jnp.square(a)) * jnp.sum(jnp.square(b))))


def gradient_alignment(model: Model, params: Params, objective: Objective) -> dict[str, Ratio]:
    """Site -> cosine of dL/dw to the gradient at the same parameters with activation quantization off.

    QuEST, arXiv 2502.05003, section 4 (there from the last feed-forward layer down to the first attention). `objective`
    gives the loss of a model on a batch. Without activation methods in the policy every cosine is 1.
    """
    plain = Model(
        model.config, without_activations(model.policy), axes=model.axes, remat=model.remat, unroll=model.unroll
    )
    quantized = jax.grad(lambda p: objective(model, p))(params)
    free = jax.grad(lambda p: objective(plain, restacked(p, model, plain)))(params)
    found: dict[str, Ratio] = {}
    for start, stop in segments(model.bound, model.config.layers):
        for site in linear_shapes(model.config):
            part, name = site.split(".")
            ours, theirs = (tree[f"layers_{start}_{stop}"][part][name]["w"] for tree in (quantized, free))
            ratios = jax.vmap(cosine)(ours, theirs)
            for layer in range(start, stop):
                found[f"layers.{layer}.{site}"] = jax.tree.map(lambda x, at=layer - start: x[at], ratios)
    return found
