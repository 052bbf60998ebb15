"""Diagnostics during training: rows for metrics.jsonl, compiled once, from parameters around one optimizer step."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from fbi.analysis import codes as measures
from fbi.analysis.batch import Measure
from fbi.analysis.codes import Ratio
from fbi.analysis.names import parse
from fbi.analysis.sites import Stack, stacks
from fbi.model import Model, Params
from fbi.quant import Ctx, QParams, Quantizer


class Tensor(NamedTuple):
    """One weight as the measures see it: the codes before and after a step, and the latents after it."""

    quantizer: Quantizer
    w: Array
    qparams: QParams
    codes: Array
    before: Array | None
    ctx: Ctx


WEIGHTS: dict[str, Callable[[Tensor], dict[str, Ratio]]] = {
    "flips": lambda t: {} if t.before is None else {"flips": measures.flips(t.before, t.codes)},
    "entropy": lambda t: {"entropy": measures.entropy(t.codes)},
    "margin": lambda t: {
        "margin": measures.margin(t.quantizer, t.w, t.qparams),
        "near": measures.near_threshold(t.quantizer, t.w, t.qparams, jax.random.key(0)),
    },
    "error": lambda t: {"error": measures.relative_error(t.w, t.quantizer.apply(t.w, t.qparams, t.ctx))},
    "masked": lambda t: {"masked": measures.masked(t.quantizer, t.w, t.qparams, t.ctx)},
}


class Diagnostics:
    """What is measured around a step: `before` it (its buffers are given away), `after` it, `rows` when they are read.

    `batch` are the measures by name that need the batch of the step; they see the parameters before it. A model
    without quantized weights has rows from these alone.
    """

    def __init__(self, model: Model, names: str, batch: dict[str, Measure] | None = None):
        self.names = parse(names)
        self.stacks = stacks(model)
        self._batch = {name: measure for name, measure in (batch or {}).items() if name in self.names}
        self._before, self._after = jax.jit(self._encode), jax.jit(self._measure)

    def before(self, params: Params, teacher_params: Any, batch: Any, progress: Array) -> Any:
        """What must be kept of the state that a step is about to consume: codes, and what the batch shows."""
        return self._before(params, teacher_params, batch, progress)

    def after(self, held: Any, params: Params, progress: Any) -> Any:
        """The measurements, on the devices, of what `before` kept and the parameters after the step."""
        return held[1], self._after(held[0], params, progress)

    def rows(self, measured: Any, step: int) -> list[dict[str, Any]]:
        """A row for each site and one of all, `site="all"`, for metrics.jsonl; a quotient that is none is None."""
        by_batch, by_stack = jax.device_get(measured)
        found: dict[str, dict[str, Ratio]] = {}
        for stack, fields in zip(self.stacks, by_stack, strict=True):
            for at, site in enumerate(stack.sites):
                found[site] = {name: Ratio(r.total[at], r.over[at]) for name, r in fields.items()}
        for sites in by_batch.values():
            for site, fields in sites.items():
                found[site] = found.get(site, {}) | fields
        pooled: dict[str, list[Ratio]] = {}
        for fields in found.values():
            for name, ratio in fields.items():
                pooled.setdefault(name, []).append(ratio)
        rows = [_row(step, site, {n: [r] for n, r in found[site].items()}) for site in sorted(found, key=_by_layer)]
        return [*rows, _row(step, "all", pooled)] if found else []

    def _encode(self, params: Params, *batch: Any) -> Any:
        kept = [self._codes(s, params) for s in self.stacks] if "flips" in self.names else None
        return kept, {name: measure(params, *batch) for name, measure in self._batch.items()}

    def _codes(self, stack: Stack, params: Params) -> Array:
        quantizer = stack.method.build("weight")
        return jax.vmap(lambda w, qparams: quantizer.encode(w, qparams).codes)(*stack.read(params))

    def _measure(self, kept: list[Array] | None, params: Params, progress: Array) -> list[dict[str, Ratio]]:
        found = []
        for place, stack in enumerate(self.stacks):
            quantizer, (w, qparams) = stack.method.build("weight"), stack.read(params)

            def measure(w: Array, qparams: QParams, before: Array | None, quantizer: Quantizer = quantizer) -> dict:
                codes = quantizer.encode(w, qparams).codes
                tensor = Tensor(quantizer, w, qparams, codes, before, Ctx(progress))
                return {k: r for name in self.names if name in WEIGHTS for k, r in WEIGHTS[name](tensor).items()}

            found.append(jax.vmap(measure)(w, qparams, kept[place] if kept else None))
        return found


def _row(step: int, site: str, fields: Mapping[str, Sequence[Ratio]]) -> dict[str, Any]:
    return {"kind": "diagnostics", "step": step, "site": site} | {n: _quotient(rs) for n, rs in fields.items()}


def _quotient(ratios: Sequence[Ratio]) -> float | None:
    total, count = (math.fsum(float(r[i]) for r in ratios) for i in (0, 1))
    return total / count if count > 0 and math.isfinite(total / count) else None


def _by_layer(site: str) -> tuple[int, str]:
    _, _, rest = site.partition("layers.")
    number, _, name = rest.partition(".")
    return (int(number), name) if rest else (-1, site)
