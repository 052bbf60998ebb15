"""Scales: the numbers that stand beside the codes, where they come from and over which axes they reach."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fbi.errors import unknown

QParams = dict[str, Array]
GRANULARITIES = ("input", "output", "tensor")


class Affine(NamedTuple):
    """A scale and, where the method has one, a shift; both keep the tensor's number of axes."""

    scale: Array
    shift: Array | None = None


class Scale(NamedTuple):
    """Where a tensor's scale comes from: pure functions, for one contraction axis.

    `init(x) -> qparams` gives the learned leaves; `solve(x, qparams) -> (units, Affine)` brings x to the units of
    the grid and gives the numbers that bring levels back; `shapes(shape)` are the shapes of the numbers stored.
    """

    init: Callable[[Array], QParams]
    solve: Callable[[Array, QParams], tuple[Array, Affine]]
    shapes: Callable[[tuple[int, ...]], list[tuple[int, ...]]]


def reduced_axes(granularity: str, ndim: int, axis: int) -> tuple[int, ...]:
    """The axes that share one number: all but the contraction axis (`input`), that axis alone (`output`), or all."""
    contraction = axis % ndim
    if granularity == "input":
        return tuple(a for a in range(ndim) if a != contraction)
    if granularity == "output":
        return (contraction,)
    if granularity == "tensor":
        return tuple(range(ndim))
    raise unknown("granularity", granularity, GRANULARITIES)


def kept_shape(shape: tuple[int, ...], reduced: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` with the reduced axes kept as 1."""
    return tuple(1 if a in reduced else n for a, n in enumerate(shape))


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

    def solve(x: Float[Array, "..."], qparams: QParams) -> tuple[Array, Affine]:
        affine = Affine(qparams["alpha"].astype(x.dtype), qparams["beta"].astype(x.dtype) if shift else None)
        return x, jax.lax.stop_gradient(affine) if frozen else affine

    def shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [kept_shape(shape, reduced_axes(granularity, len(shape), axis))] * (2 if shift else 1)

    return Scale(init, solve, shapes)


def statistic(
    measure: Callable[[Array, tuple[int, ...]], Array], granularity: str, axis: int, *, rule: str, top: int = 1
) -> Scale:
    """A statistic s of the tensor itself, taken anew at each call and held out of the gradient.

    units = top / s * x and scale = s / top. A tensor of zeros is guarded as `rule` says: `paper` adds an epsilon (the
    BitNet papers print one without its value; this one is below the rounding of any s that matters), `code` takes
    max(s, 1e-5) as the published training code does. The guarded s stands on both sides: the gradient stays one.
    """
    guard = {"paper": lambda s: s + 1e-12, "code": lambda s: jnp.maximum(s, 1e-5)}[rule]

    def solve(x: Float[Array, "..."], qparams: QParams) -> tuple[Array, Affine]:
        del qparams
        s = guard(measure(jax.lax.stop_gradient(x), reduced_axes(granularity, x.ndim, axis)))
        return x * (top / s), Affine(s / top)

    def shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [kept_shape(shape, reduced_axes(granularity, len(shape), axis))]

    return Scale(lambda x: {}, solve, shapes)


def mean_abs(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """The mean of |x| over `axes`, keepdims."""
    return jnp.mean(jnp.abs(x), axes, keepdims=True)


def max_abs(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """The maximum of |x| over `axes`, keepdims."""
    return jnp.max(jnp.abs(x), axes, keepdims=True)
