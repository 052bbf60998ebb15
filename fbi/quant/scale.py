"""Scales: the numbers that stand beside the codes, where they come from and over which axes they reach."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fbi.errors import unknown
from fbi.quant.field import Affine, Field, Unit
from fbi.quant.ste import Ctx
from fbi.quant.surrogate import regraded

QParams = dict[str, Array]
Axes = tuple[int, ...]
Measure = Callable[[Array, Axes], Array]
GRANULARITIES = ("input", "output", "tensor")
LEAST = 1e-12  # below the rounding of any scale that matters


class Scale(NamedTuple):
    """Where a tensor's scale comes from: pure functions, for one contraction axis.

    `init(x) -> qparams` gives the learned leaves; `solve(x, qparams, ctx) -> (units, Field)` brings x to the units of
    the grid and gives the numbers that bring levels back; `shapes(shape)` are the shapes of the numbers stored.
    """

    init: Callable[[Array], QParams]
    solve: Callable[[Array, QParams, Ctx], tuple[Array, Field]]
    shapes: Callable[[tuple[int, ...]], list[tuple[int, ...]]]


def reduced_axes(granularity: str, ndim: int, axis: int) -> Axes:
    """The axes that share one number: all but the contraction axis (`input`), that axis alone (`output`), or all."""
    contraction = axis % ndim
    if granularity == "input":
        return tuple(a for a in range(ndim) if a != contraction)
    if granularity == "output":
        return (contraction,)
    if granularity == "tensor":
        return tuple(range(ndim))
    raise unknown("granularity", granularity, GRANULARITIES)


def kept_shape(shape: tuple[int, ...], reduced: Axes) -> tuple[int, ...]:
    """`shape` with the reduced axes kept as 1."""
    return tuple(1 if a in reduced else n for a, n in enumerate(shape))


def shaped(granularity: str, axis: int, count: int = 1) -> Callable[[tuple[int, ...]], list[tuple[int, ...]]]:
    """The `shapes` of a scale with `count` numbers over those axes."""
    return lambda shape: [kept_shape(shape, reduced_axes(granularity, len(shape), axis))] * count


def unitless() -> Scale:
    """No scale: the units are the values themselves."""

    def solve(x: Float[Array, "..."], qparams: QParams, ctx: Ctx) -> tuple[Array, Field]:
        del qparams, ctx
        return x, Unit(jnp.zeros((0,), x.dtype))

    return Scale(lambda x: {}, solve, lambda shape: [])


def fitted_sign(granularity: str, axis: int, *, shift: bool, frozen: bool) -> Scale:
    """Learned alpha and beta of alpha * sign(w) + beta, started from the first latent weight.

    beta = mean(w), alpha = mean|w - beta| over the axes that share them: FBI-LLM, arXiv 2407.07093, section 3.1.
    With `shift=False` beta is zero throughout. `frozen` keeps both at their start.
    The units are w itself, so that dL/dw = alpha dL/dw_hat as published.
    """

    def init(x: Float[Array, "..."]) -> QParams:
        axes = reduced_axes(granularity, x.ndim, axis)
        if not shift:
            return {"alpha": mean_abs(x, axes)}
        beta = jnp.mean(x, axes, keepdims=True)
        return {"alpha": mean_abs(x - beta, axes), "beta": beta}

    def solve(x: Float[Array, "..."], qparams: QParams, ctx: Ctx) -> tuple[Array, Field]:
        del ctx
        affine = Affine(qparams["alpha"].astype(x.dtype), qparams["beta"].astype(x.dtype) if shift else None)
        return x, jax.lax.stop_gradient(affine) if frozen else affine

    return Scale(init, solve, shaped(granularity, axis, 2 if shift else 1))


def statistic(
    measure: Measure, granularity: str, axis: int, *, rule: str = "paper", top: float | int = 1, centred: bool = False
) -> Scale:
    """A statistic s of the tensor itself, taken anew at each call and held out of the gradient.

    units = top / s * x and scale = s / top. A tensor of zeros is guarded as `rule` says: `paper` adds an epsilon (the
    BitNet papers print one without its value; this one is below the rounding of any s that matters), `code` takes
    max(s, 1e-5) as the published training code does. The guarded s stands on both sides: the gradient stays one.
    `centred` takes the mean over the same axes off the units, not off s, and does not add it back.
    """
    guard = {"paper": lambda s: s + LEAST, "code": lambda s: jnp.maximum(s, 1e-5)}[rule]

    def solve(x: Float[Array, "..."], qparams: QParams, ctx: Ctx) -> tuple[Array, Field]:
        del qparams, ctx
        axes, fixed = reduced_axes(granularity, x.ndim, axis), jax.lax.stop_gradient(x)
        s = guard(measure(fixed, axes))
        moved = x - jnp.mean(fixed, axes, keepdims=True) if centred else x
        return moved * (top / s), Affine(s / top)

    return Scale(lambda x: {}, solve, shaped(granularity, axis))


def magnitude(measure: Measure, granularity: str, axis: int, *, centred: bool = False) -> Scale:
    """A statistic beside a sign whose units are the latent values: dL/dw = s dL/dw_hat times the surrogate at w.

    The magnitude-aware gradient of Bi-Real, arXiv 1808.00278, eq. 9. `centred` as in `statistic`.
    """

    def solve(x: Float[Array, "..."], qparams: QParams, ctx: Ctx) -> tuple[Array, Field]:
        del qparams, ctx
        axes, fixed = reduced_axes(granularity, x.ndim, axis), jax.lax.stop_gradient(x)
        moved = x - jnp.mean(fixed, axes, keepdims=True) if centred else x
        return moved, Affine(measure(fixed, axes))

    return Scale(lambda x: {}, solve, shaped(granularity, axis))


def safe(s: Float[Array, "..."]) -> Float[Array, "..."]:
    """A learned scale kept away from zero, its sign with it."""
    least = jnp.asarray(LEAST, s.dtype)
    return jnp.where(jnp.abs(s) < least, least, s)


def per_unit(x: Float[Array, "..."], s: Float[Array, "..."]) -> Float[Array, "..."]:
    """x / s, with both derivatives: d/dx = 1/s, d/ds = -(x/s)/s.

    Written so that no square of s appears, which leaves the float range for s below 1e-19.
    """
    fixed = jax.lax.stop_gradient(s)
    return x / fixed / (s / fixed)


def learned(
    start: Measure,
    granularity: str,
    axis: int,
    *,
    name: str = "alpha",
    top: float | int = 1,
    graded: Callable[[tuple[int, ...]], float] = lambda shape: 1.0,
    through: bool = True,
    frozen: bool = False,
) -> Scale:
    """One learned scale s: units = top / s * x and scale = s / top.

    `graded(shape)` multiplies the gradient of s (LSQ's 1 / sqrt(N Q)). `through=False` holds s fixed in the units: for
    a sign, whose level does not move with s (survey: without it the surrogate leaks -(w/s) into ds).
    """

    def init(x: Float[Array, "..."]) -> QParams:
        return {name: jnp.maximum(start(x, reduced_axes(granularity, x.ndim, axis)), LEAST)}

    def solve(x: Float[Array, "..."], qparams: QParams, ctx: Ctx) -> tuple[Array, Field]:
        del ctx
        s = safe(regraded(qparams[name].astype(x.dtype), graded(x.shape)))
        s = jax.lax.stop_gradient(s) if frozen else s
        units = per_unit(x, s) if through else x / jax.lax.stop_gradient(s)
        return units * top if top != 1 else units, Affine(s / top if top != 1 else s)

    return Scale(init, solve, shaped(granularity, axis))


def mean_abs(x: Float[Array, "..."], axes: Axes) -> Float[Array, "..."]:
    """The mean of |x| over `axes`, keepdims."""
    return jnp.mean(jnp.abs(x), axes, keepdims=True)


def max_abs(x: Float[Array, "..."], axes: Axes) -> Float[Array, "..."]:
    """The maximum of |x| over `axes`, keepdims."""
    return jnp.max(jnp.abs(x), axes, keepdims=True)


def rms(x: Float[Array, "..."], axes: Axes) -> Float[Array, "..."]:
    """The root mean square over `axes`, keepdims."""
    return jnp.sqrt(jnp.mean(jnp.square(x), axes, keepdims=True))


def deviation(x: Float[Array, "..."], axes: Axes) -> Float[Array, "..."]:
    """The standard deviation over `axes`, keepdims."""
    return rms(x - jnp.mean(x, axes, keepdims=True), axes)
