"""Diagnostics that need a batch: outliers of the activations, alignment of the gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fbi.analysis.activations import activation_statistics
from fbi.analysis.codes import Ratio
from fbi.analysis.gradients import gradient_alignment
from fbi.model import Model, Params
from fbi.model.config import linear_shapes
from fbi.quant import Ctx

Fields = dict[str, dict[str, Ratio]]  # site -> field -> ratio
Measure = Callable[[Params, Any, Any, Array], Fields]  # (params, teacher_params, batch, progress) -> fields
Documents = Callable[[Int[Array, "b t"]], Int[Array, "b t"] | None]


def activations(model: Model, documents: Documents) -> Measure:
    """The statistics of `activation_statistics` of the input of each linear layer, before its quantizer."""
    names = [*(f"layers.*.{site}" for site in linear_shapes(model.config)), "head"]

    def measure(params: Params, teacher_params: Any, tokens: Array, progress: Float[Array, ""]) -> Fields:
        del teacher_params
        inputs = tokens[:, :-1]
        wanted = dict.fromkeys(names, activation_statistics)
        found = model.features(params, inputs, documents(inputs), Ctx(progress), wanted)[1]
        one = jnp.ones((), jnp.float32)
        fields: Fields = {"head": {name: Ratio(value, one) for name, value in found.pop("head").items()}}
        for site, statistics in found.items():
            for layer in range(model.config.layers):
                fields[f"layers.{layer}.{site}"] = {name: Ratio(v[layer], one) for name, v in statistics.items()}
        return fields

    return measure


def alignment(model: Model, objective: Callable[..., tuple[Array, Any]]) -> Measure:
    """`gradient_alignment` of what the run minimises: `objective(model, params, teacher_params, batch, progress)`."""

    def measure(params: Params, teacher_params: Any, batch: Any, progress: Float[Array, ""]) -> Fields:
        def loss(some: Model, at: Params) -> Array:
            return objective(some, at, teacher_params, batch, progress)[0]

        return {site: {"alignment": ratio} for site, ratio in gradient_alignment(model, params, loss).items()}

    return measure


def of_tokens(measure: Measure, split: Callable[[Any], tuple[Array, Any]]) -> Measure:
    """A measure that takes tokens, for batches of which `split` gives the tokens first."""
    return lambda params, teacher_params, batch, progress: measure(params, teacher_params, split(batch)[0], progress)


def on_part(measure: Measure, parts: int) -> Measure:
    """The measure of one of the parts in which the batch is accumulated: what fits in memory there, fits here."""

    def first(params: Params, teacher_params: Any, batch: Any, progress: Array) -> Fields:
        part = jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:])[:, 0], batch)
        return measure(params, teacher_params, part, progress)

    return measure if parts == 1 else first
